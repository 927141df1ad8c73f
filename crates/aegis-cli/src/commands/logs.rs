//! `aegis logs`: what a machine's processes said.

use aegis_wire::logs::{Entry, Source};
use clap::Args;
use hyper::Method;
use jiff::Timestamp;

use super::{Ask, exec};
use crate::failure::{Failure, Result};
use crate::human::parse_since;
use crate::output::{self, Format, say};
use aegis_wire::path::escape;

/// What `aegis logs` takes.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  aegis logs web
  aegis logs -f --tail 20 web
  aegis logs --since 15m web
  aegis logs --json web             one JSON object per line, with times and sources")]
pub struct LogsArgs {
    /// Id or handle of the machine
    name: String,
    /// Go on with what comes
    #[arg(long, short)]
    follow: bool,
    /// Only the last lines
    #[arg(long, short = 'n', value_name = "LINES")]
    tail: Option<u64>,
    /// Only what came after: a time, or so long ago (15m, 2h)
    #[arg(long, value_name = "TIME", value_parser = |s: &str| parse_since(s, Timestamp::now()))]
    since: Option<Timestamp>,
    /// Only the output of one exec
    #[arg(long, value_name = "ID")]
    exec: Option<String>,
    /// Put the time in front of each line
    #[arg(long, short)]
    timestamps: bool,
}

/// Shows them.
pub async fn logs(ask: &Ask, args: LogsArgs) -> Result<()> {
    let mut query = vec![format!("follow={}", args.follow)];
    query.extend(args.tail.map(|n| format!("tail={n}")));
    query.extend(args.since.map(|t| format!("since={}", escape(t.to_string()))));
    query.extend(args.exec.map(|id| format!("exec_id={}", escape(&id))));
    let path = format!("/v1/instances/{}/logs?{}", escape(&args.name), query.join("&"));
    let mut lines = ask.client.lines(Method::GET, &path, None).await?;
    while let Some(line) = lines.next().await? {
        if ask.format == Format::Json {
            output::data(&[&line[..], b"\n"].concat())?;
        } else {
            show(&parse(&line)?, args.timestamps)?;
        }
    }
    Ok(())
}

/// One entry of a stream.
pub fn parse(line: &[u8]) -> Result<Entry> {
    serde_json::from_slice(line)
        .map_err(|e| Failure::because("the daemon sent a line that is no log entry", e))
}

fn show(entry: &Entry, timestamps: bool) -> Result<()> {
    if entry.source == Source::System {
        say(&output::clean(&format!("[{}] {}", entry.ts, entry.line)));
        return Ok(());
    }
    if timestamps {
        let mut stamped = format!("{} ", entry.ts).into_bytes();
        stamped.extend(entry.bytes());
        if entry.partial {
            // Else the next stamp would stand in the middle of a line.
            stamped.push(b'\n');
        }
        return output::data(&stamped);
    }
    exec::show(entry)
}
