//! The machine's workspace: a folder of the host, mounted by this kernel's FUSE. The harness carries
//! the kernel's messages to the host and back, and understands none of them.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aegis_wire::bounds::{
    STREAMS_MAX, WORKSPACE_IN_FLIGHT_MAX, WORKSPACE_MESSAGE_MAX, WORKSPACE_READ_AHEAD,
};
use aegis_wire::channel::workspace::{
    HEAD_LEN, Head, Link, MOUNT, Mount, OWNER_OPCODE, Resume, say,
};
use aegis_wire::pipe::mux::Stream;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::hands::Hands;
use crate::note::note;
use crate::sys;
use crate::user::User;

/// Bytes of requests that wait here for the host; more wait with the kernel.
const WAITING_MAX: usize = 2 << 20;
/// How long the end of the machine waits for what was not written yet.
const FLUSH_DEADLINE: Duration = Duration::from_secs(3);
/// Requests that nobody answers: FORGET, INTERRUPT, BATCH_FORGET.
const UNANSWERED: [u32; 3] = [2, 36, 42];
/// Bytes of the kernel's own head of a message.
const KERNEL_HEAD: usize = 40;

type Arrived = (Stream, Resume);

/// The workspace of a machine, mounted or not.
pub struct Workspace {
    arrived: mpsc::Sender<Arrived>,
    streams: Arc<tokio::sync::Mutex<mpsc::Receiver<Arrived>>>,
    // Carries messages while somebody answers them.
    carrier: Mutex<Option<JoinHandle<()>>>,
    mounted: AtomicBool,
}

/// What one server of the host knows of.
struct Mounted {
    server: String,
    fuse: AsyncFd<OwnedFd>,
    account: Mutex<Account>,
    // There is something to say, or room to hear of it.
    news: Notify,
}

#[derive(Default)]
struct Account {
    link: Link,
    // Requests that the kernel waits for.
    open: usize,
}

/// How a stream ended.
enum Ended {
    /// It was lost; another one will come.
    Lost,
    /// The kernel has no such mount any more.
    Unmounted,
}

impl Workspace {
    /// Of a machine that has none yet.
    pub fn new() -> Workspace {
        let (arrived, streams) = mpsc::channel(STREAMS_MAX);
        let streams = Arc::new(tokio::sync::Mutex::new(streams));
        let (carrier, mounted) = (Mutex::default(), AtomicBool::new(false));
        Workspace { arrived, streams, carrier, mounted }
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
        self.give_up().await;
        let Some(ask) = ask else {
            if self.mounted.swap(false, Ordering::Relaxed) {
                hands.run(|| unmount(MOUNT, UnmountFlags::DETACH)).await??;
            }
            return Ok(());
        };
        let owner = user.map_or((0, 0), |u| (u.uid.as_raw(), u.gid.as_raw()));
        let terms = Terms { hands: hands.clone(), ask, owner };
        let streams = Arc::clone(&self.streams);
        let mut streams = streams.lock_owned().await;
        let lost = || io::Error::other("the host opened no stream for it");
        let first = streams.recv().await.ok_or_else(lost)?;
        let mounted = terms.mounted(&first.1).await?;
        self.mounted.store(true, Ordering::Relaxed);
        let carrier = tokio::spawn(async move {
            if let Err(e) = terms.carry(mounted, first, &mut streams).await {
                note(&format!("workspace: {e}"));
            }
        });
        *self.carrier.lock().unwrap_or_else(PoisonError::into_inner) = Some(carrier);
        Ok(())
    }

    /// Lets nobody wait for the host any more: whoever does, or asks later, gets an error.
    pub async fn give_up(&self) {
        let carrier = self.carrier.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(carrier) = carrier else { return };
        carrier.abort();
        // With it the kernel's own end is closed.
        let _ = carrier.await;
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
    hands: Hands,
    ask: Mount,
    owner: (u32, u32),
}

impl Terms {
    /// Mounts what a server of the host serves.
    async fn mounted(&self, resume: &Resume) -> io::Result<Mounted> {
        let ask = self.ask;
        let fuse = self.hands.run(move || mount_fuse(ask)).await??;
        let mut account = Account::default();
        account.link.say(owner_message(self.owner).into());
        Ok(Mounted {
            server: resume.server.clone(),
            fuse: sys::watch_both(fuse)?,
            account: Mutex::new(account),
            news: Notify::new(),
        })
    }

