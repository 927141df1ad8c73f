//! `aegisd`: the host daemon. It decides and remembers; its machines outlive it.
//!
//! This file is the only place where all rooms meet. Tasks are a closed list: listeners and their
//! connections, one driver per instance, one broker and one hatch per machine, the ledger's
//! writer thread, the sweeper, the follower of cascades, the signal handler here.
#![forbid(unsafe_code)]

mod app;
mod broker;
mod clock;
mod cloud;
mod commits;
mod config;
mod ctx;
mod doors;
mod hatch;
mod images;
mod keys;
mod ledger;
mod lifecycle;
mod metrics;
mod passing;
mod programs;
mod roots;
mod router;
mod tokens;
mod watch;
mod web;
mod workspaces;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IsTerminal as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::app::App;
use crate::clock::Clock;
use crate::config::{Config, Flags, Host, LogFormat};
use crate::ctx::{Ctx, Meters, Sizes};
use crate::lifecycle::{Lifecycle, Told};
use crate::router::Router;

/// The host daemon of Aegis: lends sandboxed machines with a spending limit.
#[derive(Parser)]
#[command(
    version,
    after_help = "Settings: flags win over environment (AEGIS_HOME, AEGIS_LISTEN, AEGIS_NO_AUTH, \
                  AEGIS_PROVISIONER, …) over HOME/aegis.toml.\n\nExamples:\n  aegisd\n  aegisd \
                  --home /srv/aegis --listen 127.0.0.1:3000\n  aegisd --no-auth    # loopback only, \
                  for local development"
)]
struct Args {
    /// Where everything is kept [default: ~/.aegis]
    #[arg(long, value_name = "DIR")]
    home: Option<PathBuf>,
    /// TCP address of the API [default: 127.0.0.1:3000]
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<String>,
    /// Serve host routes without a token; only on a loopback address
    #[arg(long)]
    no_auth: bool,
    /// Who makes guests' machines: local, manual or vers
    #[arg(long, value_name = "WORD")]
    provisioner: Option<String>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let flags = Flags {
        home: args.home,
        listen: args.listen,
        no_auth: args.no_auth,
        provisioner: args.provisioner,
    };
    let config = settings(&flags)?;
    log(&config)?;
    raise_file_limit();
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(serve(config))
}

/// Everything that is logged from now on goes to standard error, with the ids of what it is about.
fn log(config: &Config) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(&config.log_filter)
        .with_context(|| format!("log.filter or AEGIS_LOG: {}", config.log_filter))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.log {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().flatten_event(true).with_current_span(false).init(),
    }
    Ok(())
}

fn settings(flags: &Flags) -> anyhow::Result<Config> {
    let env: BTreeMap<String, String> = std::env::vars().collect();
    let home = config::home(flags, &env)?;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&home)
        .with_context(|| format!("cannot make the home {}", home.display()))?;
    let path = home.join("aegis.toml");
    let file = match std::fs::read_to_string(&path) {
        Ok(text) => Some(text),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
        Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
    };
    let program = std::env::current_exe().context("cannot find the running program")?;
    let programs = program.parent().unwrap_or(Path::new("/"));
    let info = rustix::system::sysinfo();
    let disk = rustix::fs::statvfs(&home)?;
    let resolv_conf = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let host = Host {
        resolvers: config::name_servers(&resolv_conf),
        memory_mb: info.totalram.saturating_mul(u64::from(info.mem_unit)) >> 20,
        disk_free: disk.f_bavail.saturating_mul(disk.f_frsize),
        cpus: std::thread::available_parallelism()
            .map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
    };
    Ok(config::build(flags, &env, file.as_deref(), programs, host)?)
}

