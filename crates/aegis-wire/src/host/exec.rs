//! Commands that run beside the primary process: as they are asked for, and what the client of a
//! terminal says meanwhile.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bounds::{COMMAND_BYTES_MAX, COMMAND_WORDS_MAX};
use crate::channel::{ExecStart, Tty, WindowSize};
use crate::refusal::Refusal;

/// Body of `POST /v1/instances/{id}/exec`.
#[derive(Clone, Debug, Deserialize)]
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
    /// A terminal needs both directions: `true` is refused here, see [`TerminalBody`].
    #[serde(default)]
    pub tty: bool,
    /// The process group is killed after this long; 1 second to 30 days.
    #[serde(default)]
    pub timeout_secs: Option<u64>,
}

impl ExecBody {
    /// Parses every field.
    pub fn parse(self) -> Result<ExecStart, Refusal> {
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
        })
    }
}

/// First message of `GET /v1/instances/{id}/exec` as a WebSocket: a command at a terminal.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TerminalBody {
    /// As in [`ExecBody::command`].
    pub command: Vec<String>,
    /// As in [`ExecBody::env`].
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// As in [`ExecBody::cwd`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// As in [`ExecBody::timeout_secs`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_secs: Option<u64>,
    /// The terminal.
    pub tty: Tty,
}

impl TerminalBody {
    /// Parses every field.
    pub fn parse(self) -> Result<ExecStart, Refusal> {
        let TerminalBody { command, env, cwd, timeout_secs, tty } = self;
        let start = ExecBody { command, env, cwd, tty: false, timeout_secs }.parse()?;
        Ok(ExecStart { tty: Some(tty), ..start })
    }
}

/// Every later message of text from the client of a terminal; what is typed comes as bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TerminalControl {
    /// Its window has this size now.
    Resize(WindowSize),
}

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
        let parse = |text: &str| serde_json::from_str::<TerminalBody>(text);
        let good = r#"{"command":["sh"],"tty":{"size":{"rows":50,"cols":132},"term":"xterm"}}"#;
        let start = parse(good).unwrap().parse().unwrap();
        assert_eq!(start.tty.unwrap().size, WindowSize::new(50, 132).unwrap());
        for bad in [
            r#"{"command":["sh"]}"#,
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
        let parse = |text: &str| serde_json::from_str::<TerminalControl>(text);
        let size = WindowSize::new(30, 100).unwrap();
        let text = r#"{"resize":{"rows":30,"cols":100}}"#;
        assert_eq!(parse(text).unwrap(), TerminalControl::Resize(size));
        assert_eq!(serde_json::to_string(&TerminalControl::Resize(size)).unwrap(), text);
        for bad in ["", "{}", "[]", r#"{"resize":{"rows":99999,"cols":1}}"#, r#"{"signal":9}"#] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
