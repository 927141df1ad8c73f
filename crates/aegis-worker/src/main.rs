//! The worker **touches**: it runs one machine, from its birth to the proof that it is gone.
//!
//! ```text
//! aegis-worker machine RUN_DIR   runs one machine; the listening socket is fd 0
//! aegis-worker reap              Reap on stdin → Reaped: removes what a machine had, proves it gone
//! aegis-worker probe             prints what this host can do
//! aegis-worker golden            Golden on stdin → GoldenReady: makes sure of a snapshot
//! aegis-worker keeper            holds one golden snapshot (started by workers)
//! aegis-worker workspace TERMS   lends a folder to one machine (started by its worker)
//! aegis-worker floor             how fast a bare clone answers here
//! ```
//! Shapes: `aegis_wire::worker`. Start reading at `serve.rs`, then `machine.rs`.

mod birth;
mod broker;
mod cgroup;
mod child;
mod commit;
mod cpio;
mod disk;
mod exec;
mod floor;
mod golden;
mod keeper;
mod life;
mod lines;
mod logs;
mod machine;
mod meter;
mod net;
mod overlay;
mod port;
mod probe;
mod qemu;
mod qmp;
mod reap;
mod relay;
mod run_dir;
mod running;
mod serve;
mod snapshot;
mod stream;
mod suspend;
mod sys;
mod terminal;
mod workspace;

use std::io::{self, Read as _, Write as _};
use std::path::Path;
use std::process::ExitCode;

use aegis_wire::bounds::WORKER_LINE_MAX;
use anyhow::Context as _;
use serde::Serialize;
use serde::de::DeserializeOwned;

const USAGE: &str = "usage: aegis-worker machine RUN_DIR | reap | probe | golden | keeper | workspace TERMS | floor";

fn main() -> ExitCode {
    sys::close_inherited_at_exec();
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    tracing_subscriber::fmt().with_writer(io::stderr).with_ansi(false).init();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["machine", directory] => block_on(serve::run(Path::new(directory))),
        ["reap"] => input().and_then(|asked| output(&reap::reap(&asked))),
        ["probe"] => output(&probe::probe()),
        ["golden"] => block_on(async {
            let golden = input()?;
            let place = golden::place(&golden)?;
            let source = golden::Source::Golden(golden);
            output(&golden::obtain(&source, &place).await?.1)
        }),
        ["workspace", terms] => serde_json::from_str(terms)
            .context("no terms")
            .and_then(|terms| aegis_workspace::serve(&terms)),
        ["keeper"] => block_on(keeper::run()),
        ["floor"] => block_on(async { output(&floor::floor(&input()?).await?) }),
        _ => Err(anyhow::anyhow!(USAGE)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("aegis-worker: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs on this thread: QEMU dies with the thread that started it, and the main one lives longest.
fn block_on(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let done = runtime.block_on(work);
    // A thread that waits for a lock must not hold up the end.
    runtime.shutdown_background();
    done
}

fn input<T: DeserializeOwned>() -> anyhow::Result<T> {
    let mut text = Vec::new();
    io::stdin().take(WORKER_LINE_MAX as u64).read_to_end(&mut text)?;
    serde_json::from_slice(&text).context("stdin is not what was expected")
}

fn output<T: Serialize>(value: &T) -> anyhow::Result<()> {
    let mut out = io::stdout();
    out.write_all(&lines::line(value)?)?;
    out.flush()?;
    Ok(())
}
