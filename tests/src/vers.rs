//! A vers cloud of its own for a test: the double, as a process.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};

use hyper::Method;
use serde_json::Value;

use crate::http::Client;
use crate::programs;

/// A house whose guests live in the cloud, and which is not patient with it.
pub const SETTINGS: &str = "provisioner = \"vers\"\n[rate_limit]\nper_second = 0\n[vers]\n\
                            create_timeout_secs = 2\ntimeout_secs = 2\nsettle_secs = 1\n\
                            poll_secs = 1\nsweep_secs = 1\n";

/// The cloud; it ends with its test.
pub struct Double {
    child: Child,
    env: Vec<(String, String)>,
}

impl Double {
    /// A cloud whose machines boot in so many milliseconds.
    pub fn new(boot_ms: u64) -> Double {
        Double::with(&["--boot-ms", &boot_ms.to_string()])
    }

    /// A cloud with these flags.
    pub fn with(flags: &[&str]) -> Double {
        let mut child = Command::new(programs().join("aegis-vers-double"))
            .args(flags)
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let env = lines.take(3).map(|line| {
            let line = line.unwrap();
            let (name, value) = line.strip_prefix("export ").unwrap().split_once('=').unwrap();
            (name.to_owned(), value.to_owned())
        });
        let env = env.collect();
        Double { child, env }
    }

    /// What a daemon needs to have an account there.
    pub fn env(&self) -> Vec<(&str, &str)> {
        self.env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect()
    }

    /// One value of it.
    pub fn var(&self, name: &str) -> &str {
        &self.env.iter().find(|(n, _)| n == name).unwrap().1
    }

    /// As anybody.
    pub fn anybody(&self) -> Client {
        let address = self.var("VERS_BASE_URL").strip_prefix("http://").unwrap();
        Client::tcp(address.parse().unwrap())
    }

    /// As who has the key.
    pub fn client(&self) -> Client {
        self.anybody().bearer(self.var("VERS_API_KEY"))
    }

    /// What it says of itself.
    pub fn state(&self) -> Value {
        self.anybody().get("/_double/state").expect(200)
    }

    /// One of its counters.
    pub fn count(&self, what: &str) -> u64 {
        self.state()[what].as_u64().unwrap()
    }

    /// Sets faults, those that are named.
    #[track_caller]
    pub fn faults(&self, faults: Value) {
        self.change("/_double/faults", &faults);
    }

    /// Puts a machine in a state.
    #[track_caller]
    pub fn set(&self, vm: &str, state: &str) {
        self.change(&format!("/_double/vms/{vm}"), &serde_json::json!({"state": state}));
    }

    #[track_caller]
    fn change(&self, path: &str, body: &Value) {
        let answer = self.anybody().ask(Method::PATCH, path, Some(body)).unwrap();
        assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    }

    /// The machines that are there and are not others'.
    pub fn vms(&self) -> Vec<Value> {
        let state = self.state();
        let all = state["vms"].as_array().unwrap();
        all.iter().filter(|vm| vm["foreign"] == false).cloned().collect()
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
