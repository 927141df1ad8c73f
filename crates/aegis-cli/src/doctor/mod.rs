//! `aegis doctor`: what this host has, what each lack costs, and what to do about it.

mod checks;

use serde::Serialize;
use serde_json::json;

use crate::failure::{EXIT_OTHER, Failure, Result};
use crate::home::Home;
use crate::output::{Format, table};

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// No lack of the host: a fact worth knowing.
    Note,
    /// Machines run, but something is worse than it could be.
    Warning,
    /// Machines can't run without it.
    Missing,
}

/// One row.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// How it came out.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What the lack costs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub costs: Option<String>,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Check {
    /// As it should be.
    pub fn ok(name: &'static str, found: impl Into<String>) -> Check {
        Check { name, verdict: Verdict::Ok, found: found.into(), costs: None, fix: None }
    }

    /// Not as it should be.
    pub fn lack(
        name: &'static str,
        verdict: Verdict,
        found: impl Into<String>,
        costs: impl Into<String>,
        fix: impl Into<String>,
    ) -> Check {
        let (costs, fix) = (Some(costs.into()), Some(fix.into()));
        Check { name, verdict, found: found.into(), costs, fix }
    }
}

/// Looks at everything; the exit code says whether machines can run.
pub fn run(home: &Home, format: Format) -> Result<()> {
    let checks = checks::all(home);
    let ready = !checks.iter().any(|check| check.verdict == Verdict::Missing);
    let report = json!({ "ready": ready, "home": home.root(), "checks": checks });
    format.answer(&report, || words(&checks, ready))?;
    if ready { Ok(()) } else { Err(Failure::Exit(EXIT_OTHER)) }
}

fn words(checks: &[Check], ready: bool) -> String {
    let word = |verdict| match verdict {
        Verdict::Ok => "ok",
        Verdict::Note => "note",
        Verdict::Warning => "warning",
        Verdict::Missing => "MISSING",
    };
    let rows = checks.iter().map(|check| {
        let mut what = check.found.clone();
        if let Some(costs) = &check.costs {
            what += &format!("\n{costs}");
        }
        if let Some(fix) = check.fix.as_ref().filter(|fix| !fix.is_empty()) {
            what += &format!("\nfix: {fix}");
        }
        vec![check.name.to_owned(), word(check.verdict).to_owned(), what]
    });
    let mut text = table(&["check", "state", "what"], rows.collect());
    text += if ready {
        "\nMachines can run here.\n"
    } else {
        "\nMachines can't run here yet: mend what is MISSING.\n"
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_shows_its_cost_and_fix() {
        let checks = [
            Check::ok("kernel", "6.1"),
            Check::lack("QEMU", Verdict::Missing, "not there", "no machine runs", "install it"),
        ];
        let text = words(&checks, false);
        for part in ["kernel", "ok", "MISSING", "no machine runs", "fix: install it", "can't run"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
