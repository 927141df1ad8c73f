//! How much a machine may add to the folder.
//!
//! What counts is what the folder grew by through this machine: the blocks that its files got,
//! less those that they gave back, and [`NAME_BYTES`] for each name made, less each name removed; over
//! all of its boots, and never less than nothing. Together with what the machine's own disk takes it
//! stays within the disk limit: what might go beyond fails with `NOSPC` before it is done. (Its own
//! disk the machine can fill whatever lies in the folder: that is its size.)

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::Statx;
use rustix::io::Errno;

use crate::nodes;

/// What a name counts, besides what it names.
pub const NAME_BYTES: u64 = 4096;
/// What a write may take besides its own bytes: the blocks at both ends, and one that leads to them.
pub const WRITE_MARGIN: u64 = 3 * 4096;

/// What a file takes: its blocks, but for those that its file system keeps ready behind its end.
pub fn taken(stat: &Statx) -> u64 {
    let size = stat.stx_size.checked_next_multiple_of(NAME_BYTES).unwrap_or(u64::MAX);
    stat.stx_blocks.saturating_mul(512).min(size)
}

/// The count.
pub struct Quota {
    limit: u64,
    // The machine's own disk, which only grows and is measured, never written.
    disk: Option<File>,
    book: Option<File>,
    count: Mutex<Count>,
}

#[derive(Clone, Copy, Default)]
struct Count {
    used: u64,
    // Of work that is being done.
    reserved: u64,
    written: u64,
}

impl Quota {
    /// So many bytes together with a disk; `book` is where the count is kept, a number of eight bytes,
    /// low end first.
    pub fn new(limit: u64, disk: Option<File>, book: Option<File>) -> Quota {
        let mut bytes = [0; 8];
        let used = match &book {
            Some(book) if book.read_exact_at(&mut bytes, 0).is_ok() => u64::from_le_bytes(bytes),
            _ => 0,
        };
        let count = Count { used, reserved: 0, written: used };
        Quota { limit, disk, book, count: Mutex::new(count) }
    }

    fn lock(&self) -> MutexGuard<'_, Count> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn disk_bytes(&self) -> u64 {
        self.disk
            .as_ref()
            .and_then(|disk| nodes::stat(disk).ok())
            .map_or(0, |stat| stat.stx_blocks.saturating_mul(512))
    }

    /// Bytes of the limit, and those that are left of it.
    pub fn room(&self) -> (u64, u64) {
        let count = *self.lock();
        let taken = count.used.saturating_add(count.reserved).saturating_add(self.disk_bytes());
        (self.limit, self.limit.saturating_sub(taken))
    }

    /// Does what may add up to so many bytes, and tells how many it added.
    ///
    /// # Errors
    /// `NOSPC`, and nothing is done; or whatever the work failed with.
    pub fn grow<T>(
        &self,
        most: u64,
        work: impl FnOnce() -> Result<(T, i64), Errno>,
    ) -> Result<T, Errno> {
        {
            let disk = if most > 0 { self.disk_bytes() } else { 0 };
            let mut count = self.lock();
            let after = count.used.saturating_add(count.reserved).saturating_add(most);
            if most > 0 && after.saturating_add(disk) > self.limit {
                return Err(Errno::NOSPC);
            }
            count.reserved += most;
        }
        let done = work();
        let added = done.as_ref().map_or(0, |(_, added)| *added);
        let mut count = self.lock();
        count.reserved -= most;
        count.used = count.used.saturating_add_signed(added);
        self.keep(&mut count);
        done.map(|(value, _)| value)
    }

    /// Takes bytes off the count.
    pub fn give_back(&self, bytes: u64) {
        let mut count = self.lock();
        count.used = count.used.saturating_sub(bytes);
        self.keep(&mut count);
    }

    /// Bytes on the count.
    #[cfg(test)]
    pub fn used(&self) -> u64 {
        self.lock().used
    }

    /// Writes the count down; it is not synced, since it need not outlive the host's crash.
    fn keep(&self, count: &mut Count) {
        if count.written == count.used {
            return;
        }
        count.written = count.used;
        if let Some(book) = &self.book
            && let Err(error) = book.write_all_at(&count.used.to_le_bytes(), 0)
        {
            tracing::warn!(%error, "the workspace's count is not written down");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn what_may_go_beyond_is_not_begun() {
        let quota = Quota::new(100, None, None);
        assert_eq!(quota.grow(60, || Ok(((), 60))), Ok(()));
        let begun = quota.grow(41, || -> Result<((), i64), Errno> { panic!("it was begun") });
        assert_eq!(begun, Err(Errno::NOSPC));
        // What takes nothing new always goes, and what failed takes nothing.
        assert_eq!(quota.grow(0, || Ok(((), 0))), Ok(()));
        assert_eq!(quota.grow(40, || Err::<((), i64), _>(Errno::IO)), Err(Errno::IO));
        assert_eq!(quota.used(), 60);
        quota.give_back(1000);
        assert_eq!((quota.used(), quota.room()), (0, (100, 100)));
    }

    #[test]
    fn the_count_survives() {
        let book = tempfile::tempfile().unwrap();
        let quota = Quota::new(1 << 40, None, Some(book.try_clone().unwrap()));
        let kept = || {
            let mut bytes = [0; 8];
            book.read_exact_at(&mut bytes, 0).unwrap();
            u64::from_le_bytes(bytes)
        };
        for _ in 0..100 {
            quota.grow(100_000, || Ok(((), 100_000))).unwrap();
            assert_eq!(kept(), quota.used());
        }
        quota.give_back(1);
        drop(quota);
        assert_eq!(Quota::new(1 << 40, None, Some(book)).used(), 9_999_999);
    }

    #[test]
    fn the_machines_own_disk_counts_too() {
        let disk = tempfile::tempfile().unwrap();
        disk.write_all_at(&[1; 65_536], 0).unwrap();
        let taken = nodes::stat(&disk).unwrap().stx_blocks * 512;
        let quota = Quota::new(taken + 10, Some(disk), None);
        assert_eq!(quota.grow(11, || Ok(((), 11))), Err(Errno::NOSPC));
        assert_eq!(quota.grow(10, || Ok(((), 10))), Ok(()));
    }
}
