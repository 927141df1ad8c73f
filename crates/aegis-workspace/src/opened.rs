//! Files that are open to be read: so many as were used last. The machine's kernel
//! does not say when it opens or closes one (it was told that nobody wants to know), which saves it two
//! messages for each.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

struct Open {
    file: Arc<File>,
    // Since the last look at the queue.
    used: bool,
}

#[derive(Default)]
struct Table {
    files: HashMap<u64, Open>,
    // In the order in which they came; some are closed by now.
    order: VecDeque<u64>,
}

/// All that are open.
pub struct Opened {
    table: Mutex<Table>,
    most: usize,
}

impl Opened {
    /// At most so many.
    pub fn new(most: usize) -> Opened {
        Opened { table: Mutex::default(), most }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file of that node, if it is open.
    pub fn get(&self, node: u64) -> Option<Arc<File>> {
        let mut table = self.lock();
        let open = table.files.get_mut(&node)?;
        open.used = true;
        Some(Arc::clone(&open.file))
    }

    /// Keeps a file open.
    pub fn keep(&self, node: u64, file: File) -> Arc<File> {
        let file = Arc::new(file);
        // Closed outside of the lock.
        let mut closed = Vec::new();
        let mut table = self.lock();
        let open = Open { file: Arc::clone(&file), used: false };
        match table.files.insert(node, open) {
            Some(before) => closed.push(before),
            None => table.order.push_back(node),
        }
        while table.order.len() > self.most {
            let Some(oldest) = table.order.pop_front() else { break };
            match table.files.get_mut(&oldest) {
                Some(open) if open.used && oldest != node => {
                    open.used = false;
                    table.order.push_back(oldest);
                }
                Some(_) => closed.extend(table.files.remove(&oldest)),
                None => {}
            }
        }
        file
    }

    /// Closes one.
    pub fn close(&self, node: u64) {
        let _closed = self.lock().files.remove(&node);
    }

    /// How many are open, for tests.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.lock().files.len()
    }
}
