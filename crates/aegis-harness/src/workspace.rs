//! The machine's workspace: a folder of the host, mounted by this kernel's FUSE. The harness carries
//! the kernel's messages to the host and back ([`crate::pump`]), and understands none of them.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aegis_wire::bounds::{STREAMS_MAX, WORKSPACE_READ_AHEAD};
use aegis_wire::channel::workspace::{MOUNT, Mount, OWNER_OPCODE, Resume};
use aegis_wire::pipe::mux::Stream;
use rustix::fs::OFlags;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::hands::Hands;
use crate::note::note;
use crate::pump::{self, KERNEL_HEAD, Pump};
use crate::sys;
use crate::user::User;

/// How long the end of the machine waits for what was not written yet.
const FLUSH_DEADLINE: Duration = Duration::from_secs(3);

type Arrived = (Stream, Resume);

/// The workspace of a machine, mounted or not.
pub struct Workspace {
    pump: Arc<Pump>,
    arrived: mpsc::Sender<Arrived>,
    streams: Arc<tokio::sync::Mutex<mpsc::Receiver<Arrived>>>,
    // Carries messages while somebody answers them.
    carrier: Mutex<Option<JoinHandle<()>>>,
    mounted: AtomicBool,
}

/// How a session ended.
enum Ended {
    /// It was lost; another one will come.
    Lost,
    /// The kernel has no such mount any more.
    Unmounted,
}

impl Workspace {
    /// Of a machine that has none yet.
    pub fn new(pump: Arc<Pump>) -> Workspace {
        let (arrived, streams) = mpsc::channel(STREAMS_MAX);
        let streams = Arc::new(tokio::sync::Mutex::new(streams));
        let (carrier, mounted) = (Mutex::default(), AtomicBool::new(false));
        Workspace { pump, arrived, streams, carrier, mounted }
    }

    /// The host opened a stream for its messages.
    pub fn arrived(&self, stream: Stream, resume: Resume) {
        // More of them than sessions are none of ours.
        drop(self.arrived.try_send((stream, resume)));
    }

    /// Mounts the folder for a user, and carries its messages from then on; without one, takes away
    /// what was mounted before.
    pub async fn mount(
        &self,
        hands: &Hands,
        ask: Option<Mount>,
        user: Option<&User>,
    ) -> io::Result<()> {
        self.give_up(hands).await;
        let Some(ask) = ask else {
            if self.mounted.swap(false, Ordering::Relaxed) {
                // It may be gone already; nobody serves it any more.
                let _ = hands.run(|| unmount(MOUNT, UnmountFlags::DETACH)).await?;
            }
            return Ok(());
        };
        let owner = user.map_or((0, 0), |u| (u.uid.as_raw(), u.gid.as_raw()));
        let terms = Terms { pump: Arc::clone(&self.pump), hands: hands.clone(), ask, owner };
        let streams = Arc::clone(&self.streams);
        let mut streams = streams.lock_owned().await;
        let lost = || io::Error::other("the host opened no stream for it");
        let first = streams.recv().await.ok_or_else(lost)?;
        terms.mount().await?;
        self.mounted.store(true, Ordering::Relaxed);
        let carrier = tokio::spawn(async move {
            if let Err(e) = terms.carry(first, &mut streams).await {
                note(&format!("workspace: {e}"));
            }
        });
        *self.carrier.lock().unwrap_or_else(PoisonError::into_inner) = Some(carrier);
        Ok(())
    }

    /// Lets nobody wait for the host any more: whoever does, or asks later, gets an error.
    pub async fn give_up(&self, hands: &Hands) {
        let carrier = self.carrier.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(carrier) = carrier else { return };
        carrier.abort();
        let _ = carrier.await;
        self.pump.let_go(hands).await;
    }

    /// Writes to the host what programs left in the kernel's memory (shared mappings). Whatever the
    /// host does, this ends.
    pub async fn flush(&self) {
        if self.carrier.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            return;
        }
        let (tell, done) = oneshot::channel();
        let work = move || {
            let flushed = File::open(MOUNT).and_then(|root| Ok(rustix::fs::syncfs(root)?));
            drop(tell.send(flushed));
        };
        if std::thread::Builder::new().name("flush".to_owned()).spawn(work).is_ok() {
            let _ = tokio::time::timeout(FLUSH_DEADLINE, done).await;
        }
    }
}

/// How it is mounted, again and again.
struct Terms {
    pump: Arc<Pump>,
    hands: Hands,
    ask: Mount,
    owner: (u32, u32),
}

impl Terms {
    /// Mounts what a server of the host serves.
    async fn mount(&self) -> io::Result<()> {
        // What was open with an earlier one is lost, and says so.
        self.pump.let_go(&self.hands).await;
        let ask = self.ask;
        let mount = self.hands.run(move || mount_fuse(ask)).await??;
        let hears = mount.news.is_some();
        self.pump.serve(mount, owner_message(self.owner, hears));
        Ok(())
    }

