//! The host's own changes: directories that the machine looked into are watched (inotify), and what it
//! was told of their names is noted. So what it was told may be believed for long: it is told when it
//! is not true any more.

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::hash::{BuildHasher as _, RandomState};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

use crate::news::LONG;

/// Directories that are watched at most, where the host lets a user have many times as many: the limit
/// is shared by all machines, and by all other programs of the user.
const WATCHED_MAX: usize = 16 * 1024;
/// The part of the host's limit that a machine takes.
const SHARE: usize = 64;
/// Names that nothing has, and that are believed to be so, at most.
const NOTHINGS_MAX: usize = 16 * 1024;
/// Bytes of news that are read at a time.
pub const CHUNK: usize = 64 * 1024;
/// What the kernel tells of a directory.
const WATCHED: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVE)
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::ONLYDIR);

/// File systems whose every change goes through this kernel.
const LOCAL: [i64; 6] = [
    0xef53,      // ext4
    0x5846_5342, // xfs
    0x9123_683e, // btrfs
    0x0102_1994, // tmpfs
    0xf2f5_2010, // f2fs
    0x2fc1_2fc1, // zfs
];

/// What the machine believes of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Belief {
    /// Nothing that it was told.
    Unknown,
    /// Nothing has it.
    Nothing,
    /// This node has it.
    Node(u64),
}

/// What may have changed.
#[derive(Debug, Default)]
pub struct Changes {
    /// Names, with the nodes of their directories.
    pub names: HashSet<(u64, CString)>,
    /// Directories.
    pub directories: HashSet<u64>,
    /// There was more news than the kernel keeps: anything may have changed.
    pub lost: bool,
}

#[derive(Default)]
struct Table {
    by_node: HashMap<u64, i32>,
    by_watch: HashMap<i32, u64>,
    // By hash of directory and name.
    names: HashMap<u64, u64>,
    // How many of them were left when they were tidied last.
    tidied: usize,
    nothings: HashMap<(u64, CString), Instant>,
}

/// All that is watched.
pub struct Watch {
    inotify: OwnedFd,
    // In front of a descriptor's number: a path to what it is of.
    way: &'static str,
    most: usize,
    hasher: RandomState,
    // The machine takes news.
    heard: AtomicBool,
    table: Mutex<Table>,
}