/// Each machine takes a few files here: allow as many as the system lets us.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the open-file limit stays low");
    }
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let data = config.home.join("data");
    std::fs::create_dir_all(&data).with_context(|| format!("cannot make {}", data.display()))?;
    // Held until the process ends, however it ends.
    let _only = lock(&data.join("aegisd.lock"))?;
    let clock = Clock::start();
    let keys = keys::Keys::open(&config.home).context("cannot open the keys")?;
    let ledger = ledger::Ledger::open(&data.join("ledger.db")).context("cannot open the ledger")?;
    let cloud = match config.vers.clone() {
        Some(vers) => Some(cloud::Cloud::open(vers, &keys)?),
        None => None,
    };
    let listeners = doors::bind(&config).await?;
    let listen = listeners.address;
    let probe = match lifecycle::probe(&config.machines.programs.join("aegis-worker")).await {
        Ok(probe) => Some(probe),
        Err(error) => {
            tracing::warn!(%error, "no machines can be made; see `aegis doctor`");
            None
        }
    };
    let home = config.home.clone();
    let (meters, sizes) = (Meters::default(), Sizes::default());
    let watch = watch::Watch::default();
    let metrics = metrics::Metrics::default();
    let commits = commits::Commits::of(&home);
    let ctx = Arc::new(Ctx {
        config,
        keys,
        clock,
        ledger,
        cloud,
        watch,
        commits,
        sizes,
        meters,
        metrics,
    });
    let router = Router::default();
    app::llm::settle_lost(&ctx).await.context("cannot settle the calls of before")?;
    let (callers, calling) = mpsc::channel(broker::MACHINES_WAITING);
    let (knockers, knocking) = mpsc::channel(hatch::MACHINES_WAITING);
    let told = Told { broker: callers, hatch: knockers };
    let lifecycle = Lifecycle::new(Arc::clone(&ctx), router.clone(), told);
    lifecycle.adopt().await.context("cannot adopt the machines that are there")?;
    let pool = lifecycle.pool().clone();
    let sweeper = tokio::spawn(lifecycle::sweep(Arc::clone(&ctx), lifecycle.clone()));
    let cloud_sweeper = tokio::spawn(lifecycle::sweep_cloud(Arc::clone(&ctx)));
    let follower = tokio::spawn(lifecycle.clone().follow());
    let by_name = web::bind(ctx.config.by_name).await;
    let named_at = by_name.as_ref().and_then(|listener| listener.local_addr().ok());
    let (probe, fetching) = (Arc::new(probe), Arc::default());
    let app = App { started_at: ctx.now(), probe, ctx, lifecycle, router, fetching, named_at };
    let by_name_app = app.clone();
    let broker = tokio::spawn(broker::run(app.clone(), calling));
    let hatch = tokio::spawn(hatch::run(app.clone(), knocking));
    let by_name = tokio::spawn(async move {
        if let Some(listener) = by_name {
            web::run(by_name_app, listener).await;
        }
    });
    let doors = doors::open(listeners, app);
    let pid_file = data.join("aegisd.pid");
    announce(&pid_file)?;
    tracing::info!(%listen, home = %home.display(), "aegisd answers");

    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    tracing::info!("stopping; machines go on");
    let _ = std::fs::remove_file(&pid_file);
    doors.stop().await;
    for task in [sweeper, cloud_sweeper, follower, broker, hatch, by_name] {
        task.abort();
    }
    pool.close().await;
    let _ = std::fs::remove_file(home.join("aegisd.sock"));
    Ok(())
}

/// One daemon per home.
fn lock(path: &Path) -> anyhow::Result<File> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).with_context(
        || format!("another aegisd runs in this home ({} is locked)", path.display()),
    )?;
    Ok(file)
}

/// Writes the pid file in one move, once the API answers: who waits for it may ask at once.
fn announce(path: &Path) -> anyhow::Result<()> {
    let temporary = path.with_extension("pid.new");
    let mut file = File::create(&temporary)?;
    writeln!(file, "{}", std::process::id())?;
    drop(file);
    std::fs::rename(&temporary, path).with_context(|| format!("cannot write {}", path.display()))
}
