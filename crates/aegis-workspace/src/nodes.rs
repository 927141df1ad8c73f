//! What the machine's kernel knows of the folder: a number for each file that it was told of, until
//! it forgets it.
//!
//! A file is known by what it is (device, inode, time of birth), and found by its last known name
//! below a directory that is found likewise. A descriptor of it is a cache of that: of the many
//! files that a kernel remembers few are open here. Whatever else stands under that name by then is
//! another file, and the old one is stale. A file that loses its name while it is known keeps its
//! descriptor, since there is no other way to it. A directory that does is not of the folder any more,
//! nor is what is below it, until it is found again.

mod lost;

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxAttributes, StatxFlags,
};
use rustix::io::Errno;

use crate::abi::ROOT_ID;
use crate::quota::{Quota, taken};
pub use crate::stamp::{Key, Stamp, Told};

/// Directories above each other that are walked down again.
const DEPTH_MAX: usize = 2048;

/// How much is known at a time.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Files and directories.
    pub nodes: usize,
    /// Descriptors of some of them.
    pub descriptors: usize,
    /// Those without a name, whose descriptors stay.
    pub nameless: usize,
}

/// A node's end: with it the room of a file without a name is given back.
struct Grave {
    quota: Arc<Quota>,
    nameless: Option<Arc<OwnedFd>>,
}

impl Grave {
    fn new(quota: &Arc<Quota>) -> Grave {
        Grave { quota: Arc::clone(quota), nameless: None }
    }
}

impl Drop for Grave {
    fn drop(&mut self) {
        // Only what was counted comes back: of all else the name alone was.
        if let Some(fd) = self.nameless.take()
            && let Ok(stat) = stat(fd)
            && stat.stx_nlink == 0
            && kind(&stat) == FileType::RegularFile
        {
            self.quota.give_back(taken(&stat));
        }
    }
}

/// A part of the way to a file: its number, its name, what it must be.
type Part = (u64, CString, Key);

struct Node {
    key: Key,
    // As often as the kernel was told of it and has not forgotten.
    lookups: u64,
    parent: u64,
    name: CString,
    fd: Option<Arc<OwnedFd>>,
    // Since the last look at the queue.
    used: bool,
    nameless: bool,
    // It is under another name by now, or under none.
    lost: bool,
    // Therefore its descriptor stays, and counts as one of a file without a name.
    kept: bool,
    // What of it the machine was told, unless that is not believed any more.
    told: Option<Told>,
    // What it was right after the machine itself changed it last.
    own: Option<Stamp>,
    grave: Grave,
}

#[derive(Default)]
struct Table {
    nodes: HashMap<u64, Node>,
    by_key: HashMap<Key, u64>,
    // Nodes with descriptors that may be closed, in the order in which they came.
    open: VecDeque<u64>,
    // Those that have no name, and those that are kept.
    nameless: usize,
    lost: usize,
    // A directory was, once.
    lost_directory: bool,
    last: u64,
}

/// All that is known.
pub struct Nodes {
    table: Mutex<Table>,
    bounds: Bounds,
    quota: Arc<Quota>,
}

/// Looks at an open file.
pub fn stat(fd: impl AsFd) -> Result<Statx, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::statx(fd, c"", flags, StatxFlags::BASIC_STATS | StatxFlags::BTIME)
}

/// Looks at what stands under a name. What is mounted there is not of this folder.
pub fn stat_at(directory: impl AsFd, name: &CStr) -> Result<Statx, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let stat = rustix::fs::statx(directory, name, flags, wanted)?;
    if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
        return Err(Errno::XDEV);
    }
    Ok(stat)
}

/// Finds what stands under a name, without following or opening it.
pub fn find(directory: impl AsFd, name: &CStr) -> Result<(OwnedFd, Statx), Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat2(directory, name, flags, Mode::empty(), inside())?;
    let stat = stat(&fd)?;
    Ok((fd, stat))
}

/// How names are looked up: nowhere but in the directory itself.
pub fn inside() -> ResolveFlags {
    ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV
}

