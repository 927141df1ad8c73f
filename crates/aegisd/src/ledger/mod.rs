//! The ledger: what the daemon remembers.
//!
//! Nothing is written but [`Change`]s, and the host's own secrets ([`secrets`]), decided upon facts that are read in the same transaction
//! ([`Ledger::write`]). One thread owns the writing connection and commits in groups: what waits
//! together is synced together, each decision in a savepoint of its own. Readers have connections
//! of their own and see only what is durable.

mod facts;
mod rows;
mod secrets;
mod store;
mod tally;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use aegis_rules::change::Change;
use aegis_rules::refusal::Refusal;
use aegis_wire::words::InstanceId;
use rusqlite::Connection;
use tokio::sync::{mpsc, oneshot, watch};

pub use facts::{EventRow, Facts, Page};
pub use secrets::StoredSecret;
pub use tally::Tally;
use tally::Written;

/// Writes that may wait for the writer; more wait in their tasks.
const QUEUE: usize = 1024;
/// Writes that are synced together at most.
const GROUP: usize = 256;
/// Idle reading connections that are kept.
const READERS: usize = 8;

/// The ledger itself failed; never the asker's fault.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// SQLite said no.
    #[error("the ledger failed")]
    Sqlite(#[from] rusqlite::Error),
    /// A row that this program can't have written.
    #[error("row {id} of table {table} is damaged: {what}")]
    Damaged {
        /// Which table.
        table: &'static str,
        /// Which row.
        id: String,
        /// What is wrong with it.
        what: String,
    },
    /// The ledger is of a newer program.
    #[error("the ledger has schema {found}, this program knows {known}; use the newer program")]
    Newer {
        /// What the file says.
        found: i64,
        /// What this program knows.
        known: i64,
    },
    /// The writer has ended.
    #[error("the ledger's writer has ended")]
    Closed,
    /// A group of writes could not be synced.
    #[error("the ledger could not be synced: {0}")]
    Commit(String),
}

/// Why a write did not happen.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A law said no; nothing was written.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The ledger failed; nothing was written.
    #[error(transparent)]
    Ledger(#[from] Error),
}

impl From<rusqlite::Error> for WriteError {
    fn from(error: rusqlite::Error) -> WriteError {
        WriteError::Ledger(error.into())
    }
}

type Deliver = Box<dyn FnOnce(Result<(), &rusqlite::Error>) + Send>;
type Job = Box<dyn FnOnce(&Connection) -> Result<(Written, Deliver), Deliver> + Send>;

/// The open ledger.
pub struct Ledger {
    path: PathBuf,
    jobs: mpsc::Sender<Job>,
    readers: Mutex<Vec<Connection>>,
    commits: watch::Receiver<u64>,
    touched: Touched,
    tally: Arc<Tally>,
}

/// Instances that a write touched without naming them.
type Touched = Arc<Mutex<BTreeSet<InstanceId>>>;

impl Ledger {
    /// Opens or makes the ledger file, and starts its writer thread.
    pub fn open(path: &Path) -> Result<Ledger, Error> {
        let connection = Connection::open(path)?;
        store::prepare(&connection)?;
        let (jobs, mut queue) = mpsc::channel(QUEUE);
        let (committed, commits) = watch::channel(0);
        let tally = Arc::new(Tally::default());
        let counts = Arc::clone(&tally);
        std::thread::Builder::new()
            .name("ledger".to_owned())
            .spawn(move || write_all(&connection, &mut queue, &committed, &counts))
            .map_err(|e| Error::Commit(e.to_string()))?;
        Ok(Ledger {
            path: path.to_owned(),
            jobs,
            readers: Mutex::default(),
            commits,
            touched: Touched::default(),
            tally,
        })
    }

