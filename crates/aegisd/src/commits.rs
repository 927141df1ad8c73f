//! The commits of this host.
//!
//! ```text
//! HOME/commits/commit-…/disk.img, kept.json                the disk (aegis_wire::worker::commit)
//!                       mem, state, snapshot.json          the memory, where it is kept
//!                       record.json                        written last: without it there is none
//! ```
//! A directory without a record, and one of a temporary commit that no instance starts from any more,
//! is removed by the sweep; so is the memory of a temporary one from which all machines have started,
//! as nobody needs it again. One memory at a time is being saved: it takes several times its size of
//! the host's for a moment.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aegis_rules::commit::Commit;
use aegis_rules::instance::Protocol;
use aegis_wire::words::{
    CommitId, CpuMillis, DiskBytes, Handle, ImageRef, InstanceId, MemoryMb, Port, Time,
};
use aegis_wire::worker::{Committed, commit};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

const RECORD: &str = "record.json";
/// Largest record: an environment may be long.
const RECORD_MAX: u64 = 4 << 20;

/// A commit that is there.
#[derive(Clone, Debug)]
pub struct Kept {
    /// What it is.
    pub commit: Commit,
    /// Of the image that its disk lies over; one that was made here has none.
    pub digest: Option<String>,
    /// What its making came to.
    pub made: Committed,
}

#[derive(Serialize, Deserialize)]
struct Record {
    id: CommitId,
    name: Option<Handle>,
    source: InstanceId,
    image: ImageRef,
    digest: Option<String>,
    command: Vec<String>,
    env: BTreeMap<String, String>,
    cwd: Option<String>,
    cpu_millis: CpuMillis,
    memory_mb: MemoryMb,
    disk_bytes: DiskBytes,
    ports: Vec<(Port, String)>,
    memory: bool,
    temporary: bool,
    #[serde(default)]
    lent: bool,
    created_at: i64,
    made: Committed,
}

/// All commits below a home. Cheap to clone.
#[derive(Clone)]
pub struct Commits {
    dir: PathBuf,
    held: Arc<Mutex<BTreeMap<CommitId, usize>>>,
    turn: Arc<Semaphore>,
    // Whose records say that they stay: they need not be read again to be left alone.
    lasting: Arc<Mutex<BTreeSet<CommitId>>>,
}

/// Keeps the sweep from a commit, as long as this lives.
pub struct Held {
    commits: Commits,
    id: CommitId,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut held = lock(&self.commits.held);
        if let Some(count) = held.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.id);
            }
        }
    }
}

impl Commits {
    /// Those of this home.
    pub fn of(home: &Path) -> Commits {
        let turn = Arc::new(Semaphore::new(1));
        let dir = home.join("commits");
        Commits { dir, held: Arc::default(), turn, lasting: Arc::default() }
    }

    /// Waits until no other memory is being saved.
    pub async fn turn(&self) -> Option<OwnedSemaphorePermit> {
        // The semaphore is never closed.
        Arc::clone(&self.turn).acquire_owned().await.ok()
    }

    /// Whether somebody holds a commit.
    pub fn is_held(&self, id: &CommitId) -> bool {
        lock(&self.held).contains_key(id)
    }

    /// Where a commit is.
    pub fn place(&self, id: &CommitId) -> PathBuf {
        self.dir.join(id.as_str())
    }

    /// Holds a commit that is there, or is being made.
    pub fn hold(&self, id: &CommitId) -> Held {
        *lock(&self.held).entry(id.clone()).or_default() += 1;
        Held { commits: self.clone(), id: id.clone() }
    }

    /// Makes the directory of a new one; the sweep removes it unless it is kept.
    pub fn begin(&self, id: &CommitId) -> io::Result<PathBuf> {
        let place = self.place(id);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        fs::DirBuilder::new().mode(0o700).create(&place)?;
        Ok(place)
    }

