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

/// A machine on one kind of link.
struct Machine {
    name: &'static str,
    house: House,
    id: String,
    /// What it said, line by line.
    said: String,
}

/// What one kind of link does.
struct Measured {
    up: f64,
    down: f64,
    trip: f64,
}

/// Measures both, in turns: what else the host does meanwhile is shared.
pub fn measure(figures: &mut Figures) {
    let outside = Outside::new();
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
    for path in [dir.path(), &wrapper] {
        std::fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }
    let mut both =
        [start("gateway", QEMU), start("QEMU user networking", wrapper.to_str().unwrap())];
    for _ in 0..TRANSFERS {
        for machine in &mut both {
            let run = format!("python3 /tmp/c.py {} {BYTES} 1 {TRIPS}", outside.v4());
            let ran = machine.house.sh(&machine.id, &run);
            assert_eq!(ran.code, Some(0), "{ran:?}");
            machine.said += &(ran.text() + "\n");
        }
    }
    let [ours, theirs] = both.map(|machine| machine.sum_up(figures));
    let mut ratio = |what: &str, of: f64, to: f64| {
        figures.one(&format!("{what}, gateway / QEMU user networking"), of / to, "times");
    };
    ratio("upload", ours.up, theirs.up);
    ratio("download", ours.down, theirs.down);
    ratio("round trip", ours.trip, theirs.trip);
}

fn start(name: &'static str, qemu: &str) -> Machine {
    let house = House::new(&format!("[machines]\nqemu = \"{qemu}\"\n"));
    let body = json!({"command": ["sleep", "infinity"], "vcpus": 1, "memory_mb": 512,
        "disk_gb": 0.5, "idle_policy": "leave-running"});
    let id = house.socket().post("/v1/instances", &body).expect(201)["id"].clone();
    let id = id.as_str().unwrap().to_owned();
    house.until_instance(&id, "running");
    let client = CLIENT
        .replace("SINK", &SINK.to_string())
        .replace("SOURCE", &SOURCE.to_string())
        .replace("ECHO", &ECHO.to_string());
    let ran = house.sh(&id, &format!("cat > /tmp/c.py <<'END'\n{client}\nEND"));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    Machine { name, house, id, said: String::new() }
}

impl Machine {
    fn samples(&self, what: &str) -> Vec<f64> {
        let lines = self.said.lines();
        lines.filter_map(|line| line.strip_prefix(what)?.trim().parse().ok()).collect()
    }

    fn rate(&self, figures: &mut Figures, what: &str) -> f64 {
        let mut all = self.samples(what);
        all.sort_by(f64::total_cmp);
        let median = all[all.len() / 2];
        let name = format!("{what}load through {}, 1 connection", self.name);
        figures.one(&name, median, "MiB/s");
        median
    }

    fn sum_up(self, figures: &mut Figures) -> Measured {
        let (up, down) = (self.rate(figures, "up"), self.rate(figures, "down"));
        let trip = format!("round trip of 64 bytes through {}", self.name);
        let trip = figures.samples(&trip, self.samples("trip"));
        figures.samples(&format!("connect through {}", self.name), self.samples("connect"));
        Measured { up, down, trip }
    }
}
