//! Those whose names went to others, or out of the folder.

use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::{DEPTH_MAX, Nodes, Table};
use crate::abi::ROOT_ID;

impl Table {
    /// A lost file's descriptor does not count any more; whether it did.
    pub(super) fn drop_claim(&mut self, id: u64) -> bool {
        let Some(node) = self.nodes.get_mut(&id).filter(|node| node.kept) else { return false };
        node.kept = false;
        self.nameless -= 1;
        true
    }

    /// Refuses what is below a directory that was lost: it may be outside of the folder by now. (Until
    /// one was, all is taken to be where it was found. Whether one is still does not matter: the
    /// machine may have had it forgotten.)
    pub(super) fn of_folder(&self, mut id: u64) -> Result<(), Errno> {
        if !self.lost_directory {
            return Ok(());
        }
        let mut second_name = false;
        for depth in 0..DEPTH_MAX {
            let Some(node) = self.nodes.get(&id) else {
                // A file may have a second name, when the directory of this one is forgotten.
                return if second_name { Ok(()) } else { Err(Errno::STALE) };
            };
            second_name = depth == 0 && !node.key.is_directory();
            if node.lost && node.key.is_directory() {
                return Err(Errno::STALE);
            }
            // A file that lost its own name is not found by those above.
            if id == ROOT_ID || (depth == 0 && (node.nameless || node.kept)) {
                return Ok(());
            }
            id = node.parent;
        }
        Err(Errno::STALE)
    }
}

impl Nodes {
    /// What stands under the name that a file had is another one now, or nothing. Who has it open
    /// keeps it: by its descriptor, or by `spare` where that was closed. A directory is not of the
    /// folder any more, as far as is known here.
    pub fn lose(&self, id: u64, parent: u64, name: &CStr, spare: Option<OwnedFd>) {
        let mut guard = self.lock();
        let table = &mut *guard;
        let Some(node) = table.nodes.get_mut(&id) else { return };
        let recorded = node.parent == parent && node.name.as_c_str() == name;
        if !recorded || node.lost || node.nameless || id == ROOT_ID {
            return;
        }
        node.lost = true;
        table.lost += 1;
        if node.key.is_directory() {
            node.fd = None;
            table.lost_directory = true;
            return;
        }
        // The host may lose many at once: half of the room is left to the machine's own.
        if !node.key.is_plain() || table.nameless >= self.bounds.nameless / 2 {
            return;
        }
        if node.fd.is_none() {
            node.fd = spare.map(Arc::new);
        }
        node.kept = node.fd.is_some();
        table.nameless += usize::from(node.kept);
    }

    /// It has a name again.
    pub(super) fn is_found(&self, table: &mut Table, id: u64) {
        let Some(node) = table.nodes.get_mut(&id) else { return };
        if std::mem::take(&mut node.lost) {
            table.lost -= 1;
        }
        if table.drop_claim(id) {
            self.admit(table, id);
        }
    }

    /// Whether a file is known whose name is not.
    pub fn is_lost(&self, id: u64) -> bool {
        self.lock().nodes.get(&id).is_some_and(|node| node.lost)
    }

    /// Whether there are such.
    pub fn any_lost(&self) -> bool {
        self.lock().lost > 0
    }
}
