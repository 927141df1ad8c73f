//! A vers cloud in memory: machines that are only records, and every way in which the real one is known
//! to go wrong (contracts/vers.md 7). For tests, and for trying out `provisioner = "vers"`.
//!
//! ```text
//! /api/v1/…   as the cloud answers, to whoever shows the key     routes.rs, resources.rs, exec.rs
//! /health     no key
//! /_double/…  what only a double has, no key: faults, state      control.rs
//! ```
#![forbid(unsafe_code)]

mod answers;
mod control;
mod exec;
mod faults;
mod resources;
mod routes;
mod world;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aegis_vers::ApiKey;
use aegis_wire::words::Uuid;
use anyhow::Context as _;
use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::get;
use clap::{Parser, ValueEnum};

use faults::Faults;
use world::World;

#[derive(Parser)]
#[command(
    name = "aegis-vers-double",
    version,
    about = "A vers cloud in memory, for tests and for trying things out.",
    after_help = "It prints what a client needs, as lines that a shell reads, and serves until it is \
                  ended. Machines are records; exec knows echo, cat, env, pwd, true, false, exit N, \
                  err WORDS and bytes N.\n\n\
                  Faults are set by flags, and while it runs:\n  \
                  curl localhost:PORT/_double/state\n  \
                  curl -X PATCH localhost:PORT/_double/faults -d '{\"creates_500_made\":1}'\n  \
                  curl -X PATCH localhost:PORT/_double/vms/VM_ID -d '{\"state\":\"dead\"}'\n\n\
                  Examples:\n  \
                  eval \"$(aegis-vers-double --listen 127.0.0.1:8004 --print-env)\"   # a key and a commit\n  \
                  aegis-vers-double --listen 127.0.0.1:8004 &                       # that one's\n  \
                  aegis-vers-double --boot-ms 0 --faults '{\"foreign\":3,\"limited\":2}'"
)]
struct Args {
    /// Where to listen; port 0 takes any that is free
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// How the cloud spoke at that time
    #[arg(long, value_name = "WHEN", default_value = "2026-04")]
    api_version: Version,
    /// How long machines boot
    #[arg(long, value_name = "MS", default_value_t = 2000)]
    boot_ms: u64,
    /// The faults that it begins with, as JSON; /_double/state shows which there are
    #[arg(long, value_name = "JSON", default_value = "{}")]
    faults: String,
    /// Print key and commit, and end
    #[arg(long)]
    print_env: bool,
    /// The key that is accepted; a new one where there is none
    #[arg(long, env = "VERS_API_KEY", hide_env_values = true, hide = true)]
    api_key: Option<String>,
    /// The commit that is there from the start; a new one where none is named
    #[arg(long, env = "GOLDEN_COMMIT_ID", value_name = "UUID")]
    golden_commit: Option<String>,
}

/// How the cloud spoke at a time (contracts/vers.md 6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Version {
    /// Without /api/v1, one machine per branch, deleted_ids.
    #[value(name = "2025-12")]
    December2025,
    /// As now.
    #[value(name = "2026-04")]
    April2026,
}

/// What every route needs.
struct Double {
    key: ApiKey,
    version: Version,
    world: Mutex<World>,
}

type Shared = Arc<Double>;

impl Double {
    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let key = match &args.api_key {
        Some(text) if !text.is_empty() => text.parse().context("VERS_API_KEY")?,
        _ => ApiKey::new(&world::uuid()?, &world::random::<32>()?),
    };
    let golden: Uuid = match &args.golden_commit {
        Some(text) if !text.is_empty() => text.parse().context("GOLDEN_COMMIT_ID")?,
        _ => world::uuid()?,
    };
    let faults: Faults = serde_json::from_str(&args.faults).context("--faults")?;
    let listener = tokio::net::TcpListener::bind(args.listen).await.context("--listen")?;
    let at = listener.local_addr()?;
    println!("export VERS_BASE_URL=http://{at}");
    println!("export VERS_API_KEY={}", key.reveal());
    println!("export GOLDEN_COMMIT_ID={golden}");
    if args.print_env {
        return Ok(());
    }
    let boot = Duration::from_millis(args.boot_ms);
    let world = World::new(key.owner(), golden, boot, faults);
    let double = Arc::new(Double { key, version: args.api_version, world: Mutex::new(world) });
    let end = async {
        let _ = tokio::signal::ctrl_c().await;
    };
    // What hangs is not waited for.
    tokio::select! {
        served = async { axum::serve(listener, router(double)).await } => Ok(served?),
        () = end => Ok(()),
    }
}

fn router(double: Shared) -> Router {
    let api = match double.version {
        Version::April2026 => routes::now().merge(resources::routes()).merge(exec::routes()),
        Version::December2025 => routes::before(),
    };
    let api = api
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&double), trouble))
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&double), authenticated))
        .layer(DefaultBodyLimit::max(aegis_wire::vers::BODY_MAX));
    let router = match double.version {
        Version::April2026 => Router::new().nest("/api/v1", api),
        Version::December2025 => Router::new().merge(api),
    };
    router
        .route("/health", get(|| async { "ok" }))
        .nest("/_double", control::routes())
        .with_state(double)
}

/// Whoever shows the key is let in; all others hear the same, as text.
async fn authenticated(State(double): State<Shared>, request: Request, next: Next) -> Response {
    let wanted = format!("Bearer {}", double.key.reveal());
    let shown = request.headers().get(AUTHORIZATION).and_then(|v| v.to_str().ok());
    if shown != Some(&*wanted) || double.world().faults.reject_key {
        return answers::bad_key();
    }
    next.run(request).await
}

/// Faults that meet any request.
async fn trouble(State(double): State<Shared>, request: Request, next: Next) -> Response {
    let (limited, hangs, node_down) = {
        let mut world = double.world();
        let faults = &mut world.faults;
        let limited = faults::take(&mut faults.limited).then_some(faults.retry_after_secs);
        (limited, limited.is_none() && faults::take(&mut faults.hangs), faults.node_down)
    };
    if let Some(seconds) = limited {
        return answers::limited(seconds);
    }
    if hangs {
        std::future::pending::<()>().await;
    }
    let of_a_node = request.uri().path().contains("/vm/");
    if node_down && of_a_node {
        return answers::app(500, "node failure: no healthy chelsea node");
    }
    next.run(request).await
}