/// How many directories a user may watch here, for whoever can look at `/proc`.
pub fn host_limit() -> usize {
    let limit = std::fs::read_to_string("/proc/sys/fs/inotify/max_user_watches");
    limit.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

impl Watch {
    /// For a folder, where its changes can be heard of; `limit` is the host's.
    pub fn new(root: &OwnedFd, way: &'static str, limit: usize) -> Option<Watch> {
        let kind = rustix::fs::fstatfs(root).ok()?.f_type;
        if !LOCAL.contains(&kind) {
            return None;
        }
        let inotify = inotify::init(CreateFlags::CLOEXEC).ok()?;
        let (heard, table) = (AtomicBool::new(false), Mutex::default());
        let most = WATCHED_MAX.min(limit / SHARE);
        Some(Watch { inotify, way, most, hasher: RandomState::new(), heard, table })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine takes news, or does not.
    pub fn set_heard(&self, heard: bool) {
        self.heard.store(heard, Ordering::Relaxed);
    }

    /// Watches a directory, if it can be; before anything is said of what is in it.
    pub fn over(&self, node: u64, directory: &OwnedFd) {
        let mut table = self.lock();
        let heard = self.heard.load(Ordering::Relaxed);
        if !heard || table.by_node.len() >= self.most || table.by_node.contains_key(&node) {
            return;
        }
        let path = format!("{}{}", self.way, directory.as_raw_fd());
        // A user may have no more, or no right to read it: then nothing is believed for long.
        let Ok(watch) = inotify::add_watch(&self.inotify, path, WATCHED) else { return };
        if let Some(before) = table.by_watch.insert(watch, node) {
            table.by_node.remove(&before);
        }
        table.by_node.insert(node, watch);
    }

    /// Whether a directory is watched.
    pub fn covers(&self, node: u64) -> bool {
        self.lock().by_node.contains_key(&node)
    }

    /// The machine forgot a node, which it was told of by this name.
    pub fn forget(&self, node: u64, parent: u64, name: &CStr) {
        let mut table = self.lock();
        if let Some(watch) = table.by_node.remove(&node) {
            table.by_watch.remove(&watch);
            let _ = inotify::remove_watch(&self.inotify, watch);
        }
        let hash = self.hash(parent, name);
        if table.names.get(&hash) == Some(&node) {
            table.names.remove(&hash);
        }
    }

    fn hash(&self, parent: u64, name: &CStr) -> u64 {
        self.hasher.hash_one((parent, name))
    }

    /// The machine is told that this name is that of a node. It is noted where changes are heard of.
    pub fn believe(&self, parent: u64, name: &CStr, node: u64) {
        let mut table = self.lock();
        if table.by_node.contains_key(&parent) {
            table.names.insert(self.hash(parent, name), node);
        } else {
            table.names.remove(&self.hash(parent, name));
        }
        if !table.nothings.is_empty() {
            table.nothings.remove(&(parent, name.to_owned()));
        }
    }

    /// The machine is told that nothing has this name; whether it may believe so for long.
    pub fn believe_nothing(&self, parent: u64, name: &CStr) -> bool {
        let mut table = self.lock();
        table.names.remove(&self.hash(parent, name));
        if table.nothings.len() >= NOTHINGS_MAX {
            table.nothings.retain(|_, since| since.elapsed() < LONG);
        }
        let room = table.nothings.len() < NOTHINGS_MAX && table.by_node.contains_key(&parent);
        if room {
            table.nothings.insert((parent, name.to_owned()), Instant::now());
        }
        room
    }

    /// The machine believes nothing of this name any more.
    pub fn doubt(&self, parent: u64, name: &CStr) {
        let mut table = self.lock();
        table.names.remove(&self.hash(parent, name));
        table.nothings.remove(&(parent, name.to_owned()));
    }

    /// What the machine believes of a name.
    pub fn belief(&self, parent: u64, name: &CStr) -> Belief {
        let table = self.lock();
        if let Some(node) = table.names.get(&self.hash(parent, name)) {
            return Belief::Node(*node);
        }
        match table.nothings.contains_key(&(parent, name.to_owned())) {
            true => Belief::Nothing,
            false => Belief::Unknown,
        }
    }

    /// Notes of names that were known by nodes which are not known any more go, when they are many.
    pub fn tidy(&self, nodes: usize, known: impl Fn(u64) -> bool) {
        let mut table = self.lock();
        // Twice what was left the last time: else each name more would be a walk over all of them.
        if table.names.len() > (2 * nodes).max(2 * table.tidied) + 1024 {
            table.names.retain(|_, node| known(*node));
            table.tidied = table.names.len();
        }
    }

    /// All names that nothing is believed to have.
    pub fn nothings(&self) -> Vec<(u64, CString)> {
        self.lock().nothings.keys().cloned().collect()
    }

    /// All directories that are watched.
    pub fn directories(&self) -> Vec<u64> {
        self.lock().by_node.keys().copied().collect()
    }

    /// Waits for the host's next changes.
    ///
    /// # Errors
    /// When none can be heard of any more.
    pub fn next(&self, buffer: &mut [MaybeUninit<u8>]) -> Result<Changes, Errno> {
        let mut changes = Changes::default();
        let mut reader = inotify::Reader::new(&self.inotify, buffer);
        loop {
            let event = match reader.next() {
                Err(Errno::INTR) => continue,
                event => event?,
            };
            changes.lost |= event.events().contains(ReadFlags::QUEUE_OVERFLOW);
            if let Some(directory) = self.lock().by_watch.get(&event.wd()).copied() {
                changes.directories.insert(directory);
                if let Some(name) = event.file_name() {
                    changes.names.insert((directory, name.to_owned()));
                }
            }
            if reader.is_buffer_empty() {
                return Ok(changes);
            }
        }
    }

    /// How many names are noted, for tests.
    #[cfg(test)]
    pub fn noted(&self) -> usize {
        self.lock().names.len()
    }

    /// For tests, which wait for nothing.
    #[cfg(test)]
    pub fn pending(&self) -> bool {
        let mut fds = [rustix::event::PollFd::new(&self.inotify, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)) == Ok(1)
    }
}
