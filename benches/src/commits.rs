//! Commits and forks: for how long a machine stands still, and how soon many go on from it.

use std::time::Instant;

use aegis_tests::house::House;
use serde_json::{Value, json};

use crate::figures::Figures;
use crate::{FREE_RATE, ms};

/// Commits, one after the other.
const COMMITS: usize = 20;
/// Machines of one fork, and forks.
const FORKS: (usize, usize) = (20, 3);
/// Memory that a busy machine has written, MB.
const BUSY_MB: usize = 200;

/// Measures.
pub fn measure(figures: &mut Figures) {
    let house = House::new(FREE_RATE);
    for (name, busy) in [("idle", 0), ("that wrote 200 MB", BUSY_MB)] {
        let id = machine(&house, busy);
        let (mut stopped, mut whole) = (vec![], vec![]);
        for _ in 0..COMMITS {
            let began = Instant::now();
            let made = house.socket().post(&format!("/v1/instances/{id}/commit"), &json!({}));
            let made = made.expect(201);
            whole.push(ms(began));
            stopped.push(made["stopped_ms"].as_f64().unwrap());
            let commit = made["id"].as_str().unwrap();
            house.socket().delete(&format!("/v1/commits/{commit}")).expect(200);
        }
        figures.samples(&format!("commit of a machine {name}: stands still"), stopped);
        figures.samples(&format!("commit of a machine {name}: all of it"), whole);
        house.socket().delete(&format!("/v1/instances/{id}")).expect(200);
    }
    let id = machine(&house, 0);
    let (mut running, mut answers) = (vec![], vec![]);
    for _ in 0..FORKS.1 {
        let began = Instant::now();
        let body = json!({ "count": FORKS.0 });
        let made = house.socket().post(&format!("/v1/instances/{id}/fork"), &body).expect(201);
        let ids: Vec<&str> = made["instances"]
            .as_array()
            .unwrap()
            .iter()
            .map(|i| i["id"].as_str().unwrap())
            .collect();
        ids.iter().for_each(|id| drop(house.until_instance(id, "running")));
        running.push(ms(began));
        std::thread::scope(|scope| {
            for id in &ids {
                scope.spawn(|| assert_eq!(house.sh(id, "true").code, Some(0)));
            }
        });
        answers.push(ms(began));
        for id in ids {
            house.socket().delete(&format!("/v1/instances/{id}")).expect(200);
        }
    }
    figures.samples("fork of a machine into 20: all run", running);
    figures.samples("fork of a machine into 20: all have answered an exec", answers);
}

/// A machine of 512 MB that runs, and has written so much of it.
fn machine(house: &House, busy_mb: usize) -> String {
    let body = json!({
        "command": ["sleep", "infinity"], "memory_mb": 512, "disk_gb": 0.5,
        "idle_policy": "leave-running",
    });
    let made: Value = house.socket().post("/v1/instances", &body).expect(201);
    let id = made["id"].as_str().unwrap().to_owned();
    house.until_instance(&id, "running");
    if busy_mb > 0 {
        house.ok(&id, &format!("head -c {busy_mb}000000 /dev/urandom > /dev/shm/written"));
    }
    id
}
