//! Threads for work that blocks: one for mounts and syncs, one for births. They are there from the
//! start, because under a fork bomb no new one may come to be; and whatever they wait for, the
//! host is answered.

use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};

use aegis_wire::bounds::STREAMS_MAX;
use tokio::sync::oneshot;

type Work = Box<dyn FnOnce() + Send>;

/// Jobs that wait at a time: each belongs to a stream, or to one of very few calls.
const JOBS_MAX: usize = 2 * STREAMS_MAX;

/// A thread. Cheap to clone.
#[derive(Clone)]
pub struct Hands {
    jobs: SyncSender<Work>,
}

impl Hands {
    /// Starts a thread.
    pub fn start(name: &str) -> io::Result<Hands> {
        let (jobs, todo) = sync_channel::<Work>(JOBS_MAX);
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            for job in todo {
                job();
            }
        })?;
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
