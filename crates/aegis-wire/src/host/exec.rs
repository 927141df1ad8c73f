//! Commands that run beside the primary process: as they are asked for, and what a client that is
//! attached to one says meanwhile.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::bounds::{COMMAND_BYTES_MAX, COMMAND_WORDS_MAX, STDIN_GIVEN_MAX};
use crate::channel::{ExecStart, Tty, WindowSize};
use crate::refusal::Refusal;

/// Body of `POST /v1/instances/{id}/exec`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecBody {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Added to the primary process's environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory.
    #[serde(default)]
    pub cwd: Option<String>,
    /// A terminal needs both directions: `true` is refused here, see [`AttachBody`].
    #[serde(default)]
    pub tty: bool,
    /// The process group is killed after this long; 1 second to 30 days.
    #[serde(default)]
    pub timeout_secs: Option<u64>,
    /// All that it reads, as text.
    #[serde(default)]
    pub stdin: Option<String>,
    /// The same, base64.
    #[serde(default)]
    pub stdin_b64: Option<String>,
}

/// A command and all that it reads.
#[derive(Clone, Debug, PartialEq)]
pub struct Exec {
    /// The command.
    pub start: ExecStart,
    /// What it reads, base64.
    pub stdin: String,
}

impl ExecBody {
    /// Parses every field.
    pub fn parse(self) -> Result<Exec, Refusal> {
        let stdin = stdin(self.stdin.as_deref(), self.stdin_b64.clone())?;
        Ok(Exec { start: self.start()?, stdin })
    }

    fn start(self) -> Result<ExecStart, Refusal> {
        check_command(&self.command, &self.env)?;
        check_env(&self.env)?;
        if self.tty {
            let way = "false: a terminal is asked for by a WebSocket, GET on this path";
            return Err(Refusal::field("tty", way));
        }
        if self.timeout_secs.is_some_and(|s| s == 0 || s > 30 * 86_400) {
            return Err(Refusal::field("timeout_secs", "a whole number from 1 to 2592000"));
        }
        Ok(ExecStart {
            command: self.command,
            env: self.env,
            cwd: check_cwd(self.cwd)?,
            timeout_secs: self.timeout_secs,
            tty: None,
            attached: false,
        })
    }
}

/// Input that is said with its command.
fn stdin(text: Option<&str>, b64: Option<String>) -> Result<String, Refusal> {
    let bounded = |len: usize, field: &str, b64: String| match len <= STDIN_GIVEN_MAX {
        true => Ok(b64),
        false => {
            let way = format!("at most {STDIN_GIVEN_MAX} bytes; more goes by a WebSocket");
            Err(Refusal::field(field, way))
        }
    };
    match (text, b64) {
        (None, None) => Ok(String::new()),
        (Some(text), None) => bounded(text.len(), "stdin", STANDARD.encode(text)),
        (None, Some(b64)) => match STANDARD.decode(&b64) {
            Ok(bytes) => bounded(bytes.len(), "stdin_b64", b64),
            Err(_) => Err(Refusal::field("stdin_b64", "base64, with its padding")),
        },
        (Some(_), Some(_)) => Err(Refusal::field("stdin_b64", "left out where stdin is given")),
    }
}

/// First message of `GET /v1/instances/{id}/exec` as a WebSocket: a command whose client stays with
/// it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachBody {
    /// As in [`ExecBody::command`]; without one the machine's own, which waits for this
    /// ([`super::CreateBody::attach`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// As in [`ExecBody::env`].
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// As in [`ExecBody::cwd`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// As in [`ExecBody::timeout_secs`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_secs: Option<u64>,
    /// The terminal; without one it reads and writes pipes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty: Option<Tty>,
}

impl AttachBody {
    /// Parses every field.
    pub fn parse(self) -> Result<ExecStart, Refusal> {
        let AttachBody { command, env, cwd, timeout_secs, tty } = self;
        let own = command.is_none();
        // One that passes, in the place of that which nobody says.
        let command = command.unwrap_or_else(|| vec!["own".to_owned()]);
        let body = ExecBody { command, env, cwd, timeout_secs, ..ExecBody::default() };
        let mut start = ExecStart { attached: tty.is_none(), tty, ..body.start()? };
        if own {
            start.command.clear();
        }
        Ok(start)
    }
}

/// Every later message of text from an attached client; its command's input comes as bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AttachControl {
    /// Its terminal's window has this size now.
    Resize(WindowSize),
    /// There is no more input; output still comes. Not of a terminal, where that is a key.
    StdinEnd,
}

/// First byte of a message with bytes of standard output, where there is no terminal…
pub const ATTACHED_STDOUT: u8 = 1;
/// … and of standard error.
pub const ATTACHED_STDERR: u8 = 2;

