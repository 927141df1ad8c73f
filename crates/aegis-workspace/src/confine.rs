//! What this process may touch: one folder. All of it is in force before the first byte of the
//! machine is read.
//!
//! Several walls, each of which would do: names are looked up so that they lead nowhere else
//! (`nodes.rs`); the folder is the root of a mount namespace with nothing else in it; landlock allows
//! nothing outside of it; and no right of root is left, only those of the folder's owner.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;

use anyhow::Context as _;
use landlock::{
    ABI, Access as _, AccessFs, CompatLevel, Compatible as _, PathBeneath, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _,
};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change,
    mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, UnshareFlags, remove_capability_from_bounding_set,
    set_capabilities,
};

use crate::nodes::{self, Key};
use crate::{serve, sys};

/// Open files, where the host lets it have as many.
const FILES_MAX: u64 = 24 * 1024;

/// Where a process finds its own descriptors.
const DESCRIPTORS: &str = "/proc/self/fd";

/// What is left to a confined process.
pub struct Confined {
    /// The folder.
    pub root: OwnedFd,
    /// `/proc/self/fd`.
    pub descriptors: OwnedFd,
    /// Open files that it may have.
    pub files: usize,
}

/// Confines this process, which has one thread yet, to a folder.
///
/// # Errors
/// Whatever can't be had where it should: then nothing is lent.
pub fn confine(folder: OwnedFd, read_only: bool) -> anyhow::Result<Confined> {
    let as_root = rustix::process::geteuid().is_root();
    let owner = nodes::stat(&folder).context("the folder")?;
    let files = limits()?;
    let (root, descriptors) = match enclose(&folder, as_root, read_only) {
        Ok(both) => both,
        Err(error) if as_root => return Err(error.context("a root of its own")),
        Err(error) => {
            // Who is not root may not be let to: the other walls stand.
            tracing::info!(error = format!("{error:#}"), "no mount namespace");
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let descriptors = rustix::fs::open(DESCRIPTORS, flags, Mode::empty());
            (folder, descriptors.context("/proc is needed")?)
        }
    };
    let owner = as_root.then_some((owner.stx_uid, owner.stx_gid));
    give_up_rights(owner).context("rights")?;
    rustix::thread::set_no_new_privs(true).context("privileges")?;
    rustix::process::umask(Mode::empty());
    landlocked(&root).context("landlock")?;
    Ok(Confined { root, descriptors, files })
}

fn limits() -> anyhow::Result<usize> {
    let set = |what, to| {
        setrlimit(what, Rlimit { current: Some(to), maximum: Some(to) }).context("a limit")
    };
    set(Resource::Core, 0)?;
    let most = getrlimit(Resource::Nofile).maximum.unwrap_or(FILES_MAX);
    // Root may give itself more than it has.
    let files = if set(Resource::Nofile, FILES_MAX).is_ok() { FILES_MAX } else { most };
    set(Resource::Nofile, files)?;
    Ok(usize::try_from(files).unwrap_or(usize::MAX))
}

/// Makes the folder, and nothing that is mounted below it, the root of this process. The way to the
/// process's own descriptors is a tree by itself.
fn enclose(folder: &OwnedFd, as_root: bool, read_only: bool) -> anyhow::Result<(OwnedFd, OwnedFd)> {
    let mut apart = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC;
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    if !as_root {
        apart |= UnshareFlags::NEWUSER;
    }
    sys::unshare(apart).context("unshare")?;
    if !as_root {
        std::fs::write("/proc/self/setgroups", "deny")?;
        std::fs::write("/proc/self/uid_map", format!("{0} {0} 1", uid.as_raw()))?;
        std::fs::write("/proc/self/gid_map", format!("{0} {0} 1", gid.as_raw()))?;
    }
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).context("private mounts")?;
    let clone = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let here = again(folder).context("the folder again")?;
    let tree = open_tree(&here, "", clone).context("open_tree")?;
    let descriptors = open_tree(CWD, DESCRIPTORS, clone - OpenTreeFlags::AT_EMPTY_PATH)
        .context("/proc is needed")?;
    // Anywhere will do, since nothing else stays: a directory that every host has.
    move_mount(&tree, "", CWD, "/proc", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .context("move_mount")?;
    rustix::process::fchdir(&tree)?;
    rustix::process::pivot_root(".", ".").context("pivot_root")?;
    unmount(".", UnmountFlags::DETACH).context("unmount")?;
    rustix::process::chdir("/")?;
    let mut quiet = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    if read_only {
        quiet |= MountFlags::RDONLY;
    }
    mount_remount("/", quiet, c"").context("remount")?;
    Ok((serve::open(Path::new("/"))?, descriptors))
}

/// Opens the folder in the mount namespace of now: the descriptor is of the one that was left.
fn again(folder: &OwnedFd) -> anyhow::Result<OwnedFd> {
    let path = std::fs::read_link(format!("/proc/self/fd/{}", folder.as_raw_fd()))?;
    let here = serve::open(&path)?;
    let same = Key::of(&nodes::stat(&here)?) == Key::of(&nodes::stat(folder)?);
    anyhow::ensure!(same, "it is another one by now");
    Ok(here)
}

/// Keeps no right beyond those of a user: the folder's owner, where this process may choose. In a user
/// namespace of its own it has all of root's until here.
fn give_up_rights(owner: Option<(u32, u32)>) -> anyhow::Result<()> {
    for bit in 0..u64::BITS {
        // Those that this kernel does not know can't be taken away.
        let _ = remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit));
    }
    if let Some((uid, gid)) = owner {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    }
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    Ok(())
}

/// A kernel that has no landlock, or an older one, does what it can.
fn landlocked(root: &OwnedFd) -> anyhow::Result<()> {
    let all = AccessFs::from_all(ABI::V3);
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .create()?
        .add_rule(PathBeneath::new(root.as_fd(), all))?
        .restrict_self()?;
    Ok(())
}
