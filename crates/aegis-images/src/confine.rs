//! What a job may touch: one directory, and the network. It reads what strangers wrote, so all of
//! this is in force before the first byte comes.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, chown};
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use landlock::{
    ABI, Access as _, AccessFs, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _,
    RulesetCreatedAttr as _, path_beneath_rules,
};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use rustix::thread::{Gid, Uid};

/// Whom a job runs as, where root starts it; machines have the numbers above.
const USER: u32 = 1_899_999_999;
/// Address space: the tree of the largest image that is taken, and what its unpacking takes.
const MEMORY: u64 = 3 << 30;
/// Open files.
const FILES: u64 = 256;
/// CPU time.
pub const CPU: Duration = Duration::from_secs(3600);
/// What a file may have besides an image's bytes.
const FILE_MARGIN: u64 = 64 << 20;
/// Names, certificates and libraries.
const READ: [&str; 8] = [
    "/etc",
    "/usr",
    "/lib",
    "/lib64",
    "/var/lib/ca-certificates",
    "/run/systemd/resolve",
    "/dev/null",
    "/dev/urandom",
];

/// Confines this process, which has one thread yet, to a directory, and makes that its working
/// directory.
///
/// # Errors
/// Whatever can't be had where it should: then the job is not done.
pub fn confine(dir: &Path, bytes_max: u64) -> anyhow::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(e).context("no directory");
        }
        _ => {}
    }
    let root = rustix::process::geteuid().is_root();
    if root {
        chown(dir, Some(USER), Some(USER)).context("the directory's owner")?;
    }
    std::env::set_current_dir(dir).context("the directory")?;
    lower(Resource::Core, 0)?;
    lower(Resource::Nofile, FILES)?;
    lower(Resource::As, MEMORY)?;
    lower(Resource::Cpu, CPU.as_secs())?;
    lower(Resource::Fsize, bytes_max.saturating_add(FILE_MARGIN))?;
    if root {
        let (uid, gid) = (Uid::from_raw(USER), Gid::from_raw(USER));
        rustix::thread::set_thread_groups(&[]).context("groups")?;
        rustix::thread::set_thread_res_gid(gid, gid, gid).context("group")?;
        rustix::thread::set_thread_res_uid(uid, uid, uid).context("user")?;
    }
    rustix::thread::set_no_new_privs(true).context("privileges")?;
    // After the change of user, which clears it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("parent")?;
    landlocked().context("landlock")
}

fn lower(what: Resource, to: u64) -> anyhow::Result<()> {
    let least = |limit: Option<u64>| Some(limit.map_or(to, |limit| limit.min(to)));
    let now = getrlimit(what);
    let limit = Rlimit { current: least(now.maximum), maximum: least(now.maximum) };
    setrlimit(what, limit).context("a limit")
}

/// A kernel that has no landlock, or an older one, does what it can.
fn landlocked() -> anyhow::Result<()> {
    let all = AccessFs::from_all(ABI::V3);
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .create()?
        .add_rules(path_beneath_rules(READ, AccessFs::from_read(ABI::V3)))?
        .add_rules(path_beneath_rules(["."], all))?
        .restrict_self()?;
    Ok(())
}
