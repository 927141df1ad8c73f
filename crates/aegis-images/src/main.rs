//! `aegis-image`: one image from a registry or an archive, as one read-only file.
//!
//! ```text
//! aegis-image            a Job as one line on stdin, and for an import the archive → Progress lines
//! ```
//! It starts itself once more, so that no process of the job outlives it, and that one confines
//! itself. Shapes: `aegis_wire::images`. Start reading at `job.rs`.

use std::io::{self, BufRead as _, BufReader, Read as _};
use std::process::{Command, ExitCode};

use aegis_images::job::{self, Failure, Tell};
use aegis_images::{confine, own_pids};
use aegis_wire::bounds::WORKER_LINE_MAX;
use aegis_wire::images::{Job, Progress};
use anyhow::Context as _;

const USAGE: &str = "usage: aegis-image (a job on stdin)";

fn main() -> ExitCode {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        [] => supervise(),
        ["confined"] => confined(),
        _ => Err(anyhow::anyhow!(USAGE)),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("aegis-image: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whatever the job starts ends with it, where this process may have that; and with this process.
fn supervise() -> anyhow::Result<ExitCode> {
    let _ = own_pids();
    let program = std::env::current_exe().context("its own program")?;
    let status = Command::new(program).arg("confined").status().context("it can't start itself")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    if code.is_none() {
        let failure = Failure::new("image_failed", format!("it was ended: {status}"));
        Tell::default().say(&failure.line());
    }
    Ok(ExitCode::from(code.unwrap_or(1)))
}

fn confined() -> anyhow::Result<ExitCode> {
    let mut input = BufReader::new(io::stdin().lock());
    let mut line = Vec::new();
    input.by_ref().take(WORKER_LINE_MAX as u64).read_until(b'\n', &mut line)?;
    let job: Job = serde_json::from_slice(&line).context("no job")?;
    confine::confine(&job.dir, job.bytes_max)?;
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("the TLS library is set up already"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(8)
        .enable_all()
        .build()?;
    let tell = Tell::default();
    Ok(match runtime.block_on(job::run(&job, input, &tell)) {
        Ok(made) => {
            tell.say(&Progress::Done(Box::new(made)));
            ExitCode::SUCCESS
        }
        Err(failure) => {
            tell.say(&failure.line());
            ExitCode::FAILURE
        }
    })
}
