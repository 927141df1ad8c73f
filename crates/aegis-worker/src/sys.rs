//! The only unsafe code of this crate: what happens between fork and exec, one ioctl, one
//! instruction, and the file descriptors that this process was born with.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::process::{Pid, Resource, Rlimit, Signal};
use rustix::thread::{Gid, Uid};

/// What a child becomes between fork and exec.
#[derive(Default)]
pub struct Confine {
    /// Opened files that take the child in when it writes "0" to them (cgroup `tasks` and
    /// `cgroup.procs`), while it still has the rights to.
    pub join: Vec<OwnedFd>,
    /// Descriptors that stay open, under the same numbers; all others close at exec.
    pub keep: Vec<OwnedFd>,
    /// User and group of its own, and the groups beside them.
    pub user: Option<User>,
    /// It dies when the thread that started it dies: only for the main thread.
    pub die_with_parent: bool,
    /// A session of its own: it outlives the one who started it.
    pub new_session: bool,
    /// No new privileges by exec, no core file, few descriptors.
    pub harden: bool,
    /// Largest file that it can write, bytes.
    pub file_size_max: Option<u64>,
}

/// Whom a child runs as.
pub struct User {
    /// User and group id.
    pub id: u32,
    /// Groups beside the own one.
    pub groups: Vec<u32>,
}

/// Open files that a confined child may have.
const CHILD_FILES_MAX: u64 = 1024;

/// A descriptor that was left open for this process by who started it ([`Confine::keep`]), once.
pub fn born_with(fd: RawFd) -> OwnedFd {
    // SAFETY: who started this process opened it for us alone, and told nobody else its number.
    unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) }
}

/// Applies `plan` to `command`.
pub fn confine(command: &mut Command, plan: Confine) {
    let parent = rustix::process::getpid();
    let user = plan.user.map(|u| {
        let groups: Vec<Gid> = u.groups.iter().map(|g| Gid::from_raw(*g)).collect();
        (Uid::from_raw(u.id), Gid::from_raw(u.id), groups)
    });
    let (join, keep) = (plan.join, plan.keep);
    let (die, session, harden) = (plan.die_with_parent, plan.new_session, plan.harden);
    let file_size_max = plan.file_size_max;
    let work = move || -> io::Result<()> {
        if session {
            rustix::process::setsid()?;
        }
        for file in &join {
            rustix::io::write(file, b"0")?;
        }
        for fd in &keep {
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
        }
        if harden {
            rustix::process::setrlimit(Resource::Core, limit(0))?;
            rustix::process::setrlimit(Resource::Nofile, limit(CHILD_FILES_MAX))?;
        }
        if let Some(bytes) = file_size_max {
            rustix::process::setrlimit(Resource::Fsize, limit(bytes))?;
        }
        if let Some((uid, gid, groups)) = &user {
            rustix::thread::set_thread_groups(groups)?;
            rustix::thread::set_thread_res_gid(*gid, *gid, *gid)?;
            rustix::thread::set_thread_res_uid(*uid, *uid, *uid)?;
        }
        if harden {
            rustix::thread::set_no_new_privs(true)?;
        }
        if die {
            // After the change of user, which clears it.
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            if rustix::process::getppid() != Some(parent) {
                // The parent died before the line above took hold.
                return Err(io::ErrorKind::Interrupted.into());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe things may happen. The closure makes
    // plain system calls on values made before the fork; it allocates nothing, takes no lock, and
    // the child has one thread, so that the per-thread id calls change the whole child.
    unsafe {
        command.pre_exec(work);
    }
}

fn limit(n: u64) -> Rlimit {
    Rlimit { current: Some(n), maximum: Some(n) }
}

/// Marks every descriptor above 2 that this process was born with to close at exec.
pub fn close_inherited_at_exec() {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return };
    let fds: Vec<RawFd> = entries
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in fds {
        // SAFETY: the borrow lives for one fcntl; a descriptor that is closed by now (the one of
        // the listing itself) only makes it fail with EBADF.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let _ = rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC);
    }
}

/// Whether this KVM device can make a virtual machine: its API version is asked and a machine
/// without anything in it is made.
pub fn kvm_makes_machines(kvm: &File) -> io::Result<()> {
    const KVM_GET_API_VERSION: u32 = 0xAE00;
    const KVM_CREATE_VM: u32 = 0xAE01;
    /// An ioctl whose argument is the number 0 and whose result is a number.
    struct Plain<const OP: u32>;
    // SAFETY: both operations take an integer argument and touch no memory of ours.
    unsafe impl<const OP: u32> rustix::ioctl::Ioctl for Plain<OP> {
        type Output = i32;
        const IS_MUTATING: bool = false;
        fn opcode(&self) -> rustix::ioctl::Opcode {
            rustix::ioctl::Opcode::from(OP)
        }
        fn as_ptr(&mut self) -> *mut core::ffi::c_void {
            core::ptr::null_mut()
        }
        unsafe fn output_from_ptr(
            out: rustix::ioctl::IoctlOutput,
            _: *mut core::ffi::c_void,
        ) -> rustix::io::Result<i32> {
            Ok(out)
        }
    }
    // SAFETY: see the impl above; the device is the one that these numbers belong to.
    let version = unsafe { rustix::ioctl::ioctl(kvm, Plain::<KVM_GET_API_VERSION>) }?;
    if version != 12 {
        return Err(io::Error::other(format!("its API version is {version}, not 12")));
    }
    // SAFETY: see the impl above.
    let machine = unsafe { rustix::ioctl::ioctl(kvm, Plain::<KVM_CREATE_VM>) }?;
    // SAFETY: the call returned a new descriptor that nobody else owns.
    drop(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(machine) });
    Ok(())
}

/// The processor's time stamp counter.
pub fn time_stamp_counter() -> u64 {
    // SAFETY: rdtsc reads a register and nothing else; every x86-64 processor has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The path by which this process, and a child that keeps the descriptor, can open a file anew.
pub fn fd_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// A process id as the kernel takes it; `None` for what cannot be one.
pub fn pid(raw: i32) -> Option<Pid> {
    if raw > 0 { Pid::from_raw(raw) } else { None }
}

/// Waits until a descriptor is readable (a pidfd: its process has exited), at most until
/// `deadline`; tells whether it is.
pub fn wait_readable(fd: impl AsFd, deadline: std::time::Instant) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    loop {
        let left = deadline.saturating_duration_since(std::time::Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        let mut watched = [PollFd::new(&fd, PollFlags::IN)];
        match poll(&mut watched, Some(&timeout)) {
            Ok(n) => return n > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// Watches a descriptor that nothing else polls.
pub fn readable(fd: OwnedFd) -> io::Result<tokio::io::unix::AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd gives the same descriptor for as long as it lives, and closes it only when
    // it is dropped; AsyncFd deregisters it before that.
    unsafe {
        tokio::io::unix::AsyncFd::register_with_interest(fd, tokio::io::Interest::READABLE)
            .map_err(io::Error::from)
    }
}
