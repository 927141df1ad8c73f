//! The single checks. None of them changes anything.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use aegis_wire::worker::Probe;
use rustix::process::{Resource, getrlimit};

use super::{Check, Verdict};
use crate::home::{HOME_PATH_MAX, Home, sibling};
use crate::human;
use crate::setup::packages::{install_command, package_of};
use crate::setup::{image, kernel, tool};

/// Oldest QEMU whose machines and snapshots were measured.
const QEMU_LEAST: (u32, u32) = (7, 2);
/// Below this much free disk machines soon can't write, bytes.
const DISK_LOW: u64 = 10_000_000_000;
/// Below this nothing sensible works, bytes.
const DISK_LEAST: u64 = 500_000_000;
/// Below this much available memory only few machines run, bytes.
const MEMORY_LOW: u64 = 2_000_000_000;
/// One small machine and its daemon, bytes.
const MEMORY_LEAST: u64 = 400_000_000;
/// Files that a daemon with some hundred machines opens.
const FILES_WANTED: u64 = 4096;
/// Where the daemon listens unless it is told otherwise.
const DEFAULT_LISTEN: &str = "127.0.0.1:3000";

/// All checks, in the order in which one would mend them.
pub fn all(home: &Home) -> Vec<Check> {
    let mut checks = vec![program("aegisd"), inside("aegis-harness"), inside("aegis-mcp-guest")];
    checks.extend(worker());
    checks.push(program("aegis-image"));
    checks.push(qemu());
    checks.push(mke2fs());
    checks.push(guest_kernel(home));
    checks.push(base_image(home));
    checks.push(home_length(home));
    checks.push(disk(home));
    checks.push(memory());
    checks.push(port(home));
    checks.push(open_files());
    checks.push(Check {
        name: "network",
        verdict: Verdict::Note,
        found: "machines have no network device yet; a guest whose invite says canAccessInternet \
                has no network until the egress gateway is there"
            .into(),
        costs: None,
        fix: None,
    });
    checks
}

fn program(name: &'static str) -> Check {
    match sibling(name) {
        Ok(path) => Check::ok(name, path.display().to_string()),
        Err(failure) => Check::lack(
            name,
            Verdict::Missing,
            failure.to_string(),
            "nothing runs without it",
            "run `make build` and use dist/bin/aegis: all programs lie in one directory",
        ),
    }
}

/// A program that runs inside of machines, whatever their image is.
fn inside(name: &'static str) -> Check {
    let check = program(name);
    let Ok(path) = sibling(name) else { return check };
    match fs::read(&path).ok().and_then(|bytes| is_static(&bytes)) {
        Some(true) => check,
        found => Check::lack(
            name,
            Verdict::Missing,
            match found {
                Some(_) => "it needs shared libraries, and a machine has none when it starts",
                None => "it is no ELF program",
            },
            "no machine comes up",
            "run `make build`, which builds it static",
        ),
    }
}

/// Whether an ELF program needs no loader.
fn is_static(program: &[u8]) -> Option<bool> {
    let file = elf::ElfBytes::<elf::endian::LittleEndian>::minimal_parse(program).ok()?;
    let segments = file.segments()?;
    Some(!segments.iter().any(|segment| segment.p_type == elf::abi::PT_INTERP))
}

fn worker() -> Vec<Check> {
    let check = program("aegis-worker");
    let Ok(path) = sibling("aegis-worker") else { return vec![check] };
    match probe(&path) {
        Ok(probe) => {
            let mut checks = vec![check];
            checks.extend(probed(&probe));
            checks
        }
        Err(why) => vec![Check::lack(
            "aegis-worker",
            Verdict::Missing,
            format!("its probe failed: {why}"),
            "no machine runs",
            "run `make build`, so that all programs are of one version",
        )],
    }
}

fn probe(worker: &Path) -> Result<Probe, String> {
    let output = Command::new(worker)
        .arg("probe")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| e.to_string())?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{} {}", output.status, words.lines().last().unwrap_or_default()));
    }
    serde_json::from_slice(&output.stdout).map_err(|e| e.to_string())
}