    /// Carries messages over one stream after the other, until nothing is mounted any more.
    async fn carry(
        &self,
        mut mounted: Mounted,
        first: Arrived,
        streams: &mut mpsc::Receiver<Arrived>,
    ) -> io::Result<()> {
        let mut next = Some(first);
        while let Some((stream, resume)) = next {
            if resume.server != mounted.server {
                // What was open with the old one is lost, and says so.
                drop(mounted);
                mounted = self.mounted(&resume).await?;
            }
            next = tokio::select! {
                ended = mounted.carry(stream, &resume) => match ended {
                    Ended::Lost => streams.recv().await,
                    Ended::Unmounted => return Ok(()),
                },
                newer = streams.recv() => newer,
            };
        }
        Ok(())
    }
}

fn mount_fuse(ask: Mount) -> io::Result<OwnedFd> {
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
    Ok(fuse.into())
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

fn owner_message((uid, gid): (u32, u32)) -> Vec<u8> {
    let mut message = vec![0; KERNEL_HEAD + 8];
    let len = message.len() as u32;
    message[..4].copy_from_slice(&len.to_le_bytes());
    message[4..8].copy_from_slice(&OWNER_OPCODE.to_le_bytes());
    message[KERNEL_HEAD..KERNEL_HEAD + 4].copy_from_slice(&uid.to_le_bytes());
    message[KERNEL_HEAD + 4..].copy_from_slice(&gid.to_le_bytes());
    message
}

impl Mounted {
    fn lock(&self) -> MutexGuard<'_, Account> {
        self.account.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries messages over one stream.
    async fn carry(&self, stream: Stream, resume: &Resume) -> Ended {
        let heard = {
            let mut account = self.lock();
            if let Err(e) = account.link.resume(resume.heard) {
                note(&format!("workspace: {e}"));
                return Ended::Lost;
            }
            account.link.heard()
        };
        let (from_host, mut to_host) = tokio::io::split(stream);
        if to_host.write_all(&heard.to_le_bytes()).await.is_err() {
            return Ended::Lost;
        }
        // When one side ends in the middle of a message, it comes again on the next stream.
        tokio::select! {
            _ = self.hear(from_host) => Ended::Lost,
            _ = self.say(to_host) => Ended::Lost,
            () = self.collect() => Ended::Unmounted,
        }
    }

    /// Host → kernel.
    async fn hear(&self, mut from: impl AsyncRead + Unpin) -> io::Result<()> {
        let mut message = Vec::new();
        loop {
            let mut head = [0; HEAD_LEN];
            from.read_exact(&mut head).await?;
            let head = Head::read(head).map_err(io::Error::other)?;
            message.resize(head.len, 0);
            from.read_exact(&mut message).await?;
            {
                let mut account = self.lock();
                account.link.other_heard(head.heard).map_err(io::Error::other)?;
                if head.len > 0 {
                    account.link.came();
                    account.open = account.open.saturating_sub(1);
                    // Who asked may have been killed meanwhile; then nobody waits for it.
                    let _ = rustix::io::write(self.fuse.get_ref(), &message);
                }
            }
            self.news.notify_waiters();
        }
    }

    /// What was collected → host.
    async fn say(&self, to: impl AsyncWrite + Unpin) -> io::Result<()> {
        say(&self.news, || self.lock().link.next_out(), to).await
    }

    /// Kernel → what is said, until the mount is gone.
    async fn collect(&self) {
        let mut buffer = vec![0; WORKSPACE_MESSAGE_MAX];
        loop {
            let mut news = std::pin::pin!(self.news.notified());
            news.as_mut().enable();
            if !self.lock().has_room() {
                news.await;
                continue;
            }
            let Ok(mut ready) = self.fuse.readable().await else { return };
            match rustix::io::read(self.fuse.get_ref(), &mut buffer[..]) {
                Ok(len) => {
                    self.lock().ask(&buffer[..len]);
                    self.news.notify_waiters();
                }
                Err(Errno::AGAIN) => ready.clear_ready(),
                // Taken back before it was read.
                Err(Errno::INTR | Errno::NOENT) => {}
                Err(_) => return,
            }
        }
    }
}

impl Account {
    fn has_room(&self) -> bool {
        self.open < WORKSPACE_IN_FLIGHT_MAX
            && self.link.has_room()
            && self.link.unheard_bytes() < WAITING_MAX
    }

    fn ask(&mut self, message: &[u8]) {
        let opcode = message.get(4..8).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
        self.open += usize::from(opcode.is_some_and(|o| !UNANSWERED.contains(&o)));
        self.link.say(message.into());
    }
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
        let message = owner_message((1000, 100));
        assert_eq!(message.len(), 48);
        assert_eq!(message[..8], [48, 0, 0, 0, 1, 0, 0x45, 0x41]);
        assert_eq!(message[40..], [0xe8, 3, 0, 0, 100, 0, 0, 0]);
    }

    #[test]
    fn no_more_is_asked_than_is_answered() {
        let mut account = Account::default();
        let message = |opcode: u32| {
            let mut message = vec![0; KERNEL_HEAD];
            message[4..8].copy_from_slice(&opcode.to_le_bytes());
            message
        };
        // What nobody answers does not count.
        account.ask(&message(UNANSWERED[0]));
        for _ in 0..WORKSPACE_IN_FLIGHT_MAX {
            assert!(account.has_room());
            account.ask(&message(1));
        }
        assert!(!account.has_room());
    }
}
