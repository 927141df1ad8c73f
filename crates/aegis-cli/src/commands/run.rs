//! `aegis run`: a command in a machine of its own, which is gone afterwards, however it ends.

use std::collections::BTreeMap;
use std::time::Duration;

use aegis_wire::host::AttachBody;
use aegis_wire::logs::Source;
use clap::Args;
use hyper::Method;
use serde_json::{Value, json};

use super::ends::Ends;
use super::shape::Shape;
use super::{Ask, exec, image, logs, text};
use crate::failure::{Failure, Result};
use crate::output::{self, Format, say};
use aegis_wire::path::escape;

/// The record of an end may follow the log's end by a moment; it is asked for this often…
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// … and this many times.
const ASK_TIMES: u32 = 200;

/// What `aegis run` takes.
#[derive(Args, Debug)]
#[command(after_help = "\
The machine is made, the command's output is shown, its exit code becomes ours, and the machine is \
deleted; also on Ctrl-C, and when the terminal goes away. With -i or -t the command starts once this \
program is attached to it, and is hung up when this ends.

Examples:
  aegis run -- uname -a
  aegis run --memory 512M --cpus 1 -- python3 -c 'print(6 * 7)'
  aegis run --image python:3.12-alpine -- python3 -V     pulled, if it is not there
  aegis run -it -- bash
  echo hi | aegis run -i -- cat
  aegis run --env WHO=me -- sh -c 'echo $WHO; exit 3'; echo $?")]
pub struct RunArgs {
    #[command(flatten)]
    shape: Shape,
    /// Pass standard input on to it, until its end
    #[arg(long, short)]
    interactive: bool,
    /// Run it at a terminal: this one
    #[arg(long, short)]
    tty: bool,
    /// The command and its arguments, after `--` [default: the image's own]
    #[arg(last = true, required_unless_present_any = ["kit", "image", "commit"], value_name = "COMMAND")]
    command: Vec<String>,
}

/// How it ended.
struct End {
    code: Option<i32>,
    message: Option<String>,
}

/// Runs it.
pub async fn run(ask: &Ask, args: RunArgs) -> Result<()> {
    let mut ends = Ends::listen()?;
    let attach = args.interactive || args.tty;
    let mut body = args.shape.body(ask, &args.command).await?;
    if attach {
        exec::check(ask, args.tty)?;
        body["attach"] = true.into();
    }
    image::provide(ask, &body).await?;
    let created = ask.client.post("/v1/instances", Some(body)).await?;
    let id = text(&created, "id");
    let end = async {
        match attach {
            true => stay(ask, &id, args.tty).await,
            false => follow(ask, &id).await,
        }
    };
    let end = tokio::select! {
        end = end => end,
        code = ends.first() => Err(Failure::Exit(code)),
    };
    // However it ended, nothing stays behind.
    let deleted = ask.client.delete(&format!("/v1/instances/{}", escape(&id))).await;
    let end = end?;
    match deleted {
        Ok(_) => {}
        Err(Failure::Refused(refused)) if refused.status == 404 => {}
        Err(failure) => {
            say(&format!("{id} could not be deleted; later: aegis instance delete {id}"));
            return Err(failure);
        }
    }
    if ask.format == Format::Json {
        output::print_json(&json!({ "id": id, "exit_code": end.code, "message": end.message }))?;
    }
    match end {
        End { code: Some(0), .. } => Ok(()),
        End { code: Some(code), .. } => Err(Failure::Exit(exec::as_exit_code(code))),
        End { message, .. } => {
            Err(Failure::here(message.unwrap_or_else(|| "the machine ended early".into())))
        }
    }
}

/// Stays with its command, which waits for that, until it ended.
async fn stay(ask: &Ask, id: &str, tty: bool) -> Result<End> {
    let path = format!("/v1/instances/{}/exec", escape(id));
    let own = AttachBody {
        command: None,
        env: BTreeMap::new(),
        cwd: None,
        timeout_secs: None,
        tty: None,
    };
    let done = exec::attached(ask, &path, own, tty).await?;
    Ok(End { code: done.exit_code, message: done.error })
}

/// Shows its output until it ended.
async fn follow(ask: &Ask, id: &str) -> Result<End> {
    let path = format!("/v1/instances/{}/logs?follow=true", escape(id));
    let mut lines = ask.client.lines(Method::GET, &path, None).await?;
    while let Some(line) = lines.next().await? {
        let entry = logs::parse(&line)?;
        // Data goes to stdout; with --json that is the answer at the end, so output moves over.
        match (entry.source, ask.format) {
            (Source::Server, Format::Human) => exec::show(&entry)?,
            (Source::Server, Format::Json) => output::data_err(&entry.bytes())?,
            (Source::Exec | Source::System, _) => {}
        }
    }
    let path = format!("/v1/instances/{}", escape(id));
    for _ in 0..ASK_TIMES {
        let instance = ask.client.get(&path).await?;
        if text(&instance, "state") == "stopped" {
            return Ok(end_of(&instance));
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
    Err(Failure::here("the machine's log ended, but the machine did not")
        .fix("look at it: aegis instance list"))
}

fn end_of(instance: &Value) -> End {
    let exit = instance.get("exit");
    let code = exit.and_then(|exit| exit.get("code")).and_then(Value::as_i64);
    let message = exit
        .and_then(|exit| exit.get("message"))
        .or_else(|| instance.get("error"))
        .and_then(Value::as_str);
    End { code: code.and_then(|c| i32::try_from(c).ok()), message: message.map(str::to_owned) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_read() {
        let end = end_of(&json!({"exit": {"code": 3, "message": "exited", "at": "x"}}));
        assert_eq!(end.code, Some(3));
        let end = end_of(&json!({"error": "no room"}));
        assert_eq!((end.code, end.message.as_deref()), (None, Some("no room")));
    }
}
