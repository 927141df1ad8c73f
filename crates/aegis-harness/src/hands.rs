//! One thread for work that blocks: mounts and syncs. It is there from the start, because under a
//! fork bomb no new one may come to be.

use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};

use tokio::sync::oneshot;

type Work = Box<dyn FnOnce() + Send>;

/// Jobs that wait at a time; there is one shutdown, and one before it.
const JOBS_MAX: usize = 4;

/// The thread.
pub struct Hands {
    jobs: SyncSender<Work>,
}

impl Hands {
    /// Starts the thread.
    pub fn start() -> io::Result<Hands> {
        let (jobs, todo) = sync_channel::<Work>(JOBS_MAX);
        std::thread::Builder::new().name("hands".to_owned()).spawn(move || {
            for job in todo {
                job();
            }
        })?;
        Ok(Hands { jobs })
    }

    /// Does `work` there.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (tell, done) = oneshot::channel();
        let job = Box::new(move || drop(tell.send(work())));
        self.jobs.try_send(job).map_err(|_| io::Error::other("too much is being done already"))?;
        done.await.map_err(|_| io::Error::other("it was not done"))?
    }
}
