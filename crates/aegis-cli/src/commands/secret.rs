//! `aegis secret …`: what the host keeps for its machines. Values come from stdin, never from argv.

use std::io::{IsTerminal as _, Read as _};

use aegis_wire::bounds::SECRET_VALUE_MAX;
use aegis_wire::path::escape;
use clap::{Args, Subcommand};
use hyper::Method;
use serde_json::{Value, json};

use super::{Ask, items, text, when};
use crate::failure::{Failure, Result};
use crate::output::{say, table};

/// What can be asked of secrets.
#[derive(Subcommand, Debug)]
pub enum SecretCommand {
    /// Keep one; the value is read from stdin, or asked for
    Set(SetArgs),
    /// List them, without their values
    #[command(visible_alias = "ls")]
    List,
    /// Forget one
    #[command(visible_alias = "rm")]
    Delete {
        /// Its name
        name: String,
    },
}

/// What `aegis secret set` takes.
#[derive(Args, Debug)]
#[command(after_help = "\
The value is what stdin holds, without one newline at its end; on a terminal it is asked for, and \
not shown. A machine that names the secret gets it as a variable of that name at its start.

With --proxy it gets a placeholder instead, which stands for the secret in the headers of plain HTTP \
requests to the hosts that are named, and nowhere else. Inside of TLS it can't be replaced.

Examples:
  pass show github | aegis secret set GITHUB_TOKEN
  aegis secret set OPENAI_API_KEY               asks for it
  aegis secret set API_KEY --proxy --host api.example.com < key
  aegis run --secret GITHUB_TOKEN -- sh -c 'curl -H \"Authorization: Bearer $GITHUB_TOKEN\" …'")]
pub struct SetArgs {
    /// Its name: A-Z, 0-9 and _
    name: String,
    /// Machines get a placeholder instead of it
    #[arg(long, requires = "host")]
    proxy: bool,
    /// Where the placeholder stands for it (may be repeated)
    #[arg(long, value_name = "NAME", requires = "proxy")]
    host: Vec<String>,
}

/// Asks.
pub async fn run(ask: &Ask, command: SecretCommand) -> Result<()> {
    match command {
        SecretCommand::Set(args) => set(ask, args).await,
        SecretCommand::List => {
            let kept = ask.client.get("/v1/secrets").await?;
            ask.format.answer(&kept, || words(&kept))
        }
        SecretCommand::Delete { name } => {
            let gone = ask.client.delete(&path(&name)).await?;
            ask.format.answer(&gone, || format!("{}\n", text(&gone, "status")))
        }
    }
}

fn path(name: &str) -> String {
    format!("/v1/secrets/{}", escape(name))
}

async fn set(ask: &Ask, args: SetArgs) -> Result<()> {
    let value = value(&args.name)?;
    let mut body = json!({ "value": value });
    if args.proxy {
        body["proxy"] = true.into();
        body["hosts"] = json!(args.host);
    }
    let kept = ask.client.ask(Method::PUT, &path(&args.name), Some(body), &[]).await?;
    ask.format.answer(&kept, || format!("Secret kept: {}\n", text(&kept, "name")))
}

fn value(name: &str) -> Result<String> {
    if std::io::stdin().is_terminal() {
        return rpassword::prompt_password(format!("{name} (is not shown): "))
            .map_err(|e| Failure::because("cannot read the secret from the terminal", e));
    }
    let mut bytes = Vec::new();
    std::io::stdin()
        .lock()
        .take(SECRET_VALUE_MAX as u64 + 2)
        .read_to_end(&mut bytes)
        .map_err(|e| Failure::because("cannot read the secret from stdin", e))?;
    let text = String::from_utf8(bytes).map_err(|_| {
        Failure::here("the secret is no text").fix("encode it, as base64 for instance")
    })?;
    Ok(trimmed(&text).to_owned())
}

/// Without the newline that `echo` puts at the end.
fn trimmed(text: &str) -> &str {
    let text = text.strip_suffix('\n').unwrap_or(text);
    text.strip_suffix('\r').unwrap_or(text)
}

fn words(kept: &Value) -> String {
    let rows: Vec<Vec<String>> = items(kept, "secrets")
        .iter()
        .map(|secret| {
            let hosts = items(&secret["hosts"], "").iter().map(crate::output::plain);
            let given = match secret["proxy"].as_bool() {
                Some(true) => format!("a placeholder for {}", hosts.collect::<Vec<_>>().join(", ")),
                _ => "the value".to_owned(),
            };
            vec![text(secret, "name"), given, when(secret, "updated_at")]
        })
        .collect();
    if rows.is_empty() {
        say("no secrets are kept; `aegis secret set NAME` keeps one");
        return String::new();
    }
    table(&["name", "machines get", "set"], rows)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[test]
    fn one_newline_at_the_end_is_echos() {
        for (text, value) in [
            ("a\n", "a"),
            ("a", "a"),
            ("a\r\n", "a"),
            ("a\n\n", "a\n"),
            ("\n", ""),
            ("a\nb", "a\nb"),
        ] {
            assert_eq!(trimmed(text), value, "{text:?}");
        }
    }

    #[test]
    fn no_value_is_taken_from_the_command_line() {
        #[derive(clap::Parser)]
        struct Whole {
            #[command(subcommand)]
            _command: SecretCommand,
        }
        for words in [&["x", "set", "A", "hush"][..], &["x", "set", "A", "--value", "hush"]] {
            assert!(Whole::try_parse_from(words).is_err());
        }
        for half in [&["x", "set", "A", "--proxy"][..], &["x", "set", "A", "--host", "h"]] {
            assert!(Whole::try_parse_from(half).is_err(), "{half:?}");
        }
        assert!(Whole::try_parse_from(["x", "set", "A", "--proxy", "--host", "h"]).is_ok());
    }
}
