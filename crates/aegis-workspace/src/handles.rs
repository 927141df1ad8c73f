//! What the machine has open.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use crate::nodes::Grave;

/// An open file or directory.
pub struct Handle {
    /// It.
    pub file: File,
    /// Which file it is of.
    pub node: u64,
    /// Whether it writes to the file's end, wherever that is by then.
    pub append: bool,
    /// Whether it is a directory's.
    pub directory: bool,
    /// Keeps two readers of a directory apart: they share its position.
    pub turn: Mutex<()>,
    // Held on to: with the last handle what the file took may be free.
    _grave: Arc<Grave>,
}

impl Handle {
    /// Of an open file.
    pub fn new(file: File, node: u64, append: bool, grave: Arc<Grave>) -> Handle {
        Handle { file, node, append, directory: false, turn: Mutex::default(), _grave: grave }
    }

    /// Of an open directory.
    pub fn of_directory(file: File, node: u64, grave: Arc<Grave>) -> Handle {
        Handle { directory: true, ..Handle::new(file, node, false, grave) }
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

    /// The open file of that number.
    ///
    /// # Errors
    /// `BADF`, or `ISDIR`.
    pub fn file(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        let handle = self.get(number)?;
        if handle.directory { Err(Errno::ISDIR) } else { Ok(handle) }
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
