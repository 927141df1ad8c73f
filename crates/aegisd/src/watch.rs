//! One inotify for all who follow directories: the system gives a user only some (128 usually), and
//! a guest with many readers must not use them up for everybody.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use futures_util::StreamExt as _;
use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask, Watches};
use tokio::sync::watch;

/// Follows directories; made when the first is followed.
#[derive(Default)]
pub struct Watch {
    inner: OnceLock<Arc<Inner>>,
    // Two who come first at once make one.
    making: Mutex<()>,
}

struct Inner {
    // Adding and removing are one with the counting.
    state: Mutex<State>,
}

struct State {
    watches: Watches,
    followed: HashMap<WatchDescriptor, Followed>,
}

struct Followed {
    by: usize,
    changes: watch::Sender<u64>,
}

/// A directory that is followed while this lives.
pub struct Follow {
    inner: Arc<Inner>,
    descriptor: WatchDescriptor,
    changes: watch::Receiver<u64>,
}

impl Follow {
    /// Completes when something in the directory changed since it was asked last. Cancel-safe.
    pub async fn changed(&mut self) {
        if self.changes.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Follow {
    fn drop(&mut self) {
        let mut state = self.inner.lock();
        let Some(followed) = state.followed.get_mut(&self.descriptor) else { return };
        followed.by -= 1;
        if followed.by == 0 {
            state.followed.remove(&self.descriptor);
            // A directory that is gone took its watch along.
            let _ = state.watches.remove(self.descriptor.clone());
        }
    }
}

impl Watch {
    /// Follows a directory: files in it that are written, made, or moved there.
    pub fn follow(&self, directory: &Path) -> io::Result<Follow> {
        let inner = Arc::clone(self.inner()?);
        let mut state = inner.lock();
        let mask = WatchMask::MODIFY | WatchMask::CREATE | WatchMask::MOVED_TO;
        let descriptor = state.watches.add(directory, mask)?;
        let followed = state
            .followed
            .entry(descriptor.clone())
            .or_insert_with(|| Followed { by: 0, changes: watch::Sender::new(0) });
        followed.by += 1;
        let changes = followed.changes.subscribe();
        drop(state);
        Ok(Follow { inner, descriptor, changes })
    }

    fn inner(&self) -> io::Result<&Arc<Inner>> {
        let _one = self.making.lock().unwrap_or_else(PoisonError::into_inner);
        if self.inner.get().is_none() {
            let inotify = Inotify::init()?;
            let state = State { watches: inotify.watches(), followed: HashMap::new() };
            let inner = Arc::new(Inner { state: Mutex::new(state) });
            let events = inotify.into_event_stream(vec![0; 4096])?;
            tokio::spawn(pass_on(events, Arc::clone(&inner)));
            let _ = self.inner.set(inner);
        }
        self.inner.get().ok_or_else(|| io::Error::other("the watch is lost"))
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn pass_on(mut events: inotify::EventStream<Vec<u8>>, inner: Arc<Inner>) {
    while let Some(event) = events.next().await {
        let Ok(event) = event else { continue };
        let mut state = inner.lock();
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            // Some were lost: everybody looks.
            for followed in state.followed.values() {
                followed.changes.send_modify(|n| *n += 1);
            }
        } else if event.mask.contains(EventMask::IGNORED) {
            // The directory is gone, and its number may be another's soon.
            state.followed.remove(&event.wd);
        } else if let Some(followed) = state.followed.get(&event.wd) {
            followed.changes.send_modify(|n| *n += 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn many_follow_with_one_inotify() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::create_dir(&a).unwrap();
        std::fs::create_dir(&b).unwrap();
        let watch = Watch::default();
        let mut all: Vec<Follow> = (0..300).map(|_| watch.follow(&a).unwrap()).collect();
        let mut other = watch.follow(&b).unwrap();
        std::fs::write(a.join("log"), "x").unwrap();
        for follow in &mut all {
            follow.changed().await;
        }
        std::fs::write(b.join("log"), "x").unwrap();
        other.changed().await;
        drop(all);
        let inner = Arc::clone(watch.inner().unwrap());
        assert_eq!(inner.lock().followed.len(), 1);
        // Followed anew, it is heard again.
        let mut again = watch.follow(&a).unwrap();
        std::fs::write(a.join("log"), "y").unwrap();
        again.changed().await;
    }

    #[tokio::test]
    async fn a_directory_may_go_and_come_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::create_dir(&path).unwrap();
        let watch = Watch::default();
        let old = watch.follow(&path).unwrap();
        std::fs::remove_dir(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        let mut new = watch.follow(&path).unwrap();
        drop(old);
        std::fs::write(path.join("log"), "x").unwrap();
        new.changed().await;
    }
}