fn probed(probe: &Probe) -> Vec<Check> {
    let because = |reason: &Option<String>| {
        reason.as_deref().map(|reason| format!(" ({reason})")).unwrap_or_default()
    };
    let accel = if probe.accel == "kvm" {
        Check::ok("KVM", "usable: machines run at the hardware's speed")
    } else {
        Check::lack(
            "KVM",
            Verdict::Warning,
            format!("not usable{}; machines run in software", because(&probe.accel_reason)),
            "just as isolated, but CPU work inside is several times slower",
            "use a host with virtualisation (in a cloud: one that allows nested VMs) and let your \
             user open /dev/kvm (group kvm)",
        )
    };
    let wanted = ["cpu", "memory", "pids"];
    let lacking: Vec<&str> =
        wanted.into_iter().filter(|limit| !probe.limits.iter().any(|have| have == limit)).collect();
    let cgroups = if lacking.is_empty() {
        Check::ok("cgroups", format!("{}: {} are enforced", probe.cgroups, wanted.join(", ")))
    } else {
        // CPU and memory are promises of an invite; the number of VMM threads is not.
        let verdict = if lacking == ["pids"] { Verdict::Warning } else { Verdict::Missing };
        Check::lack(
            "cgroups",
            verdict,
            format!("{}: {} can't be enforced", probe.cgroups, lacking.join(", ")),
            "machines are refused rather than run without their limits (machines.require_limits)",
            probe.limits_reason.clone().unwrap_or_else(|| "run aegisd as root".into()),
        )
    };
    let user = if probe.own_uid {
        Check::ok("VMM user", "each machine's VMM runs as a user of its own")
    } else {
        Check::lack(
            "VMM user",
            Verdict::Warning,
            "each machine's VMM runs as the daemon's user",
            "a guest that breaks out of its VMM has that user's rights",
            "run aegisd as root: its VMMs then get users of their own",
        )
    };
    vec![accel, cgroups, user]
}

fn not_installed(name: &'static str, program: &str, costs: &str) -> Check {
    let package = package_of(program).unwrap_or(program);
    Check::lack(
        name,
        Verdict::Missing,
        format!("{program} is not installed"),
        costs,
        format!("{} (or aegis setup --install)", install_command(&[package])),
    )
}

fn qemu() -> Check {
    const NAME: &str = "QEMU";
    const PROGRAM: &str = "qemu-system-x86_64";
    let Some(path) = tool::find(PROGRAM) else {
        return not_installed(NAME, PROGRAM, "no machine runs");
    };
    let asked = |arg: &[&str]| {
        tool::Tool::new(PROGRAM, arg)
            .and_then(tool::Tool::run)
            .map(|out| String::from_utf8_lossy(&out).into_owned())
    };
    let version = asked(&["--version"]).ok().as_deref().and_then(qemu_version);
    let microvm = asked(&["-machine", "help"]).is_ok_and(|list| {
        list.lines().any(|line| line.split_whitespace().next() == Some("microvm"))
    });
    match version {
        _ if !microvm => Check::lack(
            NAME,
            Verdict::Missing,
            format!("{} has no machine type microvm", path.display()),
            "no machine runs",
            format!("install a QEMU of {}.{} or later", QEMU_LEAST.0, QEMU_LEAST.1),
        ),
        Some(version) if version >= QEMU_LEAST => {
            Check::ok(NAME, format!("{}.{} ({})", version.0, version.1, path.display()))
        }
        found => Check::lack(
            NAME,
            Verdict::Warning,
            found.map_or("its version is unknown".into(), |(a, b)| format!("{a}.{b} is old")),
            "snapshots of golden machines were never tried with it",
            format!("install a QEMU of {}.{} or later", QEMU_LEAST.0, QEMU_LEAST.1),
        ),
    }
}

