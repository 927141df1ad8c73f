//! The only unsafe code of this crate: the birth of a process inside its cgroup, a signal to
//! everybody, four ioctls that have no safe wrapper, and descriptors that the runtime watches.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_long};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::ptr;

use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Everything that a new process is made of; nothing is allocated after the fork.
pub struct Birth<'a> {
    /// Paths to try, in order.
    pub programs: &'a [CString],
    /// Arguments, the program's name first.
    pub arguments: &'a [CString],
    /// `NAME=value` each.
    pub environment: &'a [CString],
    /// Working directory.
    pub directory: &'a CStr,
    /// Root directory, where it is not the harness's own.
    pub root: Option<&'a CStr>,
    /// Standard input, output and error.
    pub standard: [BorrowedFd<'a>; 3],
    /// Directory of the cgroup to be born in.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// What a birth failed at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Stage {
    /// No process could be made.
    Fork = 0,
    /// Session, descriptors, signals.
    Prepare = 1,
    /// The working directory.
    Directory = 2,
    /// The program itself.
    Program = 3,
}

/// Why there is no new process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stillborn {
    /// What failed.
    pub stage: Stage,
    /// What the kernel said.
    pub errno: Errno,
}

/// `struct clone_args` of clone3(2), as of Linux 5.7.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_VFORK: u64 = 0x4000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Starts a process in a session of its own. Returns once its program runs.
///
/// It is born inside its cgroup (joining later would leave it a moment without limits, and takes
/// the kernel up to tens of milliseconds), hence not by the standard library.
pub fn spawn(birth: &Birth<'_>) -> Result<Pid, Stillborn> {
    let fork_failed = |errno| Stillborn { stage: Stage::Fork, errno };
    let (report, reporter) =
        rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(fork_failed)?;
    let arguments = pointers(birth.arguments);
    let environment = pointers(birth.environment);
    let mut args = CloneArgs {
        // The parent stands still until the exec: no page is copied because the parent writes it.
        flags: CLONE_VFORK,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    if let Some(cgroup) = birth.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM this is a plain fork: the child has a copy of this stack and all
    // memory. It calls nothing but system calls until it execs or exits, so locks that other
    // threads held at the fork don't matter.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    if pid < 0 {
        return Err(fork_failed(last_errno()));
    }
    if pid == 0 {
        let failed = become_program(birth, &arguments, &environment);
        let said = failed.errno.raw_os_error().to_le_bytes();
        let _ = rustix::io::write(
            &reporter,
            &[failed.stage as u8, said[0], said[1], said[2], said[3]],
        );
        // SAFETY: ends this process without running anything of the parent's.
        unsafe { libc::_exit(127) }
    }
    drop(reporter);
    let mut said = [0; 5];
    match rustix::io::retry_on_intr(|| rustix::io::read(&report, &mut said)) {
        Ok(5) => {
            let stage = match said[0] {
                2 => Stage::Directory,
                3 => Stage::Program,
                _ => Stage::Prepare,
            };
            let code = i32::from_le_bytes([said[1], said[2], said[3], said[4]]);
            Err(Stillborn { stage, errno: Errno::from_raw_os_error(code) })
        }
        _ => Pid::from_raw(pid as i32).ok_or(fork_failed(Errno::CHILD)),
    }
}

/// In the child: only system calls, no allocation.
fn become_program(
    birth: &Birth<'_>,
    arguments: &[*const c_char],
    environment: &[*const c_char],
) -> Stillborn {
    let failed = |stage| move |errno| Stillborn { stage, errno };
    let prepare = || -> Result<(), Stillborn> {
        let prepared = failed(Stage::Prepare);
        rustix::process::setsid().map_err(prepared)?;
        for (number, from) in (0..).zip(birth.standard) {
            // SAFETY: the numbers 0 to 2 belong to nobody in this process from here on; the
            // sources are all above them (`Plan` sees to that).
            if unsafe { libc::dup2(from.as_raw_fd(), number) } < 0 {
                return Err(prepared(last_errno()));
            }
        }
        // SAFETY: only marks descriptors; an old kernel that can't is no harm, all are marked.
        unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, CLOSE_RANGE_CLOEXEC) };
        // What this process ignores for itself is not for its children.
        // SAFETY: sets default actions and an empty mask, in this process alone.
        unsafe {
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            let mut none = std::mem::zeroed::<libc::sigset_t>();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        }
        rustix::process::setpriority_process(None, 0).map_err(prepared)?;
        if let Some(root) = birth.root {
            rustix::process::chroot(root).map_err(prepared)?;
        }
        rustix::process::chdir(birth.directory).map_err(failed(Stage::Directory))
    };
    if let Err(stillborn) = prepare() {
        return stillborn;
    }
    let mut worst = Errno::NOENT;
    for program in birth.programs {
        // SAFETY: all three are arrays of pointers to C strings with a null at the end, and live.
        unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
        match last_errno() {
            Errno::NOENT | Errno::NOTDIR => {}
            // Another directory may hold one that can be run.
            Errno::ACCESS => worst = Errno::ACCESS,
            errno => return Stillborn { stage: Stage::Program, errno },
        }
    }
    Stillborn { stage: Stage::Program, errno: worst }
}

const CLOSE_RANGE_CLOEXEC: c_int = 4;

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Sends a signal to every process but this one. True when there was anybody.
pub fn signal_everybody(signal: c_int) -> bool {
    // SAFETY: -1 names all processes but PID 1 and the caller.
    unsafe { libc::kill(-1, signal) == 0 }
}

const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;
const FIFREEZE: libc::Ioctl = 0xC004_5877;

/// Bytes of `struct rand_pool_info` that are given at once.
pub const ENTROPY_LEN: usize = 64;

/// Adds randomness to the kernel's pool and lets every generator begin anew from it.
pub fn reseed(entropy: &[u8; ENTROPY_LEN]) -> io::Result<()> {
    #[repr(C)]
    struct PoolInfo {
        bits: c_int,
        bytes: c_int,
        buffer: [u8; ENTROPY_LEN],
    }
    let random = File::options().write(true).open("/dev/urandom")?;
    let info = PoolInfo {
        bits: 8 * ENTROPY_LEN as c_int,
        bytes: ENTROPY_LEN as c_int,
        buffer: *entropy,
    };
    // SAFETY: the kernel reads `bytes` bytes behind the two numbers; the struct holds as many.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) }.into())?;
    // SAFETY: takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) }.into())
}

/// Brings the loopback device up, with its addresses.
pub fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    // SAFETY: all zero is a valid ifreq.
    let mut request = unsafe { std::mem::zeroed::<libc::ifreq>() };
    request.ifr_name[0] = b'l' as c_char;
    request.ifr_name[1] = b'o' as c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    // SAFETY: the kernel reads name and flags of the struct.
    let done =
        unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) };
    check(done.into())
}

/// Makes a file system consistent on its disk and forbids every later write.
pub fn freeze(directory: impl AsFd) -> io::Result<()> {
    // SAFETY: takes a number that it does not use.
    check(unsafe { libc::ioctl(directory.as_fd().as_raw_fd(), FIFREEZE, 0) }.into())
}

/// Lets the runtime tell when a descriptor becomes readable.
pub fn watch(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor stays the same and open until the `AsyncFd` that owns it now
    // is dropped, which takes it out of the runtime first.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

fn check(outcome: c_long) -> io::Result<()> {
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
