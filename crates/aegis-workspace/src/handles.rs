//! Directories that the machine has open.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

/// An open directory.
pub struct Handle {
    /// It.
    pub file: OwnedFd,
    /// Which one it is of.
    pub node: u64,
    /// Keeps two readers apart: they share its position.
    pub turn: Mutex<()>,
}

impl Handle {
    /// Of an open directory.
    pub fn new(file: OwnedFd, node: u64) -> Handle {
        Handle { file, node, turn: Mutex::default() }
    }
}

#[derive(Default)]
struct Table {
    open: HashMap<u64, Arc<Handle>>,
    last: u64,
}

/// All that is open.
pub struct Handles {
    table: Mutex<Table>,
    most: usize,
}

impl Handles {
    /// At most so many.
    pub fn new(most: usize) -> Handles {
        Handles { table: Mutex::default(), most }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the number of a new one.
    ///
    /// # Errors
    /// `NFILE` when too many are open.
    pub fn add(&self, handle: Handle) -> Result<u64, Errno> {
        let mut table = self.lock();
        if table.open.len() >= self.most {
            return Err(Errno::NFILE);
        }
        table.last += 1;
        let number = table.last;
        table.open.insert(number, Arc::new(handle));
        Ok(number)
    }

    /// The handle of that number.
    ///
    /// # Errors
    /// `BADF` when there is none.
    pub fn get(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        self.lock().open.get(&number).cloned().ok_or(Errno::BADF)
    }

    /// Closes one.
    pub fn remove(&self, number: u64) {
        // Closed outside of the lock.
        let _closed = self.lock().open.remove(&number);
    }

    /// How many are open, for tests.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.lock().open.len()
    }
}
