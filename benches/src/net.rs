//! The gateway beside QEMU's own user networking: the same machine, image and programs, one after the
//! other in one run; only the other end of the link differs.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt as _;

use aegis_tests::house::House;
use aegis_tests::outside::{ECHO, Outside, SINK, SOURCE};
use serde_json::json;

use crate::figures::Figures;

/// Bytes of one transfer, and how many there are.
const BYTES: u64 = 256 << 20;
const TRANSFERS: usize = 5;
/// Round trips.
const TRIPS: usize = 1000;

const QEMU: &str = "/usr/bin/qemu-system-x86_64";

/// Runs inside: MiB/s up, MiB/s down, and milliseconds of one round trip, in lines.
const CLIENT: &str = r#"
import socket, sys, time
host, total, transfers, trips = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
def open(port):
    s = socket.create_connection((host, port))
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return s
chunk = bytearray(1 << 20)
for _ in range(transfers):
    s = open(SINK)
    began = time.monotonic()
    for _ in range(total >> 20):
        s.sendall(chunk)
    s.shutdown(socket.SHUT_WR)
    s.recv(64)
    print("up", (total >> 20) / (time.monotonic() - began), flush=True)
    s.close()
for _ in range(transfers):
    s = open(SOURCE)
    got, began = 0, time.monotonic()
    while got < total:
        got += s.recv_into(chunk)
    print("down", (total >> 20) / (time.monotonic() - began), flush=True)
    s.close()
s = open(ECHO)
for _ in range(trips):
    began = time.monotonic()
    s.sendall(b"x" * 64)
    left = 64
    while left:
        left -= len(s.recv(64))
    print("trip", (time.monotonic() - began) * 1e3)
for _ in range(50):
    began = time.monotonic()
    open(ECHO).close()
    print("connect", (time.monotonic() - began) * 1e3)
"#;

/// What one kind of link does.
struct Measured {
    up: f64,
    down: f64,
    trip: f64,
}

/// Measures both.
pub fn measure(figures: &mut Figures) {
    let outside = Outside::new();
    let ours = one(figures, &outside, "gateway", QEMU);
    let dir = tempfile::tempdir().unwrap();
    // The same arguments, but for the link's other end: it is no part of a snapshot.
    let wrapper = dir.path().join("qemu-user-networking");
    let script = format!(
        "#!/bin/bash\nargs=()\nfor arg in \"$@\"; do\n  case $arg in\n    stream,id=n0,*) \
         arg=user,id=n0,net=172.16.0.0/24,host=172.16.0.1,dns=172.16.0.3,restrict=off ;;\n    \
         virtio-net-device,*) arg=${{arg/host_mtu=65520/host_mtu=1500}} ;;\n  esac\n  \
         args+=(\"$arg\")\ndone\nexec {QEMU} \"${{args[@]}}\"\n"
    );
    std::fs::write(&wrapper, script).unwrap();
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(&wrapper, Permissions::from_mode(0o755)).unwrap();
    let theirs = one(figures, &outside, "QEMU user", wrapper.to_str().unwrap());
    figures.one("upload, gateway / QEMU user networking", ours.up / theirs.up, "times");
    figures.one("download, gateway / QEMU user networking", ours.down / theirs.down, "times");
    figures.one("round trip, gateway / QEMU user networking", ours.trip / theirs.trip, "times");
}

fn one(figures: &mut Figures, outside: &Outside, name: &str, qemu: &str) -> Measured {
    let house = House::new(&format!("[machines]\nqemu = \"{qemu}\"\n"));
    let body = json!({"command": ["sleep", "infinity"], "vcpus": 1, "memory_mb": 512,
        "disk_gb": 0.5, "idle_policy": "leave-running"});
    let id = house.socket().post("/v1/instances", &body).expect(201)["id"].clone();
    let id = id.as_str().unwrap();
    house.until_instance(id, "running");
    let client = CLIENT
        .replace("SINK", &SINK.to_string())
        .replace("SOURCE", &SOURCE.to_string())
        .replace("ECHO", &ECHO.to_string());
    let script = format!(
        "cat > /tmp/c.py <<'END'\n{client}\nEND\npython3 /tmp/c.py {} {BYTES} {TRANSFERS} {TRIPS}",
        outside.v4()
    );
    let ran = house.sh(id, &script);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let of = |what: &str| -> Vec<f64> {
        let text = ran.text();
        let lines = text.lines().filter_map(|line| line.strip_prefix(what)?.trim().parse().ok());
        lines.collect()
    };
    let rates = |figures: &mut Figures, what: &str| {
        let mut all = of(what);
        all.sort_by(f64::total_cmp);
        let median = all[all.len() / 2];
        figures.one(&format!("{what}load through {name}, 1 connection"), median, "MiB/s");
        median
    };
    let (up, down) = (rates(figures, "up"), rates(figures, "down"));
    let trip = figures.samples(&format!("round trip of 64 bytes through {name}"), of("trip"));
    figures.samples(&format!("connect through {name}"), of("connect"));
    Measured { up, down, trip }
}
