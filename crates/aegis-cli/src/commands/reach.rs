//! `aegis guest denials|requests|grant|deny|egress|limits`: what a guest may reach and spend,
//! looked at and changed while it lives.

use aegis_wire::path::escape;
use clap::{Args, Subcommand};
use hyper::Method;
use serde_json::{Value, json};

use super::guest::status_fields;
use super::invite::yes_or_no;
use super::{Ask, items, maybe, text, when};
use crate::failure::{Failure, Result};
use crate::human::parse_gb;
use crate::output::{fields, table};

/// What can be asked about a guest's reach.
#[derive(Subcommand, Debug)]
pub enum ReachCommand {
    /// Show what its machines were refused, and by which rule
    Denials {
        /// Its id
        id: String,
    },
    /// Show what its machines asked for
    Requests {
        /// Its id
        id: String,
    },
    /// Give what a request asks for
    Grant {
        /// The guest's id
        id: String,
        /// The request's number: aegis guest requests
        number: u32,
    },
    /// Do not
    Deny {
        /// The guest's id
        id: String,
        /// The request's number
        number: u32,
    },
    /// Show or set what its machines may reach
    #[command(after_help = "\
Without flags it shows. Takes effect at once, on open connections too. Loopback, private, link-local \
and metadata addresses, and the host's own, are never reachable.

Examples:
  aegis guest egress ID --allow pypi.org --allow '*.pythonhosted.org:443'
  aegis guest egress ID --allow 203.0.113.0/24
  aegis guest egress ID --all-public
  aegis guest egress ID --none")]
    Egress {
        /// Its id
        id: String,
        #[command(flatten)]
        to: EgressArgs,
    },
    /// Set its limits anew, higher or lower; one that froze it is thawed when it is raised
    Limits {
        /// Its id
        id: String,
        #[command(flatten)]
        to: LimitsArgs,
    },
}

/// What may be reached.
#[derive(Args, Debug)]
#[group(multiple = false)]
pub struct EgressArgs {
    /// Only this: a name, *.name, a network, with :PORT or without (may be repeated)
    #[arg(long, value_name = "WHAT")]
    allow: Vec<String>,
    /// Everything public
    #[arg(long)]
    all_public: bool,
    /// Nothing
    #[arg(long)]
    none: bool,
}

/// Which limits.
#[derive(Args, Debug)]
#[group(required = true, multiple = true)]
pub struct LimitsArgs {
    /// What may be sent to the internet in all (10G)
    #[arg(long, value_name = "SIZE", value_parser = parse_gb)]
    egress: Option<f64>,
    /// LLM tokens in all
    #[arg(long, value_name = "NUMBER")]
    tokens: Option<u64>,
    /// Hours from the redeem on
    #[arg(long, value_name = "NUMBER")]
    hours: Option<f64>,
}

/// Asks.
pub async fn run(ask: &Ask, command: ReachCommand) -> Result<()> {
    let path = |id: &str, rest: &str| format!("/couch/guests/{}/{rest}", escape(id));
    match command {
        ReachCommand::Denials { id } => {
            let answer = ask.client.get(&path(&id, "denials")).await?;
            ask.format.answer(&answer, || denials(&answer))
        }
        ReachCommand::Requests { id } => {
            let answer = ask.client.get(&path(&id, "requests")).await?;
            ask.format.answer(&answer, || requests(items(&answer, "requests")))
        }
        ReachCommand::Grant { id, number } => {
            let decided = path(&id, &format!("requests/{number}/grant"));
            let answer = ask.client.post(&decided, None).await?;
            ask.format.answer(&answer, || requests(std::slice::from_ref(&answer)))
        }
        ReachCommand::Deny { id, number } => {
            let decided = path(&id, &format!("requests/{number}/deny"));
            let answer = ask.client.post(&decided, None).await?;
            ask.format.answer(&answer, || requests(std::slice::from_ref(&answer)))
        }
        ReachCommand::Egress { id, to } => {
            let body = match to {
                EgressArgs { none: true, .. } => Some(json!({ "internet": false, "allow": [] })),
                EgressArgs { all_public: true, .. } => Some(json!({ "internet": true })),
                EgressArgs { allow, .. } if !allow.is_empty() => {
                    Some(json!({ "internet": true, "allow": allow }))
                }
                EgressArgs { .. } => None,
            };
            let method = if body.is_some() { Method::PUT } else { Method::GET };
            let answer = ask.client.ask(method, &path(&id, "egress"), body, &[]).await?;
            ask.format.answer(&answer, || egress(&answer))
        }
        ReachCommand::Limits { id, to } => {
            let mut body = json!({});
            let named = [
                ("maxNetworkEgressGB", to.egress.map(Value::from)),
                ("maxTokenBudget", to.tokens.map(Value::from)),
                ("maxDurationHours", to.hours.map(Value::from)),
            ];
            for (name, value) in named.into_iter().filter_map(|(n, v)| Some((n, v?))) {
                body[name] = value;
            }
            if body.as_object().is_none_or(serde_json::Map::is_empty) {
                return Err(Failure::Usage("name at least one limit".into()));
            }
            let guest = ask.client.ask(Method::PUT, &path(&id, "limits"), Some(body), &[]).await?;
            ask.format.answer(&guest, || status_fields(&guest))
        }
    }
}

