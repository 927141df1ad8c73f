//! From the kernel's first program to a machine that can be talked to.

use std::fs;
use std::io;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind};
use rustix::process::{Resource, Rlimit};

use crate::cage::Cage;
use crate::note::note;
use crate::{modules, net, sys};

/// A file that hides the kernel's own boot id once it is written to.
pub const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Open files that a process inside may have, and may allow itself.
const FILES: (u64, u64) = (65_536, 524_288);
/// The harness gets its turn before whatever runs inside.
const NICE: i32 = -15;

const QUIET: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// What the boot found and made.
pub struct Booted {
    /// Where user processes live; `None` on a kernel without cgroup v2.
    pub cage: Option<Cage>,
    /// What a clone writes its identity to.
    pub marks: Marks,
}

/// What a clone writes to the kernel when it becomes itself. Found in the golden machine, so that
/// clones need not look for it.
pub struct Marks {
    /// The boot id that processes see, where it can be shown.
    pub boot_id: Option<fs::File>,
    /// The kernel's randomness.
    pub random: fs::File,
    /// The machine's card, where it has one.
    pub card: Option<net::Card>,
}

/// Mounts what a Linux system has, loads modules, sets limits. Everything that a clone needs and
/// that is the same in all clones is done here, once, in the golden machine.
pub fn boot() -> io::Result<Booted> {
    // Each may be there already: a kernel can mount /dev by itself.
    mount_at("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, "mode=0755")?;
    mount_at("proc", "/proc", "proc", QUIET, "")?;
    mount_at("sysfs", "/sys", "sysfs", QUIET, "")?;
    let devpts = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_at("devpts", "/dev/pts", "devpts", devpts, "gid=5,mode=620,ptmxmode=666")?;
    let shm = MountFlags::NOSUID | MountFlags::NODEV;
    mount_at("shm", "/dev/shm", "tmpfs", shm, "mode=1777,size=50%")?;
    mount_at("run", "/run", "tmpfs", shm, "mode=0755,size=20%")?;
    mount_at("tmp", "/tmp", "tmpfs", shm, "mode=1777,size=50%")?;
    links()?;
    for problem in modules::load() {
        note(&problem);
    }
    // Worth a remark, not worth a machine.
    if sys::emulated() {
        // Emulated code is translated once per address: with every program at a new address each
        // time, a process costs five times as much to start (26 instead of 5 ms).
        remark("addresses", fs::write("/proc/sys/kernel/randomize_va_space", "0"));
    }
    remark("loopback", sys::loopback_up());
    let card = remark("network", net::Card::up());
    remark("priority", rustix::process::setpriority_process(None, NICE).map_err(Into::into));
    let files = Rlimit { current: Some(FILES.0), maximum: Some(FILES.1) };
    remark("files", rustix::process::setrlimit(Resource::Nofile, files).map_err(Into::into));
    let boot_id = remark("boot id", cover_boot_id());
    let cage = remark("cgroup", mount_cgroups().and_then(|()| Cage::make()));
    let random = sys::randomness()?;
    Ok(Booted { cage, marks: Marks { boot_id, random, card } })
}

/// Mounts, on a directory that is made where it is missing.
fn mount_at(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> io::Result<()> {
    fs::create_dir_all(target)?;
    let options = std::ffi::CString::new(options)?;
    match mount(source, target, kind, flags, options.as_c_str()) {
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(errno) => Err(io::Error::new(
            io::Error::from(errno).kind(),
            format!("can't mount {kind} on {target}: {errno}"),
        )),
    }
}

/// What every program expects in /dev beside its nodes.
fn links() -> io::Result<()> {
    let wanted = [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ];
    for (to, link) in wanted {
        match std::os::unix::fs::symlink(to, link) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// Puts an empty file over the kernel's boot id, which is the same in all clones.
fn cover_boot_id() -> io::Result<fs::File> {
    let stage = "/run/stage";
    mount_at("aegis", stage, "tmpfs", QUIET, "mode=0755,size=64k")?;
    let path = Path::new(stage).join("boot_id");
    let file = fs::File::create(&path)?;
    let readable = std::os::unix::fs::PermissionsExt::from_mode(0o444);
    file.set_permissions(readable)?;
    mount_bind(&path, BOOT_ID)?;
    // The file stays where it is bound; nobody shall find it anywhere else.
    rustix::mount::unmount(stage, rustix::mount::UnmountFlags::DETACH)?;
    fs::remove_dir(stage)?;
    Ok(file)
}

fn mount_cgroups() -> io::Result<()> {
    let target = crate::cage::MOUNT;
    mount_at("cgroup2", target, "cgroup2", QUIET, "nsdelegate,memory_recursiveprot")
}

fn remark<T>(what: &str, outcome: io::Result<T>) -> Option<T> {
    outcome.inspect_err(|e| note(&format!("{what}: {e}"))).ok()
}
