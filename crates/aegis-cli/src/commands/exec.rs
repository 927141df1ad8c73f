//! `aegis exec`: a command inside a machine, with its own output and exit code.

use std::collections::BTreeMap;

use aegis_wire::host::AttachBody;
use aegis_wire::logs::{Entry, ExecDone, Stream};
use clap::Args;
use hyper::Method;
use serde_json::{Value, json};

use super::{Ask, attach, parse_env, terminal};
use crate::failure::{EXIT_INTERRUPTED, EXIT_OTHER, Failure, Result};
use crate::human::parse_seconds;
use crate::output::{self, Format, say};
use aegis_wire::path::escape;

/// What `aegis exec` takes.
#[derive(Args, Debug)]
#[command(after_help = "\
Output comes byte for byte, stdout and stderr apart, and the exit code is the command's. A machine \
that is still starting is waited for; a paused one is woken.

Without -i and -t the command reads nothing, goes on when this is interrupted, and its output is in \
the logs. With either it is this program's: when this ends before it, however that comes about, and \
when the daemon ends, the command gets SIGHUP, and 5 s later SIGKILL. It never takes a part of its \
input for the whole. With -i its output is in the logs, up to a MiB of them, and its \
input is not.

Examples:
  aegis exec web -- uname -a
  aegis exec web --env LANG=C --cwd /workspace -- sh -c 'ls -l; exit 3'
  aegis exec web --timeout 30s -- make test
  aegis exec web -- tar -c /etc > etc.tar
  tar c site | aegis exec -i web -- tar x -C /srv
  aegis exec -i web -- sh < script
  aegis exec -t web -- bash                  a shell at this terminal")]
pub struct ExecArgs {
    /// Id or handle of the machine
    name: String,
    /// Pass standard input on to it, until its end; it ends when this ends
    #[arg(long, short)]
    interactive: bool,
    /// Run it at a terminal: this one. Nothing of it goes to the logs, and it ends when this ends
    #[arg(long, short)]
    tty: bool,
    /// Add to its environment (may be repeated)
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = parse_env)]
    env: Vec<(String, String)>,
    /// Directory inside in which it runs
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
    /// Kill it after this long (90s, 15m, 2h)
    #[arg(long, value_name = "TIME", value_parser = parse_seconds)]
    timeout: Option<f64>,
    /// The command and its arguments, after `--`
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// What came of a line of the stream.
enum Line {
    Output(Entry),
    Done(ExecDone),
    Other,
}

fn read(line: &[u8]) -> Result<Line> {
    let bad = |e| Failure::because("the daemon sent a line that is none of the contract's", e);
    let value: Value = serde_json::from_slice(line).map_err(bad)?;
    if value.get("done").and_then(Value::as_bool) == Some(true) {
        return serde_json::from_value(value).map(Line::Done).map_err(bad);
    }
    if value.get("line").is_some() {
        return serde_json::from_value(value).map(Line::Output).map_err(bad);
    }
    // The start, or something that a later daemon adds.
    Ok(Line::Other)
}

/// Runs it, and ends as it ended.
pub async fn exec(ask: &Ask, args: ExecArgs) -> Result<()> {
    let env: BTreeMap<String, String> = args.env.into_iter().collect();
    let path = format!("/v1/instances/{}/exec", escape(&args.name));
    // Whole seconds, and not none: the contract's unit.
    let timeout_secs = args.timeout.map(|timeout| timeout.ceil().max(1.0) as u64);
    if args.tty || args.interactive {
        check(ask, args.tty)?;
        let (command, cwd) = (Some(args.command), args.cwd);
        let body = AttachBody { command, env, cwd, timeout_secs, tty: None };
        return ended(attached(ask, &path, body, args.tty).await?);
    }
    let mut body = json!({ "command": args.command, "env": env });
    if let Some(cwd) = args.cwd {
        body["cwd"] = cwd.into();
    }
    if let Some(timeout) = timeout_secs {
        body["timeout_secs"] = timeout.into();
    }
    tokio::select! {
        done = follow(ask, &path, body) => ended(done?),
        _ = tokio::signal::ctrl_c() => {
            say("interrupted: the command goes on inside, and its output goes to the logs");
            Err(Failure::Exit(EXIT_INTERRUPTED))
        }
    }
}

/// Refuses what can't be asked for from here.
pub fn check(ask: &Ask, tty: bool) -> Result<()> {
    if tty { terminal::check(ask) } else { attach::check(ask) }
}

/// Stays with a command, at this terminal or with standard input as it is, until it has ended.
pub async fn attached(ask: &Ask, path: &str, body: AttachBody, tty: bool) -> Result<ExecDone> {
    match tty {
        true => terminal::run(ask, path, &AttachBody { tty: Some(terminal::here()), ..body }).await,
        false => attach::run(ask, path, &body).await,
    }
}

async fn follow(ask: &Ask, path: &str, body: Value) -> Result<ExecDone> {
    let mut lines = ask.client.lines(Method::POST, path, Some(body)).await?;
    while let Some(line) = lines.next().await? {
        if ask.format == Format::Json {
            output::data(&[&line[..], b"\n"].concat())?;
        }
        match read(&line)? {
            Line::Output(entry) if ask.format == Format::Human => show(&entry)?,
            Line::Done(done) => return Ok(done),
            Line::Output(_) | Line::Other => {}
        }
    }
    Err(Failure::here("the stream ended before the command did")
        .fix("the daemon may have been stopped; its logs have the output: aegis logs NAME"))
}

/// An entry's exact bytes to where they belong.
pub fn show(entry: &Entry) -> Result<()> {
    match entry.stream {
        Stream::Stdout => output::data(&entry.bytes()),
        Stream::Stderr => output::data_err(&entry.bytes()),
    }
}

fn ended(done: ExecDone) -> Result<()> {
    match (done.exit_code, done.error) {
        (Some(0), _) => Ok(()),
        (Some(code), why) => {
            if let Some(why) = why {
                say(&format!("aegis: {why}"));
            }
            Err(Failure::Exit(as_exit_code(code)))
        }
        (None, why) => Err(Failure::here(why.unwrap_or_else(|| "the command did not end".into()))),
    }
}

/// A process's exit code as ours; one that fits no byte must not become success.
pub fn as_exit_code(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(EXIT_OTHER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_told_apart() {
        let start = br#"{"exec_id":"x","started_at":"2026-02-18T00:00:00Z"}"#;
        assert!(matches!(read(start), Ok(Line::Other)));
        let entry = br#"{"ts":"2026-02-18T00:00:00Z","stream":"stderr","source":"exec","line":"a?",
            "data_b64":"Yf8=","partial":true,"instance_id":"inst-01ARZ3NDEKTSV4RRFFQ69G5FAV","exec_id":"x"}"#;
        let Ok(Line::Output(entry)) = read(entry) else { panic!("an entry") };
        assert_eq!(entry.bytes(), b"a\xff");
        let done = br#"{"exec_id":"x","exit_code":7,"done":true}"#;
        let Ok(Line::Done(done)) = read(done) else { panic!("the end") };
        assert_eq!(ended(done).unwrap_err().exit_code(), 7);
        assert!(read(b"nonsense").is_err());
    }

    #[test]
    fn no_odd_exit_code_becomes_success() {
        assert_eq!(as_exit_code(137), 137);
        assert_eq!(as_exit_code(256), 1);
        assert_eq!(as_exit_code(-1), 1);
        let lost = ExecDone { exec_id: "x".into(), exit_code: None, done: true, error: None };
        assert_eq!(ended(lost).unwrap_err().exit_code(), 1);
    }
}
