//! The only unsafe code of this crate: the birth of a process inside its cgroup, a signal to
//! everybody, four ioctls that have no safe wrapper, and descriptors that the runtime watches.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_long};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::ptr;
use std::sync::atomic::AtomicI32;

use rustix::io::Errno;
use rustix::process::Pid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::user::User;

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
    /// Whom it runs as; root when absent.
    pub user: Option<&'a User>,
    /// Standard input, output and error.
    pub standard: [BorrowedFd<'a>; 3],
    /// Standard input is the terminal that controls its session.
    pub terminal: bool,
    /// Directory of the cgroup to be born in.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// What a birth failed at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// No process could be made.
    Fork,
    /// Session, descriptors, signals.
    Prepare,
    /// The working directory.
    Directory,
    /// The program itself.
    Program,
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

/// Whether the processor is one of QEMU's software emulation.
pub fn emulated() -> bool {
    const HYPERVISOR: u32 = 0x4000_0000;
    #[allow(unused_unsafe, reason = "safe since Rust 1.92")]
    // SAFETY: every processor that this program is built for has the instruction.
    let leaf = unsafe { std::arch::x86_64::__cpuid(HYPERVISOR) };
    [leaf.ebx, leaf.ecx, leaf.edx]
        == [
            u32::from_le_bytes(*b"TCGT"),
            u32::from_le_bytes(*b"CGTC"),
            u32::from_le_bytes(*b"GTCG"),
        ]
}

const CLONE_VM: u64 = 0x100;
const CLONE_VFORK: u64 = 0x4000;
const CLONE_PARENT_SETTID: u64 = 0x10_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Memory for what the child does before its program, bytes.
const CHILD_STACK: usize = 64 * 1024;

/// What the child is given, and where it leaves a word when it fails: they share their memory.
struct Cradle<'a> {
    birth: &'a Birth<'a>,
    arguments: &'a [*const c_char],
    environment: &'a [*const c_char],
    failed: Option<Stillborn>,
}

/// Starts a process in a session of its own. Returns once its program runs.
///
/// Not by the standard library: it is born inside its cgroup (joining later would leave it a
/// moment without limits, and takes the kernel tens of milliseconds), and without a copy of this
/// process's memory (a third of the time, under software emulation).
///
/// `newborn` shows its id from before it runs.
pub fn spawn(birth: &Birth<'_>, newborn: &AtomicI32) -> Result<Pid, Stillborn> {
    let arguments = pointers(birth.arguments);
    let environment = pointers(birth.environment);
    let mut cradle =
        Cradle { birth, arguments: &arguments, environment: &environment, failed: None };
    let mut stack = vec![0u128; CHILD_STACK / size_of::<u128>()];
    let mut args = CloneArgs {
        flags: CLONE_VM | CLONE_VFORK | CLONE_PARENT_SETTID,
        parent_tid: newborn.as_ptr() as u64,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.as_mut_ptr() as u64,
        stack_size: CHILD_STACK as u64,
        ..CloneArgs::default()
    };
    if let Some(cgroup) = birth.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    let outcome: c_long;
    // SAFETY: the child runs `be_born` on a stack of its own (aligned like u128) and never comes
    // back from it. This thread stands still until the child has its program or is gone, so
    // `cradle` and `stack` outlive the child's use of them, and nobody else touches them.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r8",
            "call r9",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => outcome,
            in("rdi") &raw const args,
            in("rsi") size_of::<CloneArgs>(),
            in("r8") &raw mut cradle,
            in("r9") be_born as extern "C" fn(*mut Cradle<'_>) -> !,
            out("rcx") _,
            out("r11") _,
        );
    }
    drop(stack);
    if let Some(failed) = cradle.failed {
        return Err(failed);
    }
    let errno = || Errno::from_raw_os_error(-outcome as i32);
    Pid::from_raw(outcome as i32)
        .filter(|_| outcome > 0)
        .ok_or_else(|| Stillborn { stage: Stage::Fork, errno: errno() })
}

/// The child's life up to its program.
extern "C" fn be_born(cradle: *mut Cradle<'_>) -> ! {
    // SAFETY: the parent stands still and keeps it alive.
    let cradle = unsafe { &mut *cradle };
    let failed = become_program(cradle.birth, cradle.arguments, cradle.environment);
    cradle.failed = Some(failed);
    // SAFETY: ends this process without running anything of the parent's.
    unsafe { libc::_exit(127) }
}

