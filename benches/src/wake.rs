//! A machine whose memory is on disk, and somebody who connects to its port.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use aegis_tests::house::House;
use aegis_tests::wait_until;
use serde_json::{Value, json};

use crate::figures::Figures;
use crate::{FREE_RATE, clone_floor, ms};

/// Times that it sleeps and is woken.
const WAKES: usize = 15;
/// What the policy may take to put it to sleep, and its memory on disk.
const ASLEEP: Duration = Duration::from_secs(60);

/// Measures.
pub fn measure(figures: &mut Figures) -> anyhow::Result<()> {
    let house =
        House::new(&format!("[idle]\npause_after_secs = 1\nsuspend_after_secs = 1\n{FREE_RATE}"));
    let body = json!({
        "command": ["python3", "-m", "http.server", "8080"], "memory_mb": 256, "disk_gb": 0.5,
        "exposes": [8080],
    });
    let made: Value = house.socket().post("/v1/instances", &body).expect(201);
    let id = made["id"].as_str().unwrap().to_owned();
    let shown = house.until_instance(&id, "running");
    let port = shown["endpoints"][0]["public_port"].as_u64().unwrap() as u16;
    wait_until("it serves", ASLEEP, || get(port).is_ok_and(|bytes| bytes > 0));
    let memory = house.home().join("run").join(&id).join("memory");
    let mut wakes = vec![];
    for _ in 0..WAKES {
        wait_until("it sleeps", ASLEEP, || memory.exists());
        let began = Instant::now();
        assert!(get(port)? > 0, "no answer");
        wakes.push(ms(began));
    }
    let floor = figures.samples("bare clone to first RPC (floor)", clone_floor(house.home())?);
    let clones = (0..WAKES).map(|_| clone(&house)).collect();
    let clone = figures.samples("start of a clone: it runs", clones);
    let woken = figures.samples("connection to a suspended machine's port: HTTP answer", wakes);
    figures.one("the same / start of a clone", woken / clone, "times");
    figures.one("the same / floor", woken / floor, "times");
    Ok(())
}

/// A machine of the same size that is started, with no spare one at hand.
fn clone(house: &House) -> f64 {
    let body = json!({"command": ["sleep", "infinity"], "memory_mb": 256, "disk_gb": 0.5});
    let began = Instant::now();
    let made: Value = house.socket().post("/v1/instances", &body).expect(201);
    let id = made["id"].as_str().unwrap();
    let path = format!("/v1/instances/{id}");
    while house.socket().get(&path).expect(200)["state"] != "running" {
        std::thread::sleep(Duration::from_millis(2));
    }
    let took = ms(began);
    house.socket().delete(&format!("/v1/instances/{id}")).expect(200);
    took
}

/// Asks for a page; returns the bytes of the answer.
fn get(port: u16) -> std::io::Result<usize> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut said = Vec::new();
    stream.read_to_end(&mut said)
}
