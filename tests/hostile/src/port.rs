//! A virtio-serial port by its name: carried to and from the session by two threads, and open to
//! whoever wants to write past the session.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aegis_wire::channel::frame::Epoch;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;

/// There is nothing to wait for while a device comes up or a host is away.
const LOOK_EVERY: Duration = Duration::from_millis(5);
const CHUNK: usize = 16 * 1024;

/// The open port.
pub struct Port {
    file: File,
    deaf: AtomicBool,
    epoch: Mutex<Epoch>,
}

impl Port {
    /// Waits for the port.
    pub fn open(name: &str) -> Port {
        let node = loop {
            match find(name) {
                Some(node) => break node,
                None => std::thread::sleep(LOOK_EVERY),
            }
        };
        // A blocking write stops the kernel's only processor while the host does not read.
        let flags = OFlags::NONBLOCK.bits() as i32;
        let file = File::options().read(true).write(true).custom_flags(flags).open(node).unwrap();
        Port { file, deaf: AtomicBool::new(false), epoch: Mutex::default() }
    }

    /// The port as a pipe of the runtime's.
    pub fn connect(self: &std::sync::Arc<Port>) -> tokio::net::UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let (mut to, mut from) = (ours.try_clone().unwrap(), ours);
        let port = std::sync::Arc::clone(self);
        std::thread::spawn(move || {
            let mut chunk = vec![0; CHUNK];
            loop {
                while port.deaf.load(Ordering::Relaxed) {
                    std::thread::park();
                }
                let n = port.read(&mut chunk);
                to.write_all(&chunk[..n]).unwrap();
            }
        });
        let port = std::sync::Arc::clone(self);
        std::thread::spawn(move || {
            let mut chunk = vec![0; CHUNK];
            loop {
                let n = from.read(&mut chunk).unwrap();
                port.write(&chunk[..n]);
            }
        });
        tokio::net::UnixStream::from_std(theirs).unwrap()
    }

    /// Never reads again.
    pub fn become_deaf(&self) {
        self.deaf.store(true, Ordering::Relaxed);
    }

    /// The session of now.
    pub fn remember(&self, epoch: Epoch) {
        *self.epoch.lock().unwrap() = epoch;
    }

    /// The session of now.
    pub fn epoch(&self) -> Epoch {
        *self.epoch.lock().unwrap()
    }

    /// Writes all, past whatever session there is.
    pub fn write(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            match rustix::io::write(&self.file, bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT),
                Err(_) => std::thread::sleep(LOOK_EVERY),
            }
        }
    }

    fn read(&self, chunk: &mut [u8]) -> usize {
        loop {
            match rustix::io::read(&self.file, &mut *chunk) {
                Ok(n) if n > 0 => return n,
                Err(Errno::AGAIN) => self.wait(PollFlags::IN),
                // No host is there.
                _ => std::thread::sleep(LOOK_EVERY),
            }
        }
    }

    fn wait(&self, what: PollFlags) {
        let wait = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        let _ = poll(&mut [PollFd::new(&self.file, what)], Some(&wait));
    }
}

fn find(wanted: &str) -> Option<PathBuf> {
    std::fs::read_dir("/sys/class/virtio-ports").ok()?.flatten().find_map(|entry| {
        let name = std::fs::read_to_string(entry.path().join("name")).ok()?;
        let node = PathBuf::from("/dev").join(entry.file_name());
        (name.trim_end() == wanted && node.exists()).then_some(node)
    })
}