/// In the child: only system calls, no allocation, no lock.
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
            // SAFETY: the numbers 0 to 2 belong to nobody in the child from here on; the sources
            // are all above them.
            if unsafe { libc::dup2(from.as_raw_fd(), number) } < 0 {
                return Err(prepared(last_errno()));
            }
        }
        if birth.terminal {
            // SAFETY: 0 was made the terminal just now, and stays it.
            let terminal = unsafe { BorrowedFd::borrow_raw(0) };
            rustix::process::ioctl_tiocsctty(terminal).map_err(prepared)?;
        }
        // SAFETY: only marks descriptors; a kernel that can't is no harm, all are marked.
        unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, CLOSE_RANGE_CLOEXEC) };
        // What the harness ignores and blocks for itself is not for its children.
        // SAFETY: a default action and an empty mask, for the child alone.
        unsafe {
            let mut none = std::mem::zeroed::<libc::sigaction>();
            none.sa_sigaction = libc::SIG_DFL;
            libc::sigaction(libc::SIGPIPE, &raw const none, ptr::null_mut());
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none.sa_mask, ptr::null_mut());
        }
        rustix::process::setpriority_process(None, 0).map_err(prepared)?;
        if let Some(root) = birth.root {
            rustix::process::chroot(root).map_err(prepared)?;
        }
        rustix::process::chdir(birth.directory).map_err(failed(Stage::Directory))?;
        if let Some(user) = birth.user {
            // Of this thread alone, and there is no other in the child.
            rustix::thread::set_thread_groups(&user.groups).map_err(prepared)?;
            rustix::thread::set_thread_res_gid(user.gid, user.gid, user.gid).map_err(prepared)?;
            rustix::thread::set_thread_res_uid(user.uid, user.uid, user.uid).map_err(prepared)?;
        }
        Ok(())
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

/// The kernel's randomness, to add to.
pub fn randomness() -> io::Result<File> {
    File::options().write(true).open("/dev/urandom")
}

/// Adds to the kernel's randomness and lets every generator begin anew from it.
pub fn reseed(random: &File, entropy: &[u8; ENTROPY_LEN]) -> io::Result<()> {
    #[repr(C)]
    struct PoolInfo {
        bits: c_int,
        bytes: c_int,
        buffer: [u8; ENTROPY_LEN],
    }
    let info =
        PoolInfo { bits: 8 * ENTROPY_LEN as c_int, bytes: ENTROPY_LEN as c_int, buffer: *entropy };
    // SAFETY: the kernel reads `bytes` bytes behind the two numbers; the struct holds as many.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const info) }.into())?;
    // SAFETY: takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) }.into())
}

/// A question about a network device, without what is asked.
fn device_request(name: &str) -> libc::ifreq {
    // SAFETY: all zero is a valid ifreq.
    let mut request = unsafe { std::mem::zeroed::<libc::ifreq>() };
    // Its last byte stays zero.
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *to = from as c_char;
    }
    request
}

/// Gives an Ethernet card another address of its own; any socket serves to say it.
pub fn set_hardware_address(socket: impl AsFd, name: &str, address: [u8; 6]) -> io::Result<()> {
    let mut request = device_request(name);
    let mut hardware = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: [0; 14] };
    for (to, from) in hardware.sa_data.iter_mut().zip(address) {
        *to = from as c_char;
    }
    request.ifr_ifru.ifru_hwaddr = hardware;
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel reads name and address of the struct.
    check(unsafe { libc::ioctl(socket, libc::SIOCSIFHWADDR as _, &raw const request) }.into())
}

/// Brings the loopback device up, with its addresses.
pub fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    let mut request = device_request("lo");
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

/// Lets the runtime tell when a descriptor becomes readable, and when writable.
pub fn watch_both(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    let both = Interest::READABLE.add(Interest::WRITABLE);
    // SAFETY: as in `watch`.
    Ok(unsafe { AsyncFd::register_with_interest(fd, both) }?)
}

/// Another way to the FUSE mount of a descriptor: what is written there does not keep the first one
/// open.
pub fn fuse_again(fuse: &OwnedFd) -> io::Result<OwnedFd> {
    const CLONE: rustix::ioctl::Opcode = rustix::ioctl::opcode::read::<u32>(229, 0);
    let again = OwnedFd::from(File::options().read(true).write(true).open("/dev/fuse")?);
    let mut number = fuse.as_raw_fd() as u32;
    // SAFETY: the operation reads a number that lives for the call, the one of an open descriptor.
    unsafe {
        rustix::ioctl::ioctl(&again, rustix::ioctl::Updater::<CLONE, u32>::new(&mut number))?;
    }
    Ok(again)
}

/// Makes the ends of children readable instead of deadly interruptions. Before any thread starts,
/// so that none is interrupted.
pub fn children() -> io::Result<OwnedFd> {
    // SAFETY: fills a set that is valid when all zero, blocks it for this thread and those that it
    // starts later, and makes a descriptor that nobody else owns.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()).into())?;
        let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        check(fd.into())?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

fn check(outcome: c_long) -> io::Result<()> {
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