/// From `QEMU emulator version 7.2.22 (…)`.
fn qemu_version(text: &str) -> Option<(u32, u32)> {
    let version = text.split("version ").nth(1)?.split_whitespace().next()?;
    let mut numbers = version.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn mke2fs() -> Check {
    match tool::find("mke2fs") {
        Some(path) => Check::ok("mke2fs", path.display().to_string()),
        None => not_installed("mke2fs", "mke2fs", "machines get no disk, hence don't run"),
    }
}

fn guest_kernel(home: &Home) -> Check {
    const NAME: &str = "kernel";
    match (kernel::present(home), kernel::read_record(home)) {
        (Some(record), _) if record.format == "elf-pvh" => {
            Check::ok(NAME, format!("{}, {} modules", record.version, record.modules.len()))
        }
        (Some(record), _) => Check::lack(
            NAME,
            Verdict::Warning,
            format!("{} is a bzImage without PVH entry", record.version),
            "each golden machine's first boot takes some tenths of a second longer",
            "build the kernel with CONFIG_PVH=y",
        ),
        (None, found) => Check::lack(
            NAME,
            Verdict::Missing,
            match found {
                Some(_) => "its files are damaged",
                None => "there is none in the home",
            },
            "no machine runs",
            "aegis setup",
        ),
    }
}

fn base_image(home: &Home) -> Check {
    const NAME: &str = "base image";
    match image::present(home, image::BASE) {
        Some(record) => Check::ok(
            NAME,
            format!(
                "{}, {} packages, {}",
                record.suite,
                record.packages.len(),
                human::bytes(record.size)
            ),
        ),
        None => Check::lack(
            NAME,
            Verdict::Missing,
            "there is none in the home, or it is damaged",
            "no machine runs",
            "aegis setup",
        ),
    }
}

fn home_length(home: &Home) -> Check {
    const NAME: &str = "home";
    match home.check_length() {
        Ok(()) => Check::ok(NAME, home.root().display().to_string()),
        Err(failure) => Check::lack(
            NAME,
            Verdict::Missing,
            failure.to_string(),
            "sockets of machines can't be made",
            format!("choose a home of at most {HOME_PATH_MAX} bytes: --home DIR or AEGIS_HOME"),
        ),
    }
}

/// The nearest directory that exists, for a home that does not yet.
fn existing(path: &Path) -> PathBuf {
    path.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/")).to_owned()
}

fn disk(home: &Home) -> Check {
    const NAME: &str = "disk";
    let Ok(stat) = rustix::fs::statvfs(existing(home.root())) else {
        return Check::lack(
            NAME,
            Verdict::Warning,
            "the free space can't be read",
            "it may run out unseen",
            "look with df",
        );
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let found = format!("{} free", human::bytes(free));
    let verdict = match free {
        DISK_LOW.. => return Check::ok(NAME, found),
        DISK_LEAST.. => Verdict::Warning,
        _ => Verdict::Missing,
    };
    Check::lack(
        NAME,
        verdict,
        found,
        "disks are sparse: a host that runs full stops the writes of all machines",
        "make room, or put the home on a larger file system (--home, AEGIS_HOME)",
    )
}

fn memory() -> Check {
    const NAME: &str = "memory";
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let Some(free) = available(&info) else {
        return Check::lack(
            NAME,
            Verdict::Warning,
            "unknown",
            "it may run out unseen",
            "look at /proc/meminfo",
        );
    };
    let found = format!("{} available", human::bytes(free));
    let verdict = match free {
        MEMORY_LOW.. => return Check::ok(NAME, found),
        MEMORY_LEAST.. => Verdict::Warning,
        _ => Verdict::Missing,
    };
    Check::lack(NAME, verdict, found, "few machines fit", "end what is not needed, or add memory")
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

fn port(home: &Home) -> Check {
    const NAME: &str = "port";
    match TcpListener::bind(DEFAULT_LISTEN) {
        Ok(_) => Check::ok(NAME, format!("{DEFAULT_LISTEN} is free")),
        Err(_) if std::os::unix::net::UnixStream::connect(home.socket()).is_ok() => {
            Check::ok(NAME, format!("{DEFAULT_LISTEN} is taken, and this home's aegisd runs"))
        }
        Err(e) => Check::lack(
            NAME,
            Verdict::Warning,
            format!("{DEFAULT_LISTEN}: {e}"),
            "aegisd can't listen there",
            "choose another: aegis up --listen 127.0.0.1:PORT",
        ),
    }
}

fn open_files() -> Check {
    const NAME: &str = "open files";
    let limit = getrlimit(Resource::Nofile);
    // aegisd raises its own soft limit, so the hard one counts.
    match limit.maximum {
        Some(hard) if hard < FILES_WANTED => Check::lack(
            NAME,
            Verdict::Warning,
            format!("at most {hard}"),
            "with many machines or connections, new ones are refused",
            format!("raise the limit: ulimit -Hn {FILES_WANTED}, or LimitNOFILE= of the service"),
        ),
        Some(hard) => Check::ok(NAME, format!("up to {hard}")),
        None => Check::ok(NAME, "unlimited"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_memory_are_read() {
        let qemu = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright";
        assert_eq!(qemu_version(qemu), Some((7, 2)));
        assert_eq!(qemu_version("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert_eq!(qemu_version("something else"), None);
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:   2048 kB\n"), Some(2_097_152));
    }

    fn a_probe() -> Probe {
        Probe {
            generation: 1,
            accel: "tcg".into(),
            accel_reason: Some("/dev/kvm: no such file".into()),
            cgroups: "v1".into(),
            limits: vec!["cpu".into(), "memory".into(), "pids".into()],
            limits_reason: None,
            own_uid: true,
        }
    }

    #[test]
    fn software_emulation_is_said_with_its_price() {
        let checks = probed(&a_probe());
        assert_eq!(checks[0].verdict, Verdict::Warning);
        assert!(checks[0].found.contains("/dev/kvm: no such file"));
        assert!(checks[0].costs.as_deref().unwrap().contains("several times slower"));
        assert_eq!(checks[1].verdict, Verdict::Ok);
    }

    #[test]
    fn a_limit_that_cannot_be_held_stops_machines() {
        let mut probe = a_probe();
        probe.limits = vec!["pids".into(), "cpu".into()];
        assert_eq!(probed(&probe)[1].verdict, Verdict::Missing);
        probe.limits = vec!["memory".into(), "cpu".into()];
        assert_eq!(probed(&probe)[1].verdict, Verdict::Warning);
    }
}