    /// Decides upon facts and writes what was decided, in one transaction that is synced before
    /// this returns. `actor` is who did it, for the audit trail.
    pub async fn write<T, F>(&self, actor: &str, decide: F) -> Result<T, WriteError>
    where
        T: Send + 'static,
        F: FnOnce(&Facts<'_>) -> Result<(Vec<Change>, T), WriteError> + Send + 'static,
    {
        let actor = actor.to_owned();
        let touched = Arc::clone(&self.touched);
        self.run(move |connection| {
            let facts = Facts::new(connection);
            let (changes, value) = decide(&facts)?;
            let applied = store::apply(connection, &actor, &changes)?;
            // Before the commit is told. Should it fail, they are looked at for nothing.
            touched.lock().unwrap_or_else(PoisonError::into_inner).extend(applied.touched);
            Ok((value, applied.written))
        })
        .await
    }

    /// Does something in one transaction on the writer's thread, and waits until it is synced; what it
    /// says it wrote is counted then.
    async fn run<T, F>(&self, work: F) -> Result<T, WriteError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> Result<(T, Written), WriteError> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel::<Result<T, WriteError>>();
        let job: Job = Box::new(move |connection| {
            match work(connection) {
                Ok((value, written)) => {
                    let deliver = move |committed: Result<(), &rusqlite::Error>| {
                        let outcome = match committed {
                            Ok(()) => Ok(value),
                            Err(e) => Err(Error::Commit(e.to_string()).into()),
                        };
                        // The asker may have left; what was written stays.
                        let _ = answer.send(outcome);
                    };
                    Ok((written, Box::new(deliver)))
                }
                Err(error) => Err(Box::new(move |_: Result<(), &rusqlite::Error>| {
                    let _ = answer.send(Err(error));
                })),
            }
        });
        self.jobs.send(job).await.map_err(|_| Error::Closed)?;
        answered.await.map_err(|_| Error::Closed)?
    }

    /// Reads facts, as of the last sync.
    pub fn read<T>(&self, look: impl FnOnce(&Facts<'_>) -> Result<T, Error>) -> Result<T, Error> {
        let idle = self.readers.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let connection = match idle {
            Some(connection) => connection,
            None => {
                let connection = Connection::open(&self.path)?;
                store::prepare_reader(&connection)?;
                connection
            }
        };
        let value = look(&Facts::new(&connection));
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        if readers.len() < READERS {
            readers.push(connection);
        }
        value
    }

    /// Takes the instances that were touched by what follows from writes ([`aegis_rules::cascade`]) and
    /// that no writer knows of. To be asked again after each commit.
    pub fn take_touched(&self) -> BTreeSet<InstanceId> {
        std::mem::take(&mut *self.touched.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Counts of what was written.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Counts groups of writes; whoever waits for a condition looks again when it changes.
    pub fn commits(&self) -> watch::Receiver<u64> {
        self.commits.clone()
    }
}

fn write_all(
    connection: &Connection,
    queue: &mut mpsc::Receiver<Job>,
    committed: &watch::Sender<u64>,
    tally: &Tally,
) {
    while let Some(first) = queue.blocking_recv() {
        let (mut delivers, mut written) = (Vec::new(), Vec::new());
        let group = || -> rusqlite::Result<()> {
            connection.execute_batch("BEGIN IMMEDIATE")?;
            let mut next = Some(first);
            while let Some(job) = next.take() {
                connection.execute_batch("SAVEPOINT one")?;
                match job(connection) {
                    Ok((wrote, deliver)) => {
                        connection.execute_batch("RELEASE one")?;
                        written.push(wrote);
                        delivers.push(deliver);
                    }
                    Err(deliver) => {
                        connection.execute_batch("ROLLBACK TO one; RELEASE one")?;
                        delivers.push(deliver);
                    }
                }
                if delivers.len() < GROUP {
                    next = queue.try_recv().ok();
                }
            }
            connection.execute_batch("COMMIT")
        };
        let outcome = group();
        if let Err(error) = &outcome {
            tracing::error!(%error, "a group of writes was lost");
            if !connection.is_autocommit() {
                let _ = connection.execute_batch("ROLLBACK");
            }
        }
        if outcome.is_ok() && !written.is_empty() {
            // Before anybody is told: who was told finds it counted.
            written.iter().for_each(|w| tally.count(w));
            committed.send_modify(|n| *n += 1);
        }
        for deliver in delivers {
            deliver(outcome.as_ref().copied());
        }
    }
}

#[cfg(test)]
mod tests;
