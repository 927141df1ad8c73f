//! QEMU: the arguments of a machine and the process that runs it.
//!
//! The golden machine and its clones must have the same devices in the same order; so one function
//! makes the arguments of both. Every file comes as an inherited descriptor: QEMU runs as a user
//! that could open none of them by its path.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::path::Path;
use std::process::{Command, Stdio};

use aegis_wire::channel::workspace::PORT;
use aegis_wire::link;
use aegis_wire::words::MemoryMb;
use anyhow::Context as _;
use tokio::net::UnixStream;

use crate::child::Child;
use crate::sys::{self, Confine, User};

/// Translation cache of software emulation, MiB: bounds what QEMU takes beside the machine.
const TRANSLATION_MB: u64 = 64;
/// What QEMU may take beside the machine's memory and its translation cache, MiB.
const OVERHEAD_MB: u64 = 128;
/// Name of the memory.
pub const MEMORY: &str = "m0";
/// Node name of the writable disk.
pub const DISK_NODE: &str = "b1";
/// First of the user ids that machines run as; the rest comes from the machine's id.
const UID_BASE: u32 = 1_900_000_000;
const UID_BITS: u32 = 27;
/// Address of every machine's card: it is alone on its link with the gateway.
const MAC: &str = "52:54:00:ae:91:05";
const KVM_DEVICE: &str = "/dev/kvm";

/// Limit of the memory of a machine's QEMU, bytes. Twice the machine's own: the kernel charges whoever
/// touches a page of golden memory first, beside the machine's own copy of it.
pub fn memory_limit(memory: MemoryMb) -> u64 {
    2 * memory.bytes() + beside_memory()
}

/// What a QEMU may take beside its machine's memory, bytes.
pub fn beside_memory() -> u64 {
    (TRANSLATION_MB + OVERHEAD_MB) << 20
}

/// How machines run on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Hardware.
    Kvm,
    /// Software emulation.
    Tcg,
}

/// What every machine of one golden snapshot has in common.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Hardware or software.
    pub engine: Engine,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Machine memory.
    pub memory: MemoryMb,
}

/// How a machine comes to life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Birth {
    /// Boots a kernel, into memory that a snapshot can be taken of.
    Golden {
        /// Rate of the host's time stamp counter, where the kernel must be told.
        tsc_khz: Option<u64>,
    },
    /// Takes over a snapshot; its memory is copied as it is written to.
    Clone,
    /// Goes on where it was suspended, with its memory from a file.
    Wake,
}

/// What a machine's process is given.
pub struct Parts {
    /// Golden memory, or the memory that becomes it; empty memory for one that brings its own.
    pub memory: OwnedFd,
    /// The read-only root.
    pub base: OwnedFd,
    /// The writable disk.
    pub disk: OwnedFd,
    /// What the disk lies over, where it is no whole one: the disk of a commit.
    pub under: Option<OwnedFd>,
    /// The kernel.
    pub kernel: OwnedFd,
    /// The first file system (golden only).
    pub initrd: Option<OwnedFd>,
    /// What was saved, inherited under the number that [`Vmm::state_fd`] tells (not golden).
    pub state: Option<OwnedFd>,
}

/// How the process is confined.
#[derive(Default)]
pub struct Cage {
    /// Opened cgroup files to join.
    pub cgroups: Vec<OwnedFd>,
    /// Run as this user and group id.
    pub uid: Option<u32>,
    /// Largest file that it can write, bytes.
    pub file_size_max: Option<u64>,
}

/// Our ends of a machine's ports.
pub struct Wires {
    /// The control channel's.
    pub ctl: UnixStream,
    /// That of messages about its workspace.
    pub workspace: UnixStream,
}

/// A running QEMU.
pub struct Vmm {
    /// The process.
    pub child: Child,
    /// Our ends of its two byte pipes.
    pub wires: Wires,
    /// Our end of the monitor.
    pub qmp: UnixStream,
    /// Our end of the machine's only link to anything: frames behind their length.
    pub net: OwnedFd,
    /// Number of the state's descriptor inside QEMU.
    pub state_fd: Option<RawFd>,
}

