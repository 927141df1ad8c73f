//! One directory of golden snapshots for all houses of a test run: a snapshot takes seconds to
//! make, and makes no difference to who uses it.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use rustix::fs::FlockOperation;

struct Shared {
    directory: PathBuf,
    /// Held by every process of the run.
    _lock: File,
}

static SHARED: OnceLock<Shared> = OnceLock::new();

/// The run's directory. It goes, and the keepers with it, when the last process of the run ends,
/// however that ends: a shell waits for it at a pipe.
pub fn directory() -> PathBuf {
    SHARED.get_or_init(open).directory.clone()
}

#[expect(clippy::zombie_processes, reason = "the guardian outlives this process: that is its use")]
fn open() -> Shared {
    // Where each test is a process, the runner's id tells which of them belong together.
    let run = std::env::var("NEXTEST_RUN_ID").unwrap_or_else(|_| std::process::id().to_string());
    let run: String = run.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
    let directory = PathBuf::from(format!("/tmp/aegis-it-golden-{run}"));
    let path = directory.with_extension("lock");
    let lock = loop {
        let lock = File::create(&path).unwrap();
        rustix::fs::flock(&lock, FlockOperation::LockShared).unwrap();
        // The one who removed it may have been quicker.
        let same = |there: std::fs::Metadata| there.ino() == lock.metadata().unwrap().ino();
        if std::fs::metadata(&path).is_ok_and(same) {
            break lock;
        }
    };
    std::fs::create_dir_all(&directory).unwrap();
    let script = r#"read -r _; exec flock -w 2 -x "$1" rm -rf "$2" "$1""#;
    let mut guardian = Command::new("sh")
        .args(["-c", script, "sh"])
        .args([&path, &directory])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // A Ctrl-C is for the tests, not for who cleans up after them.
        .process_group(0)
        .spawn()
        .unwrap();
    // Closed by the end of this process, and by nothing else.
    std::mem::forget(guardian.stdin.take());
    Shared { directory, _lock: lock }
}
