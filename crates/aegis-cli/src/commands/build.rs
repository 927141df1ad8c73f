//! `aegis image build` and `aegis image warm`: images made here, and what makes their machines quick.

use std::path::PathBuf;

use aegis_wire::path::escape;
use clap::Args;
use hyper::Method;
use serde_json::{Value, json};

use super::image::{archive, ended, follow, provide};
use super::{Ask, text};
use crate::failure::{Failure, Result};
use crate::human::parse_memory_mb;
use crate::output::{Work, clean};
use crate::setup::image::{Wish, ensure, parse_name, parse_package};

/// What `aegis image build` takes.
#[derive(Args, Debug)]
pub struct BuildArgs {
    /// How requests will call it
    name: String,
    /// A directory that becomes its root
    #[arg(long, value_name = "DIR", required_unless_present = "debian")]
    from: Option<PathBuf>,
    /// Of packages of Debian or Ubuntu
    #[arg(long, conflicts_with = "from")]
    debian: bool,
    /// Packages beside those that every image has
    #[arg(long, value_name = "PACKAGES", value_delimiter = ',', value_parser = parse_package, requires = "debian")]
    include: Vec<String>,
    /// Release that it is made of [default: the host's]
    #[arg(long, value_name = "NAME", requires = "debian")]
    suite: Option<String>,
    /// What its machines run where nobody says what, after `--`
    #[arg(last = true, value_name = "COMMAND", conflicts_with = "debian")]
    command: Vec<String>,
}

/// Builds.
pub async fn build(ask: &Ask, args: BuildArgs) -> Result<()> {
    let Some(from) = &args.from else { return debian(ask, args) };
    if !from.is_dir() {
        return Err(Failure::Usage(format!("--from {}: must be a directory", from.display())));
    }
    let mut path = format!("/v1/images/import?tree=true&name={}", escape(&args.name));
    if !args.command.is_empty() {
        path += &format!("&command={}", escape(json!(args.command).to_string()));
    }
    let lines = ask.client.upload(&path, archive(from)?).await?;
    let done = follow(lines, &args.name).await?;
    ended(ask.format, &done, "built")
}

fn debian(ask: &Ask, args: BuildArgs) -> Result<()> {
    if ask.remote {
        let what = "packages are put together on this host, for its own daemon";
        return Err(Failure::Usage(format!("{what}: leave out --url")));
    }
    let name = parse_name(&args.name).map_err(|why| Failure::Usage(format!("NAME {why}")))?;
    let wish = Wish { name, include: args.include, suite: args.suite, rebuild: true };
    let (record, _) = ensure(&ask.home, &wish)?;
    ended(
        ask.format,
        &json!({ "reference": record.name, "digest": record.digest,
        "bytes": record.size, "created_at": record.built_at }),
        "built",
    )
}

/// What `aegis image warm` takes.
#[derive(Args, Debug)]
pub struct WarmArgs {
    /// The image; pulled, if it is not there
    image: String,
    /// Memory of the machines, as in 512M or 2G
    #[arg(long, value_name = "SIZE", value_parser = parse_memory_mb)]
    memory: Option<u32>,
    /// CPUs of the machines
    #[arg(long, value_name = "N")]
    cpus: Option<f64>,
}

/// Warms.
pub async fn warm(ask: &Ask, args: WarmArgs) -> Result<()> {
    let mut body = json!({ "image_ref": args.image });
    provide(ask, &body).await?;
    if let Some(memory) = args.memory {
        body["memory_mb"] = memory.into();
    }
    if let Some(cpus) = args.cpus {
        body["vcpus"] = cpus.into();
    }
    let mut lines = ask.client.lines(Method::POST, "/v1/images/warm", Some(body)).await?;
    let work = Work::begin("warm", &format!("making a snapshot of {}", args.image));
    while let Some(line) = lines.next().await? {
        let line: Value = serde_json::from_slice(&line)
            .map_err(|e| Failure::because("the daemon's answer is no JSON", e))?;
        match line.get("event").and_then(Value::as_str) {
            Some("done") => {
                work.clear();
                let mut done = line;
                if let Some(done) = done.as_object_mut() {
                    done.remove("event");
                }
                return ask.format.answer(&done, || words(&done));
            }
            Some("failed") => {
                let why = clean(&text(&line, "error"));
                return Err(Failure::here(format!("{}: {why}", args.image)));
            }
            // How long it has taken, the spinner shows.
            _ => {}
        }
    }
    Err(Failure::here("the daemon's answer broke off"))
}

fn words(done: &Value) -> String {
    let (image, cpus, memory) =
        (text(done, "reference"), text(done, "vcpus"), text(done, "memory_mb"));
    let seconds = done.get("elapsed_ms").and_then(Value::as_u64).unwrap_or(0) as f64 / 1e3;
    match done.get("cached") {
        Some(Value::Bool(true)) => format!("{image} was warm: {cpus} CPUs, {memory} MiB\n"),
        _ => format!("{image} is warm: {cpus} CPUs, {memory} MiB, after {seconds:.1} s\n"),
    }
}