/// Numbers of the descriptors that the arguments name.
#[derive(Clone, Copy, Default)]
struct Numbers {
    ctl: RawFd,
    workspace: RawFd,
    qmp: RawFd,
    net: RawFd,
    memory: RawFd,
    base: RawFd,
    disk: RawFd,
    under: Option<RawFd>,
    kernel: RawFd,
    initrd: RawFd,
}

/// The arguments with all descriptors 0: part of a golden snapshot's key.
pub fn template(shape: Shape) -> Vec<String> {
    let zero = Numbers::default();
    let mut all = arguments(shape, Birth::Golden { tsc_khz: None }, zero);
    all.extend(arguments(shape, Birth::Clone, zero));
    all
}

/// Starts QEMU. Must be called on the main thread: the child dies with the thread that made it.
pub fn start(
    program: &Path,
    shape: Shape,
    birth: Birth,
    parts: Parts,
    cage: Cage,
) -> anyhow::Result<Vmm> {
    let (ctl, qemu_ctl) = socket_pair()?;
    let (workspace, qemu_workspace) = socket_pair()?;
    let (qmp, qemu_qmp) = socket_pair()?;
    let (net, qemu_net) = std::os::unix::net::UnixStream::pair()?;
    let (net, qemu_net) = (OwnedFd::from(net), OwnedFd::from(qemu_net));
    let numbers = Numbers {
        ctl: qemu_ctl.as_raw_fd(),
        workspace: qemu_workspace.as_raw_fd(),
        qmp: qemu_qmp.as_raw_fd(),
        net: qemu_net.as_raw_fd(),
        memory: parts.memory.as_raw_fd(),
        base: parts.base.as_raw_fd(),
        disk: parts.disk.as_raw_fd(),
        under: parts.under.as_ref().map(|fd| fd.as_raw_fd()),
        kernel: parts.kernel.as_raw_fd(),
        initrd: parts.initrd.as_ref().map_or(-1, |fd| fd.as_raw_fd()),
    };
    let state_fd = parts.state.as_ref().map(|fd| fd.as_raw_fd());
    let mut command = Command::new(program);
    command.args(arguments(shape, birth, numbers)).stdout(Stdio::null());
    let mut keep = vec![qemu_ctl, qemu_workspace, qemu_qmp, qemu_net];
    keep.extend([parts.memory, parts.base, parts.disk, parts.kernel]);
    keep.extend(parts.under);
    keep.extend(parts.initrd);
    keep.extend(parts.state);
    let groups = match shape.engine {
        Engine::Kvm => kvm_groups().map_err(anyhow::Error::msg)?,
        Engine::Tcg => Vec::new(),
    };
    sys::confine(
        &mut command,
        Confine {
            join: cage.cgroups,
            keep,
            user: cage.uid.map(|id| User { id, groups }),
            die_with_parent: true,
            harden: true,
            file_size_max: cage.file_size_max,
            ..Confine::default()
        },
    );
    let child =
        Child::spawn(command).with_context(|| format!("can't start {}", program.display()))?;
    Ok(Vmm { child, wires: Wires { ctl, workspace }, qmp, net, state_fd })
}

/// The user id that a machine's QEMU runs as, when this process may choose: the same for the same
/// name. Two machines share one by chance once in 2^27 pairs; they still can't reach each other,
/// as neither may trace, exec or open files.
pub fn own_uid(name: &str) -> Option<u32> {
    use sha2::Digest as _;
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let hash = sha2::Sha256::digest(name.as_bytes());
    let bits = u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]]) >> (32 - UID_BITS);
    Some(UID_BASE + bits)
}

/// Whether KVM works here, or why not.
pub fn kvm() -> Result<(), String> {
    if !hardware_virtualizes(&processor_flags()) {
        return Err("the processor shows neither vmx nor svm".to_owned());
    }
    let file = File::options()
        .read(true)
        .write(true)
        .open(KVM_DEVICE)
        .map_err(|e| format!("{KVM_DEVICE} can't be opened: {e}"))?;
    if rustix::process::geteuid().is_root() {
        kvm_groups()?;
    }
    sys::kvm_makes_machines(&file).map_err(|e| format!("{KVM_DEVICE} makes no machine: {e}"))
}

