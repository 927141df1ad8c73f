//! `quiesce`: a rehearsal in the golden machine. What it reads stays in memory and is there in
//! every clone; what it mounts is unmounted, but for the base.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use aegis_wire::channel::Warm;
use aegis_wire::channel::rpc::RpcError;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind_recursive, unmount};
use rustix::process::Signal;

use crate::calls::internal;
use crate::disks::{self, Disks};
use crate::machine::Machine;
use crate::note::note;
use crate::process::{Wish, environment};
use crate::root;

/// Time for the disks of a machine that just booted to show up.
const DISK_DEADLINE: Duration = Duration::from_secs(10);
/// Time for one rehearsed command; more under software emulation than anywhere else.
const COMMAND_DEADLINE: Duration = Duration::from_secs(10);
/// Time for all of them.
const ALL_DEADLINE: Duration = Duration::from_secs(45);
/// What a guest is likely to run first.
const COMMANDS: [&[&str]; 12] = [
    &["/bin/true"],
    &["sh", "-c", "echo hello; exit 0"],
    &["bash", "-lc", "echo hello | cat; exit 0"],
    &["ls", "-l", "/"],
    &["uname", "-a"],
    &["id"],
    &["env"],
    &["sleep", "0"],
    &["df", "-h", "/"],
    &["ps", "aux"],
    &["cat", "/etc/os-release", "/proc/meminfo", "/proc/cpuinfo"],
    &["python3", "-c", "import http.server, json, os, re, socket, ssl, subprocess, threading"],
];

/// So many of them are run again in every spare.
const COMMANDS_AGAIN: usize = 2;

/// Makes the golden machine ready for its snapshot. Only a base that can't be mounted is an
/// error: all else merely costs the clones some time.
pub async fn quiesce(machine: &Arc<Machine>) -> Result<(), RpcError> {
    let based = machine.begin_quiesce()?;
    let disks = match based {
        Some(disks) => disks,
        None => {
            let found = machine.uevents.until(DISK_DEADLINE, disks::find).await;
            let disks = found.ok_or_else(|| internal(&io::Error::other("a disk is missing")))?;
            let mounting = disks.clone();
            let mount = move || {
                mounting.base.simplify();
                mounting.own.simplify();
                root::mount_base(&mounting)
            };
            let mounted = machine.hands.run(mount).await;
            mounted.and_then(|done| done).map_err(|e| internal(&e))?;
            machine.base_is_mounted(disks.clone());
            disks
        }
    };
    if let Err(e) = rehearse(machine, disks).await {
        note(&format!("rehearsal: {e}"));
    }
    if let Some(cage) = &machine.starter.cage
        && let Err(e) = cage.limit_memory()
    {
        note(&format!("memory limit: {e}"));
    }
    machine.hands.run(rustix::fs::sync).await.map_err(|e| internal(&e))
}

/// What a spare does while nobody waits for it: a first command and the mounts, as they come after
/// its identity. Under software emulation all code is translated anew in each clone.
pub async fn again(machine: &Arc<Machine>, ask: Warm) -> Result<(), RpcError> {
    let failed = |text: &str| internal(&io::Error::other(text.to_owned()));
    let disks = machine.begin_quiesce()?.ok_or_else(|| failed("it was never made ready"))?;
    let sized = || (disks.own.bytes() == ask.disk_bytes).then_some(());
    if machine.uevents.until(DISK_DEADLINE, sized).await.is_none() {
        return Err(failed("the disk did not get its size"));
    }
    perform(machine, disks, &COMMANDS[..COMMANDS_AGAIN]).await.map_err(|e| internal(&e))
}

async fn rehearse(machine: &Arc<Machine>, disks: Disks) -> io::Result<()> {
    let node = disks.own.node.to_string_lossy().into_owned();
    let format = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^resize_inode", &node];
    let mut commands: Vec<&[&str]> = vec![&format];
    commands.extend(COMMANDS);
    perform(machine, disks, &commands).await
}

/// Runs commands on a root like the later one, and mounts the disk as it will be mounted.
async fn perform(machine: &Arc<Machine>, disks: Disks, commands: &[&[&str]]) -> io::Result<()> {
    machine.hands.run(raise_stage).await??;
    let all = async {
        for command in commands {
            run(machine, command).await;
        }
    };
    let _ = tokio::time::timeout(ALL_DEADLINE, all).await;
    // Nobody may hold on to what is unmounted now.
    crate::sys::signal_everybody(libc::SIGKILL);
    let _ = tokio::time::timeout(COMMAND_DEADLINE, machine.starter.reaper.alone()).await;
    machine.hands.run(strike_stage).await??;
    machine.hands.run(move || rehearse_disk(&disks)).await?
}

/// A root like the later one, with a disk in memory.
fn raise_stage() -> io::Result<()> {
    fs::create_dir_all(root::OWN)?;
    mount("stage", root::OWN, "tmpfs", MountFlags::empty(), None::<&CStr>)?;
    root::make_layers()?;
    root::mount_layers()?;
    for name in ["proc", "dev"] {
        mount_bind_recursive(format!("/{name}"), Path::new(root::ROOT).join(name))?;
    }
    Ok(())
}

fn strike_stage() -> io::Result<()> {
    unmount(root::ROOT, UnmountFlags::DETACH)?;
    Ok(unmount(root::OWN, UnmountFlags::empty())?)
}

/// Mounts the placeholder disk as the later one will be, and unmounts it: a snapshot must not
/// contain a file system that others change.
fn rehearse_disk(disks: &Disks) -> io::Result<()> {
    root::mount_own(disks)?;
    let layered = root::mount_layers();
    if layered.is_ok() {
        let _ = fs::write(Path::new(root::ROOT).join("rehearsal"), "x");
        unmount(root::ROOT, UnmountFlags::empty())?;
    }
    unmount(root::OWN, UnmountFlags::empty())?;
    layered
}

async fn run(machine: &Arc<Machine>, command: &[&str]) {
    let wish = Wish {
        command: command.iter().map(|word| (*word).to_owned()).collect(),
        environment: environment(),
        directory: "/".to_owned(),
        user: None,
    };
    // A base without this program has other first commands.
    let started = machine.starter.start_quiet(&wish, Path::new(root::ROOT)).await;
    let Ok(mut child) = started else { return };
    if tokio::time::timeout(COMMAND_DEADLINE, &mut child.exit).await.is_err() {
        machine.starter.reaper.signal_group(child.pid, Signal::KILL);
    }
}
