//! cgroups as texts, and as this host has them.

use super::*;

const HYBRID: &str = "\
35 24 0:30 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
36 35 0:31 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
37 35 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
38 35 0:33 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
39 35 0:34 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

#[test]
fn trees_are_found() {
    let host = Host::parse(HYBRID, "0::/x\n");
    let group = host.places("aegis/a1/inst-1").unwrap();
    assert_eq!(host.name(), "v1");
    assert_eq!(
        group.directories,
        [
            "/sys/fs/cgroup/cpu,cpuacct/aegis/a1/inst-1",
            "/sys/fs/cgroup/memory/aegis/a1/inst-1",
            "/sys/fs/cgroup/pids/aegis/a1/inst-1",
        ]
        .map(PathBuf::from)
    );
    let pure = "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n";
    let host = Host::parse(pure, "0::/system.slice/aegisd.service\n");
    assert_eq!(
        host,
        Host::V2(vec![
            "/sys/fs/cgroup".into(),
            "/sys/fs/cgroup/system.slice".into(),
            "/sys/fs/cgroup/system.slice/aegisd.service".into(),
        ])
    );
    assert_eq!(Host::parse("", ""), Host::None);
}

#[test]
fn names_lead_nowhere_else() {
    for bad in ["", "/aegis", "../x", "aegis/../../x", "a/./../b"] {
        assert!(Host::None.places(bad).is_err(), "{bad}");
    }
}

#[test]
fn quotas_keep_within_the_kernels_bounds() {
    assert_eq!(quota(CpuMillis(1500)), (30_000, 20_000));
    assert_eq!(quota(CpuMillis(50)), (1000, 20_000));
    assert_eq!(quota(CpuMillis(10)), (1000, 100_000));
    assert_eq!(quota(CpuMillis(0)), (1000, 1_000_000));
}

#[test]
fn hosts_without_cgroups_are_told_what_to_do() {
    let limits = Limits { memory_bytes: 1 << 30, pids: 256 };
    let text = Host::None.make("aegis/x", limits).unwrap_err().to_string();
    assert!(text.contains("Delegate=yes"), "{text}");
}

/// On the host's own cgroups, whatever they are, where this user may make some.
#[test]
fn groups_hold_measure_and_end() {
    let name = format!("aegis/test-{}/inst", rustix::process::getpid().as_raw_nonzero());
    let limits = Limits { memory_bytes: 64 << 20, pids: 8 };
    let Ok(group) = Host::detect().make(&name, limits) else { return };
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "sleep 1000 & sleep 1000 & i=0; while :; do i=$((i+1)); done"]);
    let join = group.doors().unwrap();
    sys::confine(&mut command, sys::Confine { join, ..sys::Confine::default() });
    let mut child = command.spawn().unwrap();
    group.set_quota(CpuMillis(500)).unwrap();
    assert!(group.processes().contains(&i32::try_from(child.id()).unwrap()));
    assert!(!group.remove(Instant::now()).is_empty(), "somebody is in it");
    let deadline = Instant::now() + Duration::from_secs(5);
    assert!(group.kill(deadline) && group.processes().is_empty());
    child.wait().unwrap();
    assert!(group.cpu_ns().unwrap() > 0 && !group.out_of_memory());
    assert_eq!(group.remove(deadline), Vec::<String>::new());
    assert!(group.gone());
}