fn egress(answer: &Value) -> String {
    let allow = match (answer.get("internet").and_then(Value::as_bool), answer.get("allow")) {
        (Some(true), Some(Value::Array(list))) => {
            let words: Vec<&str> = list.iter().filter_map(Value::as_str).collect();
            if words.is_empty() { "nothing".to_owned() } else { words.join(", ") }
        }
        (Some(true), _) => "all public addresses".to_owned(),
        _ => "nothing".to_owned(),
    };
    fields(&[("Reaches", allow)])
}

fn denials(answer: &Value) -> String {
    let rows = items(answer, "denials").iter().map(|denial| {
        vec![
            when(denial, "at"),
            text(denial, "method"),
            text(denial, "rule"),
            text(denial, "requested"),
            text(denial, "allowed"),
            text(denial, "count"),
        ]
    });
    table(&["when", "what", "rule", "requested", "allowed", "times"], rows.collect())
}

fn requests(all: &[Value]) -> String {
    let rows = all.iter().map(|request| {
        let limits = request.get("resourceLimits").and_then(Value::as_object);
        let limits = limits.into_iter().flatten().map(|(name, value)| format!("{name}={value}"));
        let egress = items(request, "egress").iter().filter_map(Value::as_str).map(str::to_owned);
        vec![
            text(request, "number"),
            text(request, "status"),
            egress.chain(limits).collect::<Vec<_>>().join(", "),
            maybe(request, "reason"),
            when(request, "at"),
        ]
    });
    table(&["number", "status", "asks for", "reason", "when"], rows.collect())
}

/// What a new machine may reach, for `POST /v1/instances`.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "What it may reach")]
pub struct Reach {
    /// Whether it may reach the internet [default: yes, public addresses]
    #[arg(long, value_name = "yes|no", value_parser = yes_or_no)]
    internet: Option<bool>,
    /// Only this: a name, *.name, a network, with :PORT or without (may be repeated)
    #[arg(long, value_name = "WHAT")]
    allow: Vec<String>,
}

impl Reach {
    /// Sets what was said.
    pub fn set(self, to: &mut Value) {
        if let Some(internet) = self.internet {
            to["internet"] = internet.into();
        }
        if !self.allow.is_empty() {
            to["allow"] = json!(self.allow);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reached_is_said_in_words() {
        let words = |answer| egress(&answer);
        assert!(words(json!({ "internet": true, "allow": null })).contains("all public"));
        assert!(words(json!({ "internet": true, "allow": ["a.test"] })).contains("a.test"));
        assert!(words(json!({ "internet": true, "allow": [] })).contains("nothing"));
        assert!(words(json!({ "internet": false, "allow": null })).contains("nothing"));
    }

    #[test]
    fn a_request_shows_what_it_asks_for() {
        let request = json!({ "number": 1, "status": "open", "egress": ["pypi.org"],
            "resourceLimits": { "maxTokenBudget": 1000 }, "reason": "pip", "at": "2026-01-01T00:00:00.000Z" });
        let words = requests(&[request]);
        for part in ["pypi.org", "maxTokenBudget=1000", "pip", "open"] {
            assert!(words.contains(part), "{part} in {words}");
        }
    }
}
