//! What happens to files, on its way to the host.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use aegis_wire::bounds::{FILE_DEPTH_MAX, FILE_WATCHES_MAX};
use aegis_wire::channel::files::{Event, Fault, FilePath, Happened};
use aegis_wire::channel::output::Kind;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;

use super::{DRAFT, agree, as_path, at_once, fault};
use crate::exec::Host;
use crate::hands::Hands;
use crate::output::{Sink as _, last_frame};
use crate::sys;

/// Bytes of the kernel's events that are taken at a time.
const EVENTS: usize = 16 * 1024;

/// Tells what happens until what is watched is gone.
pub async fn run(
    clerks: &Hands,
    host: &mut Host,
    path: FilePath,
    recursive: bool,
) -> Result<(), Fault> {
    let mut watch = at_once(clerks, move || Watch::begin(path, recursive)).await?;
    let queue = watch.queue.try_clone().map_err(fault)?;
    let ready = sys::watch(queue).map_err(fault)?;
    agree(host, None).await;
    while host.listens() {
        ready.readable().await.map_err(fault)?.clear_ready();
        let told = at_once(clerks, move || {
            let told = watch.read();
            Ok((watch, told))
        });
        let events;
        (watch, events) = told.await?;
        for event in &events {
            host.send(&last_frame(Kind::Data, event)).await;
        }
        if events.last().is_some_and(|last| last.event == Happened::Gone) {
            break;
        }
    }
    host.send(&last_frame(Kind::DataEnd, &())).await;
    Ok(())
}

struct Watch {
    queue: OwnedFd,
    root: PathBuf,
    recursive: bool,
    places: HashMap<i32, PathBuf>,
}

fn wanted() -> WatchFlags {
    WatchFlags::CREATE
        | WatchFlags::MODIFY
        | WatchFlags::ATTRIB
        | WatchFlags::DELETE
        | WatchFlags::MOVE
        | WatchFlags::DELETE_SELF
        | WatchFlags::MOVE_SELF
}

impl Watch {
    fn begin(path: FilePath, recursive: bool) -> Result<Watch, Fault> {
        let queue = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(fault)?;
        let root = as_path(&path).to_owned();
        let is_dir = fs::metadata(&root).map_err(fault)?.is_dir();
        let mut watch = Watch { queue, root, recursive, places: HashMap::new() };
        watch.add(watch.root.clone())?;
        if recursive && is_dir {
            watch.descend(&watch.root.clone(), &mut Vec::new())?;
        }
        Ok(watch)
    }

    fn add(&mut self, place: PathBuf) -> Result<(), Fault> {
        if self.places.len() >= FILE_WATCHES_MAX {
            return Err(Fault::TooManyWatches);
        }
        match inotify::add_watch(&self.queue, &place, wanted()) {
            Ok(number) => drop(self.places.insert(number, place)),
            Err(Errno::NOSPC) => return Err(Fault::TooManyWatches),
            Err(error) => return Err(fault(error)),
        }
        Ok(())
    }

    /// Watches all directories below one, and tells what is in them.
    fn descend(&mut self, top: &Path, found: &mut Vec<Event>) -> Result<(), Fault> {
        let mut todo = vec![(top.to_owned(), 0)];
        while let Some((directory, depth)) = todo.pop() {
            // One that is gone by now has nothing in it.
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
                let path = entry.path();
                self.tell(found, Happened::Created, &path, is_dir);
                if is_dir && depth < FILE_DEPTH_MAX {
                    match self.add(path.clone()) {
                        Err(Fault::TooManyWatches) => return Err(Fault::TooManyWatches),
                        // Gone, or not to be looked into.
                        Err(_) => {}
                        Ok(()) => todo.push((path, depth + 1)),
                    }
                }
            }
        }
        Ok(())
    }

    fn tell(&self, events: &mut Vec<Event>, event: Happened, path: &Path, dir: bool) {
        let name = path.file_name().map(OsStr::as_bytes).unwrap_or_default();
        if name.starts_with(DRAFT.as_bytes()) {
            return;
        }
        if let Ok(path) = path.as_os_str().to_owned().into_vec().try_into() {
            events.push(Event { event, path, dir });
        }
    }

    /// What happened, as far as the kernel has told.
    fn read(&mut self) -> Vec<Event> {
        let mut buffer = [MaybeUninit::uninit(); EVENTS];
        let mut raw = Vec::new();
        let mut reader = Reader::new(&self.queue, &mut buffer);
        while let Ok(event) = reader.next() {
            let name = event.file_name().map(|name| name.to_bytes().to_vec());
            raw.push((event.wd(), event.events(), name));
            if reader.is_buffer_empty() {
                break;
            }
        }
        let mut events = Vec::new();
        for (number, flags, name) in raw {
            self.take(number, flags, name, &mut events);
            if events.last().is_some_and(|last| last.event == Happened::Gone) {
                break;
            }
        }
        events
    }

    fn take(
        &mut self,
        number: i32,
        flags: ReadFlags,
        name: Option<Vec<u8>>,
        events: &mut Vec<Event>,
    ) {
        let root = self.root.clone();
        if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
            return self.tell(events, Happened::Overflow, &root, true);
        }
        let Some(place) = self.places.get(&number).cloned() else { return };
        let own = ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::IGNORED;
        if flags.intersects(own | ReadFlags::UNMOUNT) {
            if place == root {
                self.tell(events, Happened::Gone, &root, flags.contains(ReadFlags::ISDIR));
            }
            // One below is told of by the directory that it was in.
            if !flags.contains(ReadFlags::IGNORED) {
                let _ = inotify::remove_watch(&self.queue, number);
            }
            self.places.remove(&number);
            return;
        }
        let path = name.map_or(place.clone(), |name| place.join(OsStr::from_bytes(&name)));
        let dir = flags.contains(ReadFlags::ISDIR);
        let arrived = flags.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO);
        let event = if arrived {
            Happened::Created
        } else if flags.intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM) {
            Happened::Removed
        } else if flags.contains(ReadFlags::MODIFY) {
            Happened::Modified
        } else {
            Happened::Changed
        };
        self.tell(events, event, &path, dir);
        if self.recursive && dir && arrived {
            let below = self.add(path.clone()).and_then(|()| self.descend(&path, events));
            if below == Err(Fault::TooManyWatches) {
                self.tell(events, Happened::Overflow, &root, true);
            }
        }
    }
}
