//! Input of commands, and the same bytes by `aegis cp` beside it.

use std::fs::File;
use std::process::{Command, Stdio};
use std::time::Instant;

use aegis_tests::house::House;
use aegis_tests::programs;
use serde_json::json;

use crate::figures::Figures;

const ROUNDS: usize = 5;
const BYTES: u64 = 100 << 20;

/// Measures.
pub fn measure(figures: &mut Figures) -> anyhow::Result<()> {
    let house = House::new(crate::FREE_RATE);
    let body = json!({"handle": "box", "command": ["sleep", "infinity"], "vcpus": 2,
        "memory_mb": 512});
    house.socket().post("/v1/instances", &body).expect(201);
    house.until_instance("box", "running");
    let big = house.home().join("big");
    File::create(&big)?.set_len(BYTES)?;
    let aegis = |args: &[&str], input: Stdio| {
        let mut command = Command::new(programs().join("aegis"));
        command.args(args).env("AEGIS_HOME", house.home()).stdin(input).stdout(Stdio::null());
        assert!(command.status().is_ok_and(|status| status.success()), "{args:?}");
    };
    let mut took = [const { Vec::new() }; 4];
    for _ in 0..ROUNDS {
        let mut timed = |n: usize, args: &[&str], input: Stdio| {
            let began = Instant::now();
            aegis(args, input);
            took[n].push(began.elapsed().as_secs_f64() * 1e3);
        };
        let into = ["exec", "-i", "box", "--", "sh", "-c", "cat > /dev/shm/in"];
        timed(0, &into, File::open(&big)?.into());
        timed(1, &["exec", "-i", "box", "--", "cat"], File::open(&big)?.into());
        timed(2, &["cp", "-", "box:/dev/shm/in"], File::open(&big)?.into());
        timed(3, &["exec", "-i", "box", "--", "true"], Stdio::null());
    }
    let [into, through, copied, nothing] = took;
    let rate = |ms: f64| (BYTES >> 20) as f64 * 1e3 / ms;
    let into = figures.samples("exec -i: 100 MiB into a command", into);
    let through = figures.samples("exec -i: 100 MiB through cat", through);
    let copied = figures.samples("cp: 100 MiB into a machine", copied);
    figures.samples("exec -i: true", nothing);
    figures.one("exec -i: into a command", rate(into), "MiB/s");
    figures.one("exec -i: through cat, each way", rate(through), "MiB/s");
    figures.one("cp: into a machine", rate(copied), "MiB/s");
    Ok(())
}