/// The device may be there, and even answer, where the processor can't run what it makes.
fn hardware_virtualizes(flags: &str) -> bool {
    flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm")
}

/// Flags of the first processor.
fn processor_flags() -> String {
    use std::io::BufRead as _;
    let Ok(file) = File::open("/proc/cpuinfo") else { return String::new() };
    let mut lines = io::BufReader::new(file).lines().map_while(Result::ok);
    lines.find(|line| line.starts_with("flags")).unwrap_or_default()
}

/// Groups that let a machine's own user open /dev/kvm: none where everybody may.
fn kvm_groups() -> Result<Vec<u32>, String> {
    use std::os::unix::fs::MetadataExt as _;
    let meta = std::fs::metadata(KVM_DEVICE).map_err(|e| format!("{KVM_DEVICE}: {e}"))?;
    if meta.mode() & 0o006 == 0o006 {
        return Ok(Vec::new());
    }
    if meta.mode() & 0o060 == 0o060 && meta.gid() != 0 {
        return Ok(vec![meta.gid()]);
    }
    Err(format!(
        "{KVM_DEVICE} is for root alone: chgrp kvm {KVM_DEVICE} && chmod 0660 {KVM_DEVICE}"
    ))
}

fn socket_pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((UnixStream::from_std(ours)?, OwnedFd::from(theirs)))
}