pub(super) fn check_command(
    command: &[String],
    env: &BTreeMap<String, String>,
) -> Result<(), Refusal> {
    let bytes: usize = command.iter().map(String::len).sum::<usize>()
        + env.iter().map(|(k, v)| k.len() + v.len() + 2).sum::<usize>();
    if command.is_empty()
        || command[0].is_empty()
        || command.len() > COMMAND_WORDS_MAX
        || bytes > COMMAND_BYTES_MAX
        || command.iter().any(|w| w.contains('\0'))
    {
        return Err(Refusal::field(
            "command",
            format!(
                "1 to {COMMAND_WORDS_MAX} words, the first not empty, without NUL, together with \
                 env at most {COMMAND_BYTES_MAX} bytes"
            ),
        ));
    }
    Ok(())
}

pub(super) fn check_env(env: &BTreeMap<String, String>) -> Result<(), Refusal> {
    let bad = |k: &String, v: &String| k.is_empty() || k.contains(['=', '\0']) || v.contains('\0');
    match env.iter().find(|(k, v)| bad(k, v)) {
        None => Ok(()),
        Some((key, _)) => Err(Refusal::field(
            format!("env.{}", key.chars().take(64).collect::<String>()),
            "a name without = and a value, both without NUL",
        )),
    }
}

pub(super) fn check_cwd(cwd: Option<String>) -> Result<Option<String>, Refusal> {
    match cwd {
        Some(dir) if !dir.starts_with('/') || dir.len() > 4096 || dir.contains('\0') => {
            Err(Refusal::field("cwd", "an absolute path of at most 4096 bytes"))
        }
        other => Ok(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_is_checked_as_a_command_and_for_its_size() {
        let parse = |text: &str| serde_json::from_str::<AttachBody>(text);
        let good = r#"{"command":["sh"],"tty":{"size":{"rows":50,"cols":132},"term":"xterm"}}"#;
        let start = parse(good).unwrap().parse().unwrap();
        assert_eq!(start.tty.unwrap().size, WindowSize::new(50, 132).unwrap());
        assert!(!start.attached);
        let start = parse(r#"{"command":["sh"]}"#).unwrap().parse().unwrap();
        assert!(start.attached && start.tty.is_none());
        let own = parse(r#"{"cwd":"/tmp"}"#).unwrap().parse().unwrap();
        assert!(own.attached && own.command.is_empty());
        assert!(parse(r#"{"cwd":"tmp"}"#).unwrap().parse().is_err());
        for bad in [
            r#"{"command":"sh"}"#,
            r#"{"command":["sh"],"tty":true}"#,
            r#"{"command":["sh"],"tty":{"size":{"rows":0,"cols":80}}}"#,
            r#"{"command":["sh"],"tty":{"size":{"rows":24,"cols":80},"term":"../x"}}"#,
            r#"{"command":["sh"],"tty":{"size":{"rows":24,"cols":80}},"more":1}"#,
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        let no_command = r#"{"command":[],"tty":{"size":{"rows":24,"cols":80}}}"#;
        assert!(parse(no_command).unwrap().parse().is_err());
    }

    #[test]
    fn controls_are_what_they_say() {
        let parse = |text: &str| serde_json::from_str::<AttachControl>(text);
        let size = WindowSize::new(30, 100).unwrap();
        let text = r#"{"resize":{"rows":30,"cols":100}}"#;
        assert_eq!(parse(text).unwrap(), AttachControl::Resize(size));
        assert_eq!(serde_json::to_string(&AttachControl::Resize(size)).unwrap(), text);
        assert_eq!(parse(r#""stdin_end""#).unwrap(), AttachControl::StdinEnd);
        for bad in ["", "{}", "[]", r#"{"resize":{"rows":99999,"cols":1}}"#, r#"{"signal":9}"#] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn input_is_bounded_whichever_way_it_is_said() {
        let parse = |text: Option<String>, b64: Option<String>| {
            let command = vec!["cat".to_owned()];
            ExecBody { command, stdin: text, stdin_b64: b64, ..ExecBody::default() }.parse()
        };
        assert_eq!(parse(None, None).unwrap().stdin, "");
        assert_eq!(parse(Some("hi\n".into()), None).unwrap().stdin, "aGkK");
        assert_eq!(parse(None, Some("aGkK".into())).unwrap().stdin, "aGkK");
        let most = vec![0xff; STDIN_GIVEN_MAX];
        assert!(parse(None, Some(STANDARD.encode(&most))).is_ok());
        for bad in [
            parse(Some("x".repeat(STDIN_GIVEN_MAX + 1)), None),
            parse(None, Some(STANDARD.encode([most, vec![0]].concat()))),
            parse(None, Some("no base64".into())),
            parse(Some("a".into()), Some("aGkK".into())),
        ] {
            assert!(bad.unwrap_err().message.contains("stdin"));
        }
    }
}
