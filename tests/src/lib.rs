//! The kit of the integration tests: a [`house::House`] is a home of its own with a real daemon in
//! it, [`http`] asks it over its sockets, [`look`] looks at the host behind its back, [`vendor`] is
//! what stands behind its LLM door, [`vers`] the cloud in which it has an account.
//!
//! It knows the programs only from outside: flags, files, sockets, answers.

// A test's helper fails as the test does: loudly, where it stands.
#![allow(clippy::unwrap_used)]

pub mod golden;
pub mod house;
pub mod http;
pub mod look;
pub mod metrics;
pub mod outside;
pub mod pipes;
pub mod sse;
pub mod vendor;
pub mod vers;

use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How often a state that only polling can show is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// The directory that an environment variable of the test run names. A run without it must fail: a
/// test that did not run has not passed.
fn given(name: &str) -> PathBuf {
    match std::env::var_os(name) {
        Some(directory) if !directory.is_empty() => {
            let directory = PathBuf::from(directory);
            assert!(
                directory.is_dir(),
                "{name} is {}, which is no directory: run `make test`, it builds what is needed",
                directory.display()
            );
            directory
        }
        _ => panic!("{name} is not set: run `make test`, it builds what is needed and sets it"),
    }
}

/// Directory of the programs under test.
pub fn programs() -> PathBuf {
    given("AEGIS_TEST_PROGRAMS")
}

/// A home with guest kernel and base image.
pub fn assets() -> PathBuf {
    given("AEGIS_TEST_ASSETS")
}

/// Directory of the harness that turns against its host.
pub fn hostile() -> PathBuf {
    given("AEGIS_TEST_HOSTILE")
}

/// Looks until `look` finds something; fails with `what` after `deadline`.
#[track_caller]
pub fn wait_for<T>(what: &str, deadline: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + deadline;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "not within {deadline:?}: {what}");
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Looks until `look` is true; fails with `what` after `deadline`.
#[track_caller]
pub fn wait_until(what: &str, deadline: Duration, mut look: impl FnMut() -> bool) {
    wait_for(what, deadline, || look().then_some(()));
}
