//! Why a command did not do what was asked: always a sentence, where possible with its fix.

use std::path::Path;

use serde_json::{Map, Value, json};

/// Exit code of a wrong invocation (contracts/aegis.md 1).
pub const EXIT_USAGE: u8 = 2;
/// Exit code of everything else that went wrong.
pub const EXIT_OTHER: u8 = 1;
/// Exit code after Ctrl-C: 128 + SIGINT, as shells have it.
pub const EXIT_INTERRUPTED: u8 = 130;

/// Result of a command.
pub type Result<T, E = Failure> = std::result::Result<T, E>;

/// Why not.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The invocation makes no sense, though its flags are known ones.
    #[error("{0}")]
    Usage(String),
    /// The daemon said no.
    #[error("{}", .0.sentence)]
    Refused(Refused),
    /// Something here went wrong.
    #[error("{what}")]
    Here {
        /// One sentence.
        what: String,
        /// What to do about it.
        fix: Option<String>,
        /// What the system said.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// All that was to be said has been said; only the exit code is left.
    #[error("exit code {0}")]
    Exit(u8),
}

/// An error answer of the API.
#[derive(Debug)]
pub struct Refused {
    /// HTTP status.
    pub status: u16,
    /// `error`: a sentence for people.
    pub sentence: String,
    /// The whole answer: `code`, `hint`, and what else it says.
    pub body: Map<String, Value>,
}

impl Failure {
    /// Something here went wrong, and no system call is to blame.
    pub fn here(what: impl Into<String>) -> Failure {
        Failure::Here { what: what.into(), fix: None, source: None }
    }

    /// The same with the system's own words.
    pub fn because(
        what: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Failure {
        Failure::Here { what: what.into(), fix: None, source: Some(source.into()) }
    }

    /// A file could not be read, written, made or moved.
    pub fn file(verb: &str, path: &Path, source: std::io::Error) -> Failure {
        Failure::because(format!("cannot {verb} {}", path.display()), source)
    }

    /// Adds what to do about it.
    pub fn fix(self, fix: impl Into<String>) -> Failure {
        match self {
            Failure::Here { what, source, .. } => {
                Failure::Here { what, fix: Some(fix.into()), source }
            }
            other => other,
        }
    }

    /// The program's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Failure::Usage(_) => EXIT_USAGE,
            Failure::Exit(code) => *code,
            Failure::Refused(_) | Failure::Here { .. } => EXIT_OTHER,
        }
    }

    /// The words for people; empty when all was said.
    pub fn words(&self) -> String {
        match self {
            Failure::Exit(_) => String::new(),
            Failure::Usage(what) => format!("error: {what}\n"),
            Failure::Refused(refused) => {
                let mut words = format!("error: {}\n", refused.sentence);
                if let Some(code) = refused.body.get("code").and_then(Value::as_str) {
                    words += &format!("  code: {code} (HTTP {})\n", refused.status);
                }
                for (name, value) in &refused.body {
                    if !matches!(name.as_str(), "error" | "code" | "hint") && !value.is_null() {
                        words += &format!("  {name}: {}\n", crate::output::plain(value));
                    }
                }
                if let Some(hint) = refused.body.get("hint").and_then(Value::as_str) {
                    words += &format!("  hint: {hint}\n");
                }
                words
            }
            Failure::Here { what, fix, source } => {
                let mut words = format!("error: {what}");
                let mut cause: Option<&dyn std::error::Error> = source.as_deref().map(|e| e as _);
                while let Some(error) = cause {
                    words += &format!(": {error}");
                    cause = error.source();
                }
                words.push('\n');
                if let Some(fix) = fix {
                    words += &format!("  fix: {fix}\n");
                }
                words
            }
        }
    }

    /// The same for programs.
    pub fn json(&self) -> Value {
        match self {
            Failure::Refused(refused) => Value::Object(refused.body.clone()),
            Failure::Exit(code) => json!({ "exit_code": code }),
            Failure::Usage(what) => json!({ "error": what, "code": "usage" }),
            Failure::Here { what, fix, source } => {
                let error = match source {
                    Some(source) => format!("{what}: {source}"),
                    None => what.clone(),
                };
                json!({ "error": error, "code": "local", "hint": fix })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_name_the_fix() {
        let failure =
            Failure::because("cannot open x", std::io::Error::other("not there")).fix("make it");
        assert_eq!(failure.words(), "error: cannot open x: not there\n  fix: make it\n");
        assert_eq!(failure.exit_code(), 1);
        assert_eq!(Failure::Usage("no".into()).exit_code(), 2);
        assert_eq!(Failure::Exit(7).exit_code(), 7);
    }

    #[test]
    fn a_refusal_shows_all_that_it_says() {
        let Value::Object(body) = json!({ "error": "no such invite", "code": "not_found", "field": "id", "hint": "list" })
        else {
            panic!("an object");
        };
        let refused =
            Failure::Refused(Refused { status: 404, sentence: "no such invite".into(), body });
        assert_eq!(
            refused.words(),
            "error: no such invite\n  code: not_found (HTTP 404)\n  field: id\n  hint: list\n"
        );
    }
}
