//! Threads for work that blocks: one for mounts and syncs, one for births, some for files. They are there from the
//! start, because under a fork bomb no new one may come to be; and whatever they wait for, the
//! host is answered.

use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use aegis_wire::bounds::STREAMS_MAX;
use tokio::sync::oneshot;

type Work = Box<dyn FnOnce() + Send>;

/// Jobs that wait at a time: each belongs to a stream, or to one of very few calls.
const JOBS_MAX: usize = 2 * STREAMS_MAX;

/// A thread, or several that share their work. Cheap to clone.
#[derive(Clone)]
pub struct Hands {
    jobs: SyncSender<Work>,
}

impl Hands {
    /// Starts a thread.
    pub fn start(name: &str) -> io::Result<Hands> {
        Hands::several(name, 1)
    }

    /// Starts threads: what one of them waits for keeps the others from nothing.
    pub fn several(name: &str, count: usize) -> io::Result<Hands> {
        let (jobs, todo) = sync_channel::<Work>(JOBS_MAX);
        let todo = Arc::new(Mutex::new(todo));
        for _ in 0..count {
            let todo = Arc::clone(&todo);
            std::thread::Builder::new().name(name.to_owned()).spawn(move || {
                // The lock is given back before the work is done.
                let next = || todo.lock().unwrap_or_else(PoisonError::into_inner).recv();
                while let Ok(job) = next() {
                    job();
                }
            })?;
        }
        Ok(Hands { jobs })
    }

    /// Does `work` there.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let (tell, done) = oneshot::channel();
        let job = Box::new(move || drop(tell.send(work())));
        self.jobs.try_send(job).map_err(|_| io::Error::other("too much is being done already"))?;
        done.await.map_err(|_| io::Error::other("it was not done"))
    }
}