    /// Carries messages in one session after the other, until nothing is mounted any more.
    async fn carry(&self, first: Arrived, streams: &mut mpsc::Receiver<Arrived>) -> io::Result<()> {
        let mut server = first.1.server.clone();
        let mut next = Some(first);
        while let Some((stream, resume)) = next {
            if resume.server != server {
                self.mount().await?;
                server.clone_from(&resume.server);
            }
            next = tokio::select! {
                ended = self.session(stream, &resume) => match ended {
                    Ended::Lost => streams.recv().await,
                    Ended::Unmounted => return Ok(()),
                },
                newer = streams.recv() => newer,
            };
            self.pump.end();
        }
        Ok(())
    }

    /// One session: as long as its stream lives.
    async fn session(&self, mut stream: Stream, resume: &Resume) -> Ended {
        let heard = match self.pump.begin(resume.epoch, resume.heard) {
            Ok(heard) => heard,
            Err(e) => {
                note(&format!("workspace: {e}"));
                return Ended::Lost;
            }
        };
        let said = async {
            stream.write_all(&heard.to_le_bytes()).await?;
            stream.flush().await
        };
        if said.await.is_err() {
            return Ended::Lost;
        }
        tokio::select! {
            // Nothing comes over it but its end.
            _ = stream.read_u8() => Ended::Lost,
            () = self.pump.unmounted() => Ended::Unmounted,
        }
    }
}

fn mount_fuse(ask: Mount) -> io::Result<pump::Mount> {
    let named = |what: &str, e: io::Error| io::Error::new(e.kind(), format!("{what}: {e}"));
    let flags = OFlags::NONBLOCK.bits() as i32;
    let fuse = File::options()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open("/dev/fuse")
        .map_err(|e| named("this kernel has no FUSE (/dev/fuse)", e))?;
    // A mount of an earlier server, if there is one.
    let _ = unmount(MOUNT, UnmountFlags::DETACH);
    fs::create_dir_all(MOUNT).map_err(|e| named(MOUNT, e))?;
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    if ask.read_only {
        flags |= MountFlags::RDONLY;
    }
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
        fuse.as_raw_fd()
    );
    mount("workspace", MOUNT, "fuse.aegis", flags, CString::new(options)?.as_c_str())
        .map_err(|e| named("can't mount the workspace", e.into()))?;
    // The kernel's own reads ahead less than one message holds.
    if let Err(e) = read_ahead() {
        note(&format!("workspace: {e}"));
    }
    let fuse = OwnedFd::from(fuse);
    let news = sys::fuse_again(&fuse).map(Arc::new);
    let news = news.inspect_err(|e| note(&format!("workspace: no news: {e}"))).ok();
    Ok(pump::Mount { fuse: Arc::new(fuse), news })
}

/// Has the kernel read ahead; before it hears of the server, which may only lower it. Nothing here
/// asks the mount, which nobody serves yet.
fn read_ahead() -> io::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let device = device(&mounts).ok_or_else(|| io::Error::other("its mount is not listed"))?;
    let kilobytes = (WORKSPACE_READ_AHEAD / 1024).to_string();
    fs::write(format!("/sys/class/bdi/{device}/read_ahead_kb"), kilobytes)
}

/// Number of the device that is mounted last at [`MOUNT`].
fn device(mounts: &str) -> Option<&str> {
    let ours = |line: &&str| line.split(' ').nth(4) == Some(MOUNT);
    mounts.lines().rfind(ours)?.split(' ').nth(2)
}

/// Whose the files are inside, and whether news of the host's changes are taken.
fn owner_message((uid, gid): (u32, u32), hears: bool) -> Vec<u8> {
    let mut message = vec![0; KERNEL_HEAD];
    message[..4].copy_from_slice(&(KERNEL_HEAD as u32 + 12).to_le_bytes());
    message[4..8].copy_from_slice(&OWNER_OPCODE.to_le_bytes());
    for number in [uid, gid, u32::from(hears)] {
        message.extend_from_slice(&number.to_le_bytes());
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_mount_counts() {
        let mounts = "24 1 0:5 / /dev rw - devtmpfs x rw\n\
                      60 1 0:41 / /workspace rw,nosuid - fuse.aegis workspace rw\n\
                      61 60 0:42 / /workspace rw,nosuid - fuse.aegis workspace rw\n\
                      62 1 0:43 / /workspace2 rw - tmpfs x rw\n";
        assert_eq!(device(mounts), Some("0:42"));
        assert_eq!(device(""), None);
    }

    #[test]
    fn the_owner_is_said_in_the_kernels_form() {
        let message = owner_message((1000, 100), true);
        assert_eq!(message.len(), 52);
        assert_eq!(message[..8], [52, 0, 0, 0, 1, 0, 0x45, 0x41]);
        assert_eq!(message[40..], [0xe8, 3, 0, 0, 100, 0, 0, 0, 1, 0, 0, 0]);
    }
}