impl Nodes {
    /// Knows the folder only.
    pub fn new(root: OwnedFd, bounds: Bounds, quota: Arc<Quota>) -> Result<Nodes, Errno> {
        let key = Key::of(&stat(&root)?);
        let mut table = Table { last: ROOT_ID, ..Table::default() };
        let grave = Grave::new(&quota);
        let root = Node {
            key,
            lookups: 1,
            parent: ROOT_ID,
            name: CString::default(),
            fd: Some(Arc::new(root)),
            used: true,
            nameless: false,
            lost: false,
            kept: false,
            told: None,
            own: None,
            grave,
        };
        table.nodes.insert(ROOT_ID, root);
        table.by_key.insert(key, ROOT_ID);
        Ok(Nodes { table: Mutex::new(table), bounds, quota })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the number of a file that the kernel is told of now.
    ///
    /// # Errors
    /// `NFILE` when too many are known.
    pub fn told(
        &self,
        parent: u64,
        name: &CStr,
        stat: &Statx,
        fd: Option<OwnedFd>,
    ) -> Result<u64, Errno> {
        let key = Key::of(stat);
        let mut table = self.lock();
        let id = match table.by_key.get(&key) {
            Some(id) => *id,
            None if table.nodes.len() >= self.bounds.nodes => return Err(Errno::NFILE),
            None => {
                table.last += 1;
                let id = table.last;
                let grave = Grave::new(&self.quota);
                let node = Node {
                    key,
                    lookups: 0,
                    parent,
                    name: name.to_owned(),
                    fd: None,
                    used: false,
                    nameless: false,
                    lost: false,
                    kept: false,
                    told: None,
                    own: None,
                    grave,
                };
                table.nodes.insert(id, node);
                table.by_key.insert(key, id);
                id
            }
        };
        self.is_found(&mut table, id);
        let node = table.nodes.get_mut(&id).ok_or(Errno::STALE)?;
        node.lookups = node.lookups.saturating_add(1);
        if id != ROOT_ID && (node.parent != parent || node.name.as_c_str() != name || node.nameless)
        {
            (node.parent, node.name) = (parent, name.to_owned());
        }
        if let Some(fd) = fd
            && node.fd.is_none()
        {
            node.fd = Some(Arc::new(fd));
            self.admit(&mut table, id);
        }
        Ok(id)
    }

    /// The kernel forgets a file as often as it says; tells the directory and the name of one that
    /// is not known any more.
    pub fn forget(&self, id: u64, times: u64) -> Option<(u64, CString)> {
        if id == ROOT_ID {
            return None;
        }
        // Closing, and counting what is freed, takes its time.
        let mut gone = {
            let mut table = self.lock();
            let node = table.nodes.get_mut(&id)?;
            node.lookups = node.lookups.saturating_sub(times);
            if node.lookups > 0 {
                return None;
            }
            let node = table.nodes.remove(&id)?;
            if table.by_key.get(&node.key) == Some(&id) {
                table.by_key.remove(&node.key);
            }
            table.nameless -= usize::from(node.nameless) + usize::from(node.kept);
            table.lost -= usize::from(node.lost);
            node
        };
        Some((gone.parent, std::mem::take(&mut gone.name)))
    }

    /// A descriptor of a file, which can be looked at and opened by it, and nothing else.
    ///
    /// # Errors
    /// `STALE` for what is not known, or not found any more.
    pub fn fd(&self, id: u64) -> Result<Arc<OwnedFd>, Errno> {
        let (mut fd, way) = self.way(id)?;
        for (id, name, key) in way.into_iter().rev() {
            let (found, stat) = find(&fd, &name).map_err(|_| Errno::STALE)?;
            if Key::of(&stat) != key {
                return Err(Errno::STALE);
            }
            fd = Arc::new(found);
            let mut table = self.lock();
            if let Some(node) = table.nodes.get_mut(&id)
                && node.fd.is_none()
            {
                node.fd = Some(Arc::clone(&fd));
                self.admit(&mut table, id);
            }
        }
        Ok(fd)
    }

    /// The nearest descriptor at or above a file, and the names from there down, the last one first.
    fn way(&self, mut id: u64) -> Result<(Arc<OwnedFd>, Vec<Part>), Errno> {
        let mut way = Vec::new();
        let mut table = self.lock();
        table.of_folder(id)?;
        loop {
            let node = table.nodes.get_mut(&id).ok_or(Errno::STALE)?;
            if let Some(fd) = &node.fd {
                node.used = true;
                return Ok((Arc::clone(fd), way));
            }
            if way.len() == DEPTH_MAX {
                return Err(Errno::STALE);
            }
            way.push((id, node.name.clone(), node.key));
            id = node.parent;
        }
    }

    /// Counts a new descriptor in, and closes those that were not used for longest.
    fn admit(&self, table: &mut Table, id: u64) {
        table.open.push_back(id);
        while table.open.len() > self.bounds.descriptors {
            let Some(oldest) = table.open.pop_front() else { return };
            let Some(node) = table.nodes.get_mut(&oldest) else { continue };
            if node.nameless || node.kept || node.fd.is_none() {
                continue;
            }
            if node.used && oldest != id {
                node.used = false;
                table.open.push_back(oldest);
            } else {
                node.fd = None;
            }
        }
    }

    /// The number of a file that is known.
    pub fn known(&self, key: Key) -> Option<u64> {
        self.lock().by_key.get(&key).copied()
    }

    /// Prepares for a file's last name to go: its descriptor stays.
    ///
    /// # Errors
    /// `NFILE` when too many have none.
    pub fn last_name_goes(&self, id: u64) -> Result<(), Errno> {
        let fd = self.fd(id)?;
        let mut table = self.lock();
        table.drop_claim(id);
        let full = table.nameless >= self.bounds.nameless;
        let node = table.nodes.get_mut(&id).ok_or(Errno::STALE)?;
        if node.nameless {
            return Ok(());
        }
        if full {
            return Err(Errno::NFILE);
        }
        node.nameless = true;
        node.fd = Some(Arc::clone(&fd));
        node.grave.nameless = Some(fd);
        table.nameless += 1;
        Ok(())
    }

    /// It did not go.
    pub fn name_stays(&self, id: u64) {
        let mut table = self.lock();
        let Some(node) = table.nodes.get_mut(&id).filter(|node| node.nameless) else { return };
        node.nameless = false;
        node.grave.nameless = None;
        table.nameless -= 1;
        self.admit(&mut table, id);
    }

    /// A file has another name now.
    pub fn renamed(&self, id: u64, parent: u64, name: &CStr) {
        let mut table = self.lock();
        self.is_found(&mut table, id);
        if let Some(node) = table.nodes.get_mut(&id)
            && id != ROOT_ID
        {
            (node.parent, node.name) = (parent, name.to_owned());
            node.told = None;
        }
    }

    /// Whether there is a descriptor of it.
    pub fn is_open(&self, id: u64) -> bool {
        self.lock().nodes.get(&id).is_some_and(|node| node.fd.is_some())
    }

    /// The directory in which a file has its only known name.
    pub fn above(&self, id: u64) -> Option<u64> {
        let table = self.lock();
        table.nodes.get(&id).filter(|node| !node.lost && !node.nameless).map(|node| node.parent)
    }

    /// Whether it is known.
    pub fn is_known(&self, id: u64) -> bool {
        self.lock().nodes.contains_key(&id)
    }

    /// How many are known.
    pub fn len(&self) -> usize {
        self.lock().nodes.len()
    }

    /// All names by which files are known.
    pub fn all_names(&self) -> Vec<(u64, CString)> {
        let table = self.lock();
        let named = table.nodes.iter().filter(|(id, node)| **id != ROOT_ID && !node.nameless);
        named.map(|(_, node)| (node.parent, node.name.clone())).collect()
    }

    /// What the machine believes of a file.
    pub fn told_of(&self, id: u64) -> Option<Told> {
        self.lock().nodes.get(&id)?.told
    }

    /// Whether nobody but the machine itself made it what it is.
    pub fn is_own(&self, id: u64, now: Stamp) -> bool {
        self.lock().nodes.get(&id).is_some_and(|node| node.own == Some(now))
    }

    /// The machine changed it itself.
    pub fn set_own(&self, id: u64, stamp: Stamp) {
        if let Some(node) = self.lock().nodes.get_mut(&id) {
            node.own = Some(stamp);
        }
    }

    /// The machine is told of a file.
    pub fn set_told(&self, id: u64, stamp: Stamp) {
        let told = Told { stamp, young: stamp.is_young() };
        if let Some(node) = self.lock().nodes.get_mut(&id) {
            node.told = Some(told);
        }
    }

    /// It believes nothing of it any more.
    pub fn untold(&self, id: u64) {
        if let Some(node) = self.lock().nodes.get_mut(&id) {
            node.told = None;
        }
    }

    /// How much is known and open, for tests.
    #[cfg(test)]
    pub fn held(&self) -> (usize, usize, usize) {
        let table = self.lock();
        let open = table.nodes.values().filter(|n| n.fd.is_some()).count();
        (table.nodes.len(), open, table.nameless)
    }
}

/// What kind of file it is.
pub fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(stat.stx_mode.into())
}