fn arguments(shape: Shape, birth: Birth, fd: Numbers) -> Vec<String> {
    let Shape { engine, vcpus, memory } = shape;
    let share = if birth == Birth::Clone { "off" } else { "on" };
    let mut args: Vec<String> = Vec::with_capacity(64);
    let mut add = |words: &[&str]| args.extend(words.iter().map(|w| (*w).to_owned()));
    // A guest that resets is gone: its next life would be a boot that nobody asked for.
    add(&["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    add(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    match engine {
        Engine::Kvm => add(&["-accel", "kvm", "-cpu", "host"]),
        Engine::Tcg => {
            let accel = format!("tcg,tb-size={TRANSLATION_MB}");
            // `rep movsb` and SMAP are slow in software.
            add(&["-accel", &accel, "-cpu", "max,-erms,-fsrm,-smap"]);
        }
    }
    add(&["-smp", &vcpus.to_string(), "-m", &format!("{}M", memory.0)]);
    add(&["-M", &format!("microvm,acpi=on,isa-serial=off,memory-backend={MEMORY}")]);
    let (size, path) = (memory.0, number_path(fd.memory));
    add(&[
        "-object",
        &format!("memory-backend-file,id={MEMORY},size={size}M,mem-path={path},share={share}"),
    ]);
    add(&["-global", "virtio-mmio.force-legacy=false"]);
    add(&["-chardev", &format!("socket,id=ctl,fd={}", fd.ctl)]);
    add(&["-chardev", &format!("socket,id=ws,fd={}", fd.workspace)]);
    add(&["-device", "virtio-serial-device,max_ports=3"]);
    add(&["-device", "virtserialport,chardev=ctl,name=ctl,nr=1,id=ctlport"]);
    let port = format!("virtserialport,chardev=ws,name={PORT},nr=2,id=wsport");
    add(&["-device", &port]);
    add(&["-chardev", &format!("socket,id=qmp,fd={}", fd.qmp), "-mon", "chardev=qmp,mode=control"]);
    let backend = format!("stream,id=n0,server=off,addr.type=fd,addr.str={}", fd.net);
    add(&["-netdev", &backend]);
    // Few large packets make it fast: no checksum or segment is left to hardware here. Who goes on from
    // a snapshot is new to nobody on its link: there is no one but the gateway to announce itself to.
    let card = format!(
        "virtio-net-device,id=net0,netdev=n0,mac={MAC},host_mtu={},guest_announce=off",
        link::MTU
    );
    add(&["-device", &card]);
    // A guest may drain 1 MiB/s of the host's randomness, no more.
    add(&["-object", "rng-builtin,id=rng0"]);
    add(&["-device", "virtio-rng-device,rng=rng0,max-bytes=1048576,period=1000"]);
    let base = number_path(fd.base);
    add(&[
        "-blockdev",
        &format!("driver=raw,node-name=b0,read-only=on,file.driver=file,file.filename={base}"),
    ]);
    add(&["-device", "virtio-blk-device,drive=b0,serial=base"]);
    let disk = number_path(fd.disk);
    let disk = format!(
        "node-name={DISK_NODE},discard=unmap,detect-zeroes=unmap,file.driver=file,\
         file.filename={disk}"
    );
    let disk = match fd.under.map(number_path) {
        None => format!("driver=raw,{disk}"),
        // Nothing in the file says what it lies over: only this does.
        Some(under) => format!(
            "driver=qcow2,{disk},backing.driver=raw,backing.read-only=on,\
             backing.file.driver=file,backing.file.filename={under}"
        ),
    };
    add(&["-blockdev", &disk]);
    add(&["-device", &format!("virtio-blk-device,drive={DISK_NODE},serial=disk")]);
    add(&["-kernel", &number_path(fd.kernel)]);
    match birth {
        Birth::Golden { tsc_khz } => {
            add(&["-initrd", &number_path(fd.initrd)]);
            add(&["-append", &kernel_command_line(engine, tsc_khz)]);
        }
        Birth::Clone | Birth::Wake => add(&["-incoming", "defer"]),
    }
    args
}

fn number_path(fd: RawFd) -> String {
    format!("/proc/self/fd/{fd}")
}

/// What nobody inside has a use for is left out: under software emulation each clone translates anew
/// all kernel code that it runs. So of Linux's security modules only those that programs ask for; no
/// accounting of pressure; no watchdogs, which would only bark after a machine was suspended.
///
/// The local APIC's timer stays on: its calibration costs the golden boot 0.3 s once, and every
/// idle clone saves four fifths of its idle CPU.
fn kernel_command_line(engine: Engine, tsc_khz: Option<u64>) -> String {
    let mut line = "quiet no_timer_check noreplace-smp init_on_alloc=0 nokaslr \
                    cryptomgr.notests audit=0 lsm=landlock,yama psi=0 nowatchdog panic=-1"
        .to_owned();
    if engine == Engine::Tcg {
        // Emulated code does not speculate; on hardware the guest's own mitigations stay on.
        // Its ticks come late, and by them the kernel judges the one good clock there is.
        line.push_str(" mitigations=off tsc=reliable");
    }
    if let Some(khz) = tsc_khz {
        // Without it the Debian kernel hangs in 7 to 22 % of software-emulated boots.
        line.push_str(&format!(" tsc_early_khz={khz}"));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_and_clone_have_the_same_devices() {
        let shape = Shape { engine: Engine::Tcg, vcpus: 2, memory: MemoryMb(512) };
        let devices = |birth| {
            let args = arguments(shape, birth, Numbers::default());
            let at = args.iter().enumerate().filter(|(_, a)| *a == "-device");
            at.map(|(i, _)| args[i + 1].clone()).collect::<Vec<_>>()
        };
        let golden = devices(Birth::Golden { tsc_khz: Some(1) });
        assert_eq!(golden, devices(Birth::Clone));
        assert_eq!(golden, devices(Birth::Wake));
        assert_eq!(golden.len(), 7);
        assert!(!golden.iter().any(|d| d.contains("balloon")), "corrupts what clones share");
    }

    #[test]
    fn a_device_alone_is_no_kvm() {
        assert!(hardware_virtualizes("flags\t\t: fpu vmx sse"));
        assert!(!hardware_virtualizes("flags\t\t: fpu vmx_fake sse"));
    }

    #[test]
    fn clones_never_share_their_memory() {
        let shape = Shape { engine: Engine::Kvm, vcpus: 1, memory: MemoryMb(256) };
        let args = arguments(shape, Birth::Clone, Numbers::default()).join(" ");
        assert!(args.contains("share=off") && !args.contains("share=on"));
        assert!(args.contains("spawn=deny") && args.contains("-cpu host"));
        let line = kernel_command_line(Engine::Kvm, None);
        assert!(!line.contains("mitigations"), "hardware speculates");
    }
}
