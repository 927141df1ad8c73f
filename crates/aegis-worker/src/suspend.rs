//! Suspending: a machine whose clock stands still gives its memory back. Its worker keeps it in a
//! file of the run directory, and wakes the machine from there with every process as it was.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;

use aegis_wire::worker::Golden;
use anyhow::Context as _;
use rustix::pipe::PipeFlags;

use crate::golden::Place;
use crate::machine::restore;
use crate::qemu::{self, Birth, Cage, MEMORY, Parts, Shape, Vmm};
use crate::qmp::{QMP_DEADLINE, Qmp};
use crate::{snapshot, stream};

/// What is saved beside the memory, at most: devices, and the headers of pages.
pub const BESIDE_MEMORY_MAX: u64 = 128 << 20;
/// A busy host reads what was saved at least this fast.
const WAKE_BYTES_PER_SECOND: u64 = 32 << 20;

/// What a machine wakes with: the files that it was born with, whatever lies at their names now.
pub struct Bed {
    golden: Golden,
    shape: Shape,
    base: OwnedFd,
    disk: OwnedFd,
    under: Option<OwnedFd>,
    kernel: OwnedFd,
    uid: Option<u32>,
    file_size_max: Option<u64>,
    disk_bytes: u64,
    fits: String,
}

impl Bed {
    /// Of a machine that is about to be born from these parts.
    pub fn of(
        golden: &Golden,
        place: &Place,
        parts: &Parts,
        cage: &Cage,
        disk_bytes: u64,
    ) -> io::Result<Bed> {
        Ok(Bed {
            golden: golden.clone(),
            shape: place.shape,
            disk_bytes,
            fits: place.fits.clone(),
            base: parts.base.try_clone()?,
            disk: parts.disk.try_clone()?,
            under: parts.under.as_ref().map(OwnedFd::try_clone).transpose()?,
            kernel: parts.kernel.try_clone()?,
            uid: cage.uid,
            file_size_max: cage.file_size_max,
        })
    }

    /// Saves a machine that stands still; it may go on as if nothing had been when this fails.
    /// The file gets its name when it is whole.
    pub async fn save(&self, qmp: &Qmp, to: &Path) -> anyhow::Result<()> {
        let temporary = to.with_extension("new");
        let file = File::create(&temporary)
            .with_context(|| format!("can't make {}", temporary.display()))?;
        // Through a pipe: QEMU may not write files larger than the machine's disk.
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let most = self.shape.memory.bytes() + BESIDE_MEMORY_MAX;
        let copying =
            tokio::task::spawn_blocking(move || stream::copy(File::from(read), file, MEMORY, most));
        let saved = snapshot::migrate(qmp, write.as_fd(), false).await;
        // The copy ends when nobody can write any more.
        drop(write);
        let copied = copying.await.context("the copy was lost")?;
        let done = saved.and(copied.map_err(anyhow::Error::from));
        match done {
            Ok(()) => Ok(std::fs::rename(&temporary, to)?),
            Err(error) => {
                let _ = std::fs::remove_file(&temporary);
                Err(error)
            }
        }
    }

    /// Starts a process that takes over what was saved, and stands still. Must be called on the
    /// main thread.
    pub fn wake(&self, from: &Path, cgroups: Vec<OwnedFd>) -> anyhow::Result<Vmm> {
        let saved = File::open(from).with_context(|| format!("can't open {}", from.display()))?;
        let memory = snapshot::memory_file("golden", self.shape.memory.bytes())?;
        let under = self.under.as_ref().map(OwnedFd::try_clone).transpose()?;
        let parts = self.parts(memory, saved.into(), self.disk.try_clone()?, under)?;
        let cage = Cage { cgroups, uid: self.uid, file_size_max: self.file_size_max };
        qemu::start(&self.golden.qemu, self.shape, Birth::Wake, parts, cage)
    }

    /// Starts a process that takes over what comes through `state`, into `memory`, with a whole disk
    /// of its own. Must be called on the main thread.
    pub fn copy(
        &self,
        memory: OwnedFd,
        state: OwnedFd,
        disk: OwnedFd,
        cgroups: Vec<OwnedFd>,
    ) -> anyhow::Result<Vmm> {
        let parts = self.parts(memory, state, disk, None)?;
        let cage = Cage { cgroups, uid: self.uid, file_size_max: Some(self.disk_bytes) };
        qemu::start(&self.golden.qemu, self.shape, Birth::Wake, parts, cage)
    }

    /// All parts of a process that takes over what was saved.
    fn parts(
        &self,
        memory: OwnedFd,
        state: OwnedFd,
        disk: OwnedFd,
        under: Option<OwnedFd>,
    ) -> io::Result<Parts> {
        Ok(Parts {
            memory,
            base: self.base.try_clone()?,
            disk,
            under,
            kernel: self.kernel.try_clone()?,
            initrd: None,
            state: Some(state),
        })
    }

    /// What its golden snapshot was made of.
    pub fn golden(&self) -> &Golden {
        &self.golden
    }

    /// What all machines of its snapshot have in common.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Its user, where it has one of its own.
    pub fn uid(&self) -> Option<u32> {
        self.uid
    }

    /// Names what its saved memory depends on.
    pub fn fits(&self) -> &str {
        &self.fits
    }

    /// Size of its disk as the machine sees it, bytes.
    pub fn disk_bytes(&self) -> u64 {
        self.disk_bytes
    }
}

/// Lets a process that [`Bed::wake`] started take over what was saved there; it stands still then.
pub async fn take_over(qmp: &Qmp, state_fd: Option<i32>, from: &Path) -> anyhow::Result<()> {
    let saved = std::fs::metadata(from).map_or(0, |meta| meta.len());
    restore(qmp, state_fd, Birth::Wake, wake_deadline(saved)).await
}

/// Reading takes its time: what could be saved must never be too large to wake.
fn wake_deadline(saved_bytes: u64) -> Duration {
    QMP_DEADLINE + Duration::from_secs(saved_bytes / WAKE_BYTES_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_machines_have_the_time_to_wake() {
        assert_eq!(wake_deadline(0), QMP_DEADLINE);
        assert!(wake_deadline(64 << 30) > Duration::from_secs(1800));
    }
}