    /// From now on it is one.
    pub fn keep(&self, kept: &Kept) -> io::Result<()> {
        let place = self.place(&kept.commit.id);
        let text = serde_json::to_vec_pretty(&Record::of(kept)).map_err(io::Error::other)?;
        let new = place.join("record.new");
        let mut file = File::create(&new)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&new, place.join(RECORD))?;
        File::open(&place)?.sync_all()?;
        File::open(&self.dir)?.sync_all()
    }

    /// One by its id.
    pub fn get(&self, id: &CommitId) -> Option<Kept> {
        let mut text = Vec::new();
        let file = File::open(self.place(id).join(RECORD)).ok()?;
        file.take(RECORD_MAX).read_to_end(&mut text).ok()?;
        let record: Record = serde_json::from_slice(&text).ok()?;
        (record.id == *id).then(|| record.into_kept()).flatten()
    }

    /// One by its id, or the newest of a name.
    pub fn find(&self, name: &str) -> Option<Kept> {
        match name.parse::<CommitId>() {
            Ok(id) => self.get(&id),
            Err(_) => self
                .all()
                .into_iter()
                .rev()
                .find(|kept| kept.commit.name.as_ref().is_some_and(|n| n.as_str() == name)),
        }
    }

    /// All of them, the oldest first.
    pub fn all(&self) -> Vec<Kept> {
        let mut all: Vec<Kept> = self.ids().iter().filter_map(|id| self.get(id)).collect();
        all.sort_by(|a, b| {
            (a.commit.created_at, &a.commit.id).cmp(&(b.commit.created_at, &b.commit.id))
        });
        all
    }

    /// From now on it is none. What is left of it [`Commits::clear`] removes, else the sweep.
    pub fn remove(&self, id: &CommitId) -> io::Result<()> {
        lock(&self.lasting).remove(id);
        fs::remove_file(self.place(id).join(RECORD))
    }

    /// Removes what is left of one that is none any more.
    pub fn clear(&self, id: &CommitId) -> io::Result<()> {
        match fs::remove_dir_all(self.place(id)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    /// Removes what is no commit, temporary ones that no instance names, and the memory of those that
    /// all have started from. `used` says of each commit that instances name whether one of them has not
    /// started yet; it is asked after it was seen who holds what, so that nobody's is taken between.
    pub fn sweep<E>(
        &self,
        used: impl FnOnce() -> Result<BTreeMap<CommitId, bool>, E>,
    ) -> Result<(), E> {
        let mut loose = self.ids();
        {
            let held = lock(&self.held);
            loose.retain(|id| !held.contains_key(id));
        }
        loose.retain(|id| self.is_loose(id));
        if loose.is_empty() {
            return Ok(());
        }
        let used = used()?;
        for id in &loose {
            let place = self.place(id);
            let done = match used.get(id) {
                None => fs::remove_dir_all(&place),
                Some(true) => Ok(()),
                Some(false) => commit::MEMORY.iter().try_for_each(|name| {
                    fs::remove_file(place.join(name)).or_else(|e| match e.kind() {
                        io::ErrorKind::NotFound => Ok(()),
                        _ => Err(e),
                    })
                }),
            };
            if let Err(error) = done {
                tracing::warn!(commit = %id, %error, "what nobody needs stays");
            }
        }
        Ok(())
    }

    /// Whether nobody asked that it stays. What can't be read stays: it may be somebody's.
    fn is_loose(&self, id: &CommitId) -> bool {
        if lock(&self.lasting).contains(id) {
            return false;
        }
        match fs::symlink_metadata(self.place(id).join(RECORD)) {
            Err(error) => error.kind() == io::ErrorKind::NotFound,
            Ok(_) => match self.get(id) {
                Some(kept) => {
                    if !kept.commit.temporary {
                        lock(&self.lasting).insert(id.clone());
                    }
                    kept.commit.temporary
                }
                None => {
                    tracing::warn!(commit = %id, "its record can't be read; it stays");
                    false
                }
            },
        }
    }

    fn ids(&self) -> Vec<CommitId> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries.filter_map(|e| e.file_name().into_string().ok()?.parse().ok()).collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Record {
    fn of(kept: &Kept) -> Record {
        let Commit {
            id,
            name,
            source,
            image,
            command,
            env,
            cwd,
            cpu,
            memory,
            disk,
            ports,
            with_memory,
            temporary,
            lent,
            created_at,
        } = kept.commit.clone();
        Record {
            id,
            name,
            source,
            image,
            digest: kept.digest.clone(),
            command,
            env,
            cwd,
            cpu_millis: cpu,
            memory_mb: memory,
            disk_bytes: disk,
            ports: ports.into_iter().map(|(port, p)| (port, p.word().to_owned())).collect(),
            memory: with_memory,
            temporary,
            lent,
            created_at: created_at.0,
            made: kept.made,
        }
    }

    fn into_kept(self) -> Option<Kept> {
        let ports =
            self.ports.into_iter().map(|(port, word)| Some((port, Protocol::parse(&word)?)));
        Some(Kept {
            digest: self.digest,
            made: self.made,
            commit: Commit {
                id: self.id,
                name: self.name,
                source: self.source,
                image: self.image,
                command: self.command,
                env: self.env,
                cwd: self.cwd,
                cpu: self.cpu_millis,
                memory: self.memory_mb,
                disk: self.disk_bytes,
                ports: ports.collect::<Option<_>>()?,
                with_memory: self.memory,
                temporary: self.temporary,
                lent: self.lent,
                created_at: Time(self.created_at),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(n: u8, name: Option<&str>, temporary: bool) -> Kept {
        Kept {
            digest: None,
            made: Committed { bytes: 1, stopped_us: 2 },
            commit: Commit {
                id: format!("commit-01ARZ3NDEKTSV4RRFFQ69G5FA{n}").parse().unwrap(),
                name: name.map(|n| n.parse().unwrap()),
                source: "inst-01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().unwrap(),
                image: "base".parse().unwrap(),
                command: vec!["sh".to_owned()],
                env: BTreeMap::from([("A".to_owned(), "b".to_owned())]),
                cwd: None,
                cpu: CpuMillis(500),
                memory: MemoryMb(256),
                disk: DiskBytes(1 << 30),
                ports: vec![(Port::try_from(8080).unwrap(), Protocol::Http)],
                with_memory: true,
                temporary,
                lent: n == 3,
                created_at: Time(n.into()),
            },
        }
    }

    #[test]
    fn what_is_kept_comes_back_and_what_is_loose_goes() {
        let home = tempfile::tempdir().unwrap();
        let commits = Commits::of(home.path());
        let all = [kept(1, Some("web"), false), kept(2, None, true), kept(3, Some("web"), false)];
        for one in &all {
            commits.begin(&one.commit.id).unwrap();
            commits.keep(one).unwrap();
        }
        assert!(commits.begin(&all[0].commit.id).is_err(), "an id is one commit's");
        let found = commits.get(&all[0].commit.id).unwrap();
        assert_eq!(found.commit, all[0].commit);
        assert!(commits.get(&all[2].commit.id).unwrap().commit.lent);
        assert_eq!(commits.find("web").unwrap().commit.id, all[2].commit.id, "the newest");
        assert!(commits.find("other").is_none());

        let half = kept(4, None, false).commit.id;
        commits.begin(&half).unwrap();
        let held = commits.hold(&half);
        let nobody = || Ok::<_, ()>(BTreeMap::new());
        let temporary = all[1].commit.id.clone();
        let memory = |id| commits.place(id).join(commit::MEMORY[0]);
        for one in &all {
            fs::write(memory(&one.commit.id), "memory").unwrap();
        }
        for awaited in [true, false] {
            commits.sweep(|| Ok::<_, ()>(BTreeMap::from([(temporary.clone(), awaited)]))).unwrap();
            assert!(commits.place(&half).exists() && commits.get(&temporary).is_some());
            assert_eq!(memory(&temporary).exists(), awaited, "needed once");
            assert!(memory(&all[0].commit.id).exists(), "somebody asked for it");
        }
        drop(held);
        // What can't be read is not removed.
        let record = commits.place(&all[2].commit.id).join(RECORD);
        let text = fs::read(&record).unwrap();
        fs::write(&record, "{").unwrap();
        commits.sweep(nobody).unwrap();
        fs::write(&record, text).unwrap();
        commits.sweep(nobody).unwrap();
        assert!(!commits.place(&half).exists() && commits.get(&temporary).is_none());
        assert_eq!(commits.all().len(), 2, "what somebody kept stays");
        commits.remove(&all[0].commit.id).unwrap();
        assert!(commits.get(&all[0].commit.id).is_none());
    }
}
