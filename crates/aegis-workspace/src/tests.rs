//! The server as a machine's kernel speaks to it, and as one that means harm does.

mod changes;
mod hostile;
mod kernel;
mod lost;
mod modes;
mod quotas;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use tempfile::TempDir;

use crate::abi::{IN_HEADER, OUT_HEADER, ROOT_ID, init, op};
use crate::folder::{Folder, Lent};
use crate::nodes::Bounds;
use crate::quota::Quota;

/// What a test's machine may hold.
const BOUNDS: Bounds = Bounds { nodes: 200, descriptors: 16, nameless: 8 };
const HANDLES: usize = 32;

/// A folder that is lent, beside one that is not.
struct Scene {
    dir: TempDir,
    folder: Folder,
}

impl Scene {
    fn new() -> Scene {
        Scene::of(1 << 30, false, BOUNDS)
    }

    fn of(limit: u64, read_only: bool, bounds: Bounds) -> Scene {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("lent")).unwrap();
        fs::write(dir.path().join("secret"), "the host's").unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let open = |path: &Path| rustix::fs::open(path, flags, Mode::empty()).unwrap();
        let folder = Folder::new(Lent {
            root: open(&dir.path().join("lent")),
            descriptors: open(Path::new("/proc/self/fd")),
            read_only,
            bounds,
            handles: HANDLES,
            watch: None,
            quota: Quota::new(limit, None, None),
        })
        .unwrap();
        let scene = Scene { dir, folder };
        let mut ask = Ask::new();
        ask.u32(init::MAJOR).u32(init::MINOR).u32(1 << 20).u32(u32::MAX);
        scene.say(op::INIT, 0, &ask).unwrap();
        scene
    }

    /// On the host.
    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join("lent").join(name)
    }

    fn secret(&self) -> PathBuf {
        self.dir.path().join("secret")
    }

    /// Says a request; the body of the answer.
    fn say(&self, opcode: u32, node: u64, ask: &Ask) -> Result<Vec<u8>, Errno> {
        let request = ask.request(opcode, node);
        let answer = self.folder.answer(&request).expect("an answer");
        let number = |at: usize| u32::from_le_bytes(answer[at..at + 4].try_into().unwrap());
        assert_eq!(number(0) as usize, answer.len());
        match number(4) as i32 {
            0 => Ok(answer[OUT_HEADER..].to_vec()),
            errno => Err(Errno::from_raw_os_error(-errno)),
        }
    }

    fn lookup(&self, parent: u64, name: &str) -> Result<u64, Errno> {
        match u64_at(&self.say(op::LOOKUP, parent, Ask::new().text(name))?, 0) {
            0 => Err(Errno::NOENT),
            node => Ok(node),
        }
    }

    fn mkdir(&self, parent: u64, name: &str) -> Result<u64, Errno> {
        Ok(u64_at(&self.say(op::MKDIR, parent, Ask::new().u32(0o755).u32(0).text(name))?, 0))
    }

    fn create(&self, parent: u64, name: &str) -> Result<u64, Errno> {
        let mut ask = Ask::new();
        ask.u32(OFlags::RDWR.bits() | OFlags::CREATE.bits()).u32(0o644).u32(0).u32(0).text(name);
        Ok(u64_at(&self.say(op::CREATE, parent, &ask)?, 0))
    }

    fn write(&self, node: u64, offset: u64, bytes: &[u8]) -> Result<u32, Errno> {
        self.write_as(node, offset, bytes, 0, OFlags::RDWR)
    }

    /// Writes as the kernel does for who opened the file so, or for its own cache.
    fn write_as(
        &self,
        node: u64,
        offset: u64,
        bytes: &[u8],
        flags: u32,
        opened: OFlags,
    ) -> Result<u32, Errno> {
        let mut ask = Ask::new();
        ask.u64(0).u64(offset).u32(bytes.len() as u32).u32(flags).u64(0).u32(opened.bits()).u32(0);
        ask.0.extend_from_slice(bytes);
        let answer = self.say(op::WRITE, node, &ask)?;
        Ok(u32::from_le_bytes(answer[..4].try_into().unwrap()))
    }

    fn read(&self, node: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        let mut ask = Ask::new();
        ask.u64(0).u64(offset).u32(size).u32(0).u64(0).u32(0).u32(0);
        self.say(op::READ, node, &ask)
    }

    fn release(&self, handle: u64) {
        self.say(op::RELEASEDIR, ROOT_ID, Ask::new().u64(handle)).unwrap();
    }

    fn unlink(&self, parent: u64, name: &str) -> Result<(), Errno> {
        self.say(op::UNLINK, parent, Ask::new().text(name)).map(drop)
    }

    fn forget(&self, node: u64, times: u64) {
        let request = Ask::new().u64(times).request(op::FORGET, node);
        assert!(self.folder.answer(&request).is_none());
    }

    /// What a directory holds; names and types.
    fn list(&self, node: u64, plus: bool) -> HashMap<String, u32> {
        let handle = u64_at(&self.say(op::OPENDIR, node, Ask::new().u64(0)).unwrap(), 0);
        let (mut all, mut offset) = (HashMap::new(), 0);
        let opcode = if plus { op::READDIRPLUS } else { op::READDIR };
        loop {
            let mut ask = Ask::new();
            ask.u64(handle).u64(offset).u32(512).u32(0).u64(0).u32(0).u32(0);
            let answer = self.say(opcode, node, &ask).unwrap();
            assert!(answer.len() <= 512);
            if answer.is_empty() {
                break;
            }
            let mut rest = &answer[..];
            while !rest.is_empty() {
                let entry = if plus { &rest[128..] } else { rest };
                offset = u64_at(entry, 8);
                let len = u32::from_le_bytes(entry[16..20].try_into().unwrap()) as usize;
                let kind = u32::from_le_bytes(entry[20..24].try_into().unwrap());
                let name = String::from_utf8(entry[24..24 + len].to_vec()).unwrap();
                assert!(all.insert(name, kind).is_none(), "each once");
                rest = &entry[(24 + len).next_multiple_of(8)..];
            }
        }
        self.release(handle);
        all
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Body of a request.
struct Ask(Vec<u8>);

impl Ask {
    fn new() -> Ask {
        Ask(Vec::new())
    }

    fn u32(&mut self, value: u32) -> &mut Ask {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Ask {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn text(&mut self, text: &str) -> &mut Ask {
        self.0.extend_from_slice(text.as_bytes());
        self.0.push(0);
        self
    }

    fn request(&self, opcode: u32, node: u64) -> Vec<u8> {
        let mut head = Ask::new();
        head.u32((IN_HEADER + self.0.len()) as u32).u32(opcode).u64(7).u64(node).u64(0).u64(0);
        head.0.extend_from_slice(&self.0);
        head.0
    }
}
