//! News for the machine's kernel: what it was told is not true any more, because the host changed it.
//!
//! Every change that is heard of means only "look again": what stands there now is compared with what
//! the machine believes, so that its own changes, which are heard of too, are no news to it.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::{PoisonError, RwLockReadGuard};
use std::time::Duration;

use rustix::fs::{FileType, Statx};
use rustix::io::Errno;

use crate::abi::{ROOT_ID, op};
use crate::folder::Folder;
use crate::nodes::{self, Key, Stamp};
use crate::reply::{Believed, Reply};
use crate::watch::{Belief, Changes, Watch};

/// How long is believed what would be told if it changed: names, and directories.
pub const LONG: Duration = Duration::from_secs(60);
/// How long is believed what a file is. No watch hears of a write by another name that the host gave it
/// outside of the folder since, and of a mapping that is written to only when it is closed.
pub const FILE: Duration = Duration::from_secs(5);
/// How long is believed what the host may change without a word.
const SHORT: Duration = Duration::from_secs(1);
/// Codes of news.
const INVAL_INODE: u32 = 2;
const INVAL_ENTRY: u32 = 3;

impl Folder {
    /// While this is held no news go out: for a request whose answer is to be believed, until it was
    /// sent. So the kernel never hears of a change before the answer that it makes untrue.
    pub fn looking(&self, request: &[u8]) -> Option<RwLockReadGuard<'_, ()>> {
        const BELIEVED: [u32; 10] = [
            op::LOOKUP,
            op::GETATTR,
            op::SETATTR,
            op::SYMLINK,
            op::MKNOD,
            op::MKDIR,
            op::LINK,
            op::CREATE,
            op::READDIRPLUS,
            op::RENAME2,
        ];
        let opcode = request.get(4..8)?.try_into().ok().map(u32::from_le_bytes)?;
        self.watch.as_ref()?;
        let names = [op::RENAME, op::UNLINK, op::RMDIR];
        if !BELIEVED.contains(&opcode) && !names.contains(&opcode) {
            return None;
        }
        Some(self.looks.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// What is said next of names in a directory may be believed.
    pub(crate) fn watch_over(&self, node: u64, directory: &OwnedFd) {
        if let Some(watch) = &self.watch {
            watch.over(node, directory);
        }
    }

    /// How long the machine may believe what it is told of a node.
    pub(crate) fn believed(&self, node: u64, stat: &Statx) -> Believed {
        let short = Believed { name: SHORT.as_secs(), attributes: SHORT.as_secs() };
        let Some(watch) = &self.watch else { return short };
        let is_directory = nodes::kind(stat) == FileType::Directory;
        // Changes by another name are not heard of.
        let one_name = is_directory || stat.stx_nlink == 1;
        let above = node == ROOT_ID || self.nodes.above(node).is_some_and(|n| watch.covers(n));
        if !above || !one_name {
            return short;
        }
        let attributes = match is_directory {
            true if watch.covers(node) => LONG,
            true => SHORT,
            false => FILE,
        };
        Believed { name: LONG.as_secs(), attributes: attributes.as_secs() }
    }

    /// Answers what a name is.
    pub(crate) fn tell_entry(
        &self,
        parent: u64,
        name: &CStr,
        node: u64,
        stat: &Statx,
        reply: &mut Reply,
    ) {
        let believed = self.believed(node, stat);
        self.nodes.set_told(node, Stamp::of(stat));
        if let Some(watch) = &self.watch {
            self.replaced(watch, parent, name, Some(node));
            watch.believe(parent, name, node);
            self.tidy(watch);
        }
        reply.entry(node, stat, self.owner(), believed);
    }

    /// Answers that nothing has a name.
    pub(crate) fn tell_nothing(&self, parent: u64, name: &CStr, reply: &mut Reply) {
        let long = self.watch.as_ref().is_some_and(|watch| {
            self.replaced(watch, parent, name, None);
            watch.believe_nothing(parent, name)
        });
        reply.nothing(if long { LONG } else { SHORT }.as_secs());
    }

    /// Before it is told that a name is that of another node now: the one before lost it, and the news
    /// that come will find nothing amiss.
    fn replaced(&self, watch: &Watch, parent: u64, name: &CStr, by: Option<u64>) {
        if let Belief::Node(before) = watch.belief(parent, name)
            && Some(before) != by
        {
            self.lose(before, parent, name);
        }
    }

    /// A node lost the name that it was known by. What was read of it last is open still.
    fn lose(&self, node: u64, parent: u64, name: &CStr) {
        let spare = match self.nodes.is_open(node) {
            true => None,
            false => self.opened.get(node).and_then(|file| file.try_clone().ok()),
        };
        self.nodes.lose(node, parent, name, spare.map(OwnedFd::from));
    }

    /// Names of nodes that are not known any more are not noted without end, news or not.
    pub(crate) fn tidy(&self, watch: &Watch) {
        watch.tidy(self.nodes.len(), |node| self.nodes.is_known(node));
    }

    /// The machine changes a name itself, and with it its directory.
    pub(crate) fn changes_name(&self, parent: u64, name: &CStr) {
        self.nodes.untold(parent);
        if let Some(watch) = &self.watch {
            watch.doubt(parent, name);
        }
    }

    /// Tells of the host's changes for as long as they are heard of.
    ///
    /// # Errors
    /// When they are not any more, or nobody takes the news.
    pub fn tell_changes(&self, mut send: impl FnMut(&[u8]) -> bool) -> Result<(), Errno> {
        let Some(watch) = &self.watch else { return Ok(()) };
        let mut buffer = vec![std::mem::MaybeUninit::uninit(); crate::watch::CHUNK];
        loop {
            let changes = watch.next(&mut buffer)?;
            if !self.tell(watch, &changes, &mut send) {
                return Err(Errno::PIPE);
            }
            // More that happens to the same files is one piece of news.
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Compares with what the machine believes, and tells it what is not so.
    pub(crate) fn tell(
        &self,
        watch: &Watch,
        changes: &Changes,
        send: &mut impl FnMut(&[u8]) -> bool,
    ) -> bool {
        if changes.lost {
            let names = self.nodes.all_names();
            // In parts, so that requests pass between them.
            let parts = [names, watch.nothings()];
            for part in parts.iter().flat_map(|all| all.chunks(256)) {
                let names = part.iter().cloned().collect();
                if !self.tell_some(watch, &Changes { names, ..Changes::default() }, send) {
                    return false;
                }
            }
            let directories = watch.directories().into_iter().collect();
            return self.tell_some(watch, &Changes { directories, ..Changes::default() }, send);
        }
        self.tell_some(watch, changes, send)
    }

    fn tell_some(
        &self,
        watch: &Watch,
        changes: &Changes,
        send: &mut impl FnMut(&[u8]) -> bool,
    ) -> bool {
        let _still = self.looks.write().unwrap_or_else(PoisonError::into_inner);
        let mut news = Vec::new();
        for (directory, name) in &changes.names {
            self.look_at_name(watch, *directory, name, &mut news);
        }
        for (directory, name) in &changes.names {
            self.find_again(watch, *directory, name);
        }
        for directory in &changes.directories {
            if let Ok(stat) = self.nodes.fd(*directory).and_then(|fd| nodes::stat(&*fd)) {
                self.look_at_node(*directory, &stat, &mut news);
            }
        }
        self.tidy(watch);
        news.iter().all(|one| send(one))
    }

    fn look_at_name(&self, watch: &Watch, directory: u64, name: &CStr, news: &mut Vec<Vec<u8>>) {
        let belief = watch.belief(directory, name);
        if belief == Belief::Unknown {
            return;
        }
        let there = self.nodes.fd(directory).and_then(|fd| nodes::stat_at(&*fd, name)).ok();
        match (belief, &there) {
            (Belief::Nothing, None) => return,
            (Belief::Node(node), Some(stat)) if self.nodes.known(Key::of(stat)) == Some(node) => {
                return self.look_at_node(node, stat, news);
            }
            _ => {}
        }
        watch.doubt(directory, name);
        news.push(inval_entry(directory, name));
        if let Belief::Node(node) = belief {
            self.lose(node, directory, name);
            self.nodes.untold(node);
            news.push(inval_inode(node, false));
        }
    }

    /// What the host gave another name in the folder is of it still: who is in it stays there.
    fn find_again(&self, watch: &Watch, directory: u64, name: &CStr) {
        if watch.belief(directory, name) != Belief::Unknown || !self.nodes.any_lost() {
            return;
        }
        let Ok(there) = self.nodes.fd(directory).and_then(|fd| nodes::stat_at(&*fd, name)) else {
            return;
        };
        if let Some(node) = self.nodes.known(Key::of(&there))
            && self.nodes.is_lost(node)
        {
            self.nodes.renamed(node, directory, name);
            watch.believe(directory, name, node);
        }
    }

    fn look_at_node(&self, node: u64, stat: &Statx, news: &mut Vec<Vec<u8>>) {
        let _alone = self.alone(node);
        let Some(told) = self.nodes.told_of(node) else { return };
        let (now, plain) = (Stamp::of(stat), nodes::kind(stat) == FileType::RegularFile);
        // Between two changes of one moment the machine may have looked.
        let unsure = plain && told.young && !self.nodes.is_own(node, now);
        if told.stamp != now || unsure {
            self.nodes.untold(node);
            // All of it, though size and time be as they were: who wrote can set them back.
            news.push(inval_inode(node, plain));
        }
    }
}

/// The kernel looks at a file's attributes anew, and at its contents.
fn inval_inode(node: u64, contents: bool) -> Vec<u8> {
    let mut news = Reply::news(INVAL_INODE);
    let offset = if contents { 0 } else { -1i64 };
    news.u64(node).u64(offset as u64).u64(0);
    news.done()
}

/// The kernel looks anew at what a name is.
fn inval_entry(directory: u64, name: &CStr) -> Vec<u8> {
    let mut news = Reply::news(INVAL_ENTRY);
    news.u64(directory).u32(name.to_bytes().len() as u32).u32(0).bytes(name.to_bytes_with_nul());
    news.done()
}
