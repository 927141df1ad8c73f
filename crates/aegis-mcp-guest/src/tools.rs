//! The tools: names, what an agent is told of each, and which call of the guest API it is.

mod arguments;
mod schema;

use hyper::Method;
use rmcp::model::ToolAnnotations;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use self::arguments::{Acquire, Child, Exec, Expose, Logs, Nothing, Spawn, Unexpose};
use crate::api::{Api, ApiError};
use crate::output;
use aegis_wire::path::escape;

/// What a lease lasts when an agent names no time, milliseconds.
const LEASE_MS: u64 = 300_000;
/// A command is killed after this long when an agent names no time, seconds: an agent that waits
/// for ever can't say so.
const EXEC_SECS: u64 = 600;
/// Log lines that an agent gets when it names no number.
const LOG_LINES: u64 = 200;

/// One tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// `instance_spawn`
    Spawn,
    /// `instance_list`
    List,
    /// `instance_info`
    Info,
    /// `instance_start`
    Start,
    /// `instance_stop`
    Stop,
    /// `instance_delete`
    Delete,
    /// `instance_exec`
    Exec,
    /// `instance_logs`
    Logs,
    /// `self_info`
    SelfInfo,
    /// `keepalive_acquire`
    Acquire,
    /// `keepalive_release`
    Release,
    /// `expose_port`
    Expose,
    /// `unexpose_port`
    Unexpose,
}

/// All of them, in the order in which an agent sees them (contracts/aegis.md 6).
const ALL: [Tool; 13] = [
    Tool::Spawn,
    Tool::List,
    Tool::Info,
    Tool::Start,
    Tool::Stop,
    Tool::Delete,
    Tool::Exec,
    Tool::Logs,
    Tool::SelfInfo,
    Tool::Acquire,
    Tool::Release,
    Tool::Expose,
    Tool::Unexpose,
];

impl Tool {
    /// What an instance sees: all when it may spawn, else the six of seeds/003.
    pub fn visible(spawn: bool) -> impl Iterator<Item = Tool> {
        ALL.into_iter().filter(move |tool| {
            spawn
                || matches!(
                    tool,
                    Tool::Spawn
                        | Tool::List
                        | Tool::Stop
                        | Tool::SelfInfo
                        | Tool::Acquire
                        | Tool::Release
                )
        })
    }

    /// The one of this name.
    pub fn named(name: &str) -> Option<Tool> {
        ALL.into_iter().find(|tool| tool.name() == name)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Tool::Spawn => "instance_spawn",
            Tool::List => "instance_list",
            Tool::Info => "instance_info",
            Tool::Start => "instance_start",
            Tool::Stop => "instance_stop",
            Tool::Delete => "instance_delete",
            Tool::Exec => "instance_exec",
            Tool::Logs => "instance_logs",
            Tool::SelfInfo => "self_info",
            Tool::Acquire => "keepalive_acquire",
            Tool::Release => "keepalive_release",
            Tool::Expose => "expose_port",
            Tool::Unexpose => "unexpose_port",
        }
    }

    fn description(self) -> &'static str {
        match self {
            Tool::Spawn => {
                "Spawn a child VM with command, image, workspace, exposed ports. Needs the spawn \
                 capability. Returns its id at once while it boots: ask instance_list until its \
                 state is running. A refusal (rule, requested, allowed, hint) says what would pass."
            }
            Tool::List => {
                "List the children of this instance (only your own, not all instances): id, \
                 handle, state (starting, running, paused, stopped), endpoints."
            }
            Tool::Info => {
                "Show all about one child: state, image, command, size, endpoints, and the exit \
                 code once its command ended."
            }
            Tool::Start => {
                "Start a stopped child again from its stored settings; its disk is kept."
            }
            Tool::Stop => {
                "Stop a child instance. Its record and disk stay: instance_start starts it again, \
                 instance_delete frees them."
            }
            Tool::Delete => {
                "Delete a child with its disk and all children of its own. Cannot be undone; frees \
                 what it held of your spending limit."
            }
            Tool::Exec => {
                "Run a command in a child and wait for its end: exit code, stdout and stderr. Of \
                 long output the beginning and the end are given. For a shell: command \
                 [\"sh\", \"-c\", \"…\"]."
            }
            Tool::Logs => {
                "Show the last log lines of a child: what its command and execs wrote, with times, \
                 and how its command ended."
            }
            Tool::SelfInfo => {
                "Get this instance's id, handle, state, endpoints, its capabilities (what it may \
                 spawn) and its envelope: limit, spent and left of CPUs, memory, disk, egress, time \
                 and tokens for itself and all its children together."
            }
            Tool::Acquire => {
                "Prevent that this instance is paused as idle during long work, for ttl_ms \
                 milliseconds. Call it again to renew. It does not make the instance live longer \
                 than the host allows."
            }
            Tool::Release => "Release the keepalive: this instance may be paused when it is idle.",
            Tool::Expose => {
                "Make a port on which a program of this instance listens reachable from outside. \
                 Returns the endpoint with its public port and URL."
            }
            Tool::Unexpose => "End what expose_port began: the port is reachable only inside.",
        }
    }

    /// Reads only, ends or deletes something, does nothing more when repeated.
    fn annotations(self) -> ToolAnnotations {
        let (reads, destroys, repeats) = match self {
            Tool::List | Tool::Info | Tool::Logs | Tool::SelfInfo => (true, false, true),
            Tool::Stop | Tool::Delete | Tool::Unexpose => (false, true, true),
            Tool::Exec => (false, true, false),
            Tool::Spawn => (false, false, false),
            Tool::Start | Tool::Acquire | Tool::Release | Tool::Expose => (false, false, true),
        };
        ToolAnnotations::new().read_only(reads).destructive(destroys).idempotent(repeats)
    }

    /// Its definition for the agent.
    pub fn define(self) -> rmcp::model::Tool {
        let schema = match self {
            Tool::Spawn => schema::of::<Spawn>(),
            Tool::Info | Tool::Start | Tool::Stop | Tool::Delete => schema::of::<Child>(),
            Tool::Exec => schema::of::<Exec>(),
            Tool::Logs => schema::of::<Logs>(),
            Tool::Acquire => schema::of::<Acquire>(),
            Tool::Expose => schema::of::<Expose>(),
            Tool::Unexpose => schema::of::<Unexpose>(),
            Tool::List | Tool::SelfInfo | Tool::Release => schema::of::<Nothing>(),
        };
        rmcp::model::Tool::new(self.name(), self.description(), schema)
            .with_annotations(self.annotations())
    }

    /// Does it. Results are objects, because that is what structured content may be.
    pub async fn call(self, api: &Api, arguments: Value) -> Result<Value, ApiError> {
        match self {
            Tool::Spawn => {
                let ask: Spawn = self.read(arguments)?;
                api.ask(Method::POST, "/v1/instances", Some(&json(&ask))).await
            }
            Tool::List => {
                let Nothing {} = self.read(arguments)?;
                let children = api.ask(Method::GET, "/v1/instances", None).await?;
                Ok(json!({ "instances": children }))
            }
            Tool::Info => self.child(api, arguments, Method::GET, "").await,
            Tool::Start => self.child(api, arguments, Method::POST, "/start").await,
            Tool::Stop => self.child(api, arguments, Method::POST, "/stop").await,
            Tool::Delete => self.child(api, arguments, Method::DELETE, "").await,
            Tool::Exec => {
                let mut ask: Exec = self.read(arguments)?;
                let path = format!("/v1/instances/{}/exec", escape(&ask.id));
                ask.timeout_secs = ask.timeout_secs.or(Some(EXEC_SECS));
                let body = json(&ask);
                output::exec(api.lines(Method::POST, &path, Some(&body)).await?).await
            }
            Tool::Logs => {
                let ask: Logs = self.read(arguments)?;
                let mut path = format!(
                    "/v1/instances/{}/logs?follow=false&tail={}",
                    escape(&ask.id),
                    ask.tail.unwrap_or(LOG_LINES)
                );
                for (name, value) in [("since", &ask.since), ("exec_id", &ask.exec_id)] {
                    if let Some(value) = value {
                        path += &format!("&{name}={}", escape(value));
                    }
                }
                output::logs(api.lines(Method::GET, &path, None).await?).await
            }
            Tool::SelfInfo => {
                let Nothing {} = self.read(arguments)?;
                api.ask(Method::GET, "/v1/self", None).await
            }
            Tool::Acquire => {
                let mut ask: Acquire = self.read(arguments)?;
                ask.ttl_ms = ask.ttl_ms.or(Some(LEASE_MS));
                api.ask(Method::POST, "/v1/self/keepalive", Some(&json(&ask))).await.map(object)
            }
            Tool::Release => {
                let Nothing {} = self.read(arguments)?;
                api.ask(Method::DELETE, "/v1/self/keepalive", None).await.map(object)
            }
            Tool::Expose => {
                let ask: Expose = self.read(arguments)?;
                api.ask(Method::POST, "/v1/self/expose", Some(&json(&ask))).await
            }
            Tool::Unexpose => {
                let ask: Unexpose = self.read(arguments)?;
                let path = format!("/v1/self/expose/{}", ask.guest_port);
                api.ask(Method::DELETE, &path, None).await.map(object)
            }
        }
    }

    async fn child(
        self,
        api: &Api,
        arguments: Value,
        method: Method,
        verb: &str,
    ) -> Result<Value, ApiError> {
        let ask: Child = self.read(arguments)?;
        let path = format!("/v1/instances/{}{verb}", escape(&ask.id));
        api.ask(method, &path, None).await.map(object)
    }

    /// Arguments that do not fit are the agent's to mend, so they are no fault of the protocol.
    fn read<T: DeserializeOwned>(self, arguments: Value) -> Result<T, ApiError> {
        serde_json::from_value(arguments).map_err(|e| {
            ApiError::Refused(json!({
                "error": format!("the arguments of {} are not right: {e}", self.name()),
                "code": "invalid_arguments",
                "hint": "look at the tool's input schema",
            }))
        })
    }
}

fn json(ask: &impl Serialize) -> Value {
    serde_json::to_value(ask).unwrap_or_default()
}

/// An answer without words becomes one with.
fn object(answer: Value) -> Value {
    if answer.is_object() { answer } else { json!({ "status": "ok" }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn six_without_spawn_and_thirteen_with() {
        let names = |spawn| Tool::visible(spawn).map(Tool::name).collect::<Vec<_>>();
        let six = [
            "instance_spawn",
            "instance_list",
            "instance_stop",
            "self_info",
            "keepalive_acquire",
            "keepalive_release",
        ];
        assert_eq!(names(false), six);
        assert_eq!(names(true).len(), 13);
        assert!(names(true).iter().all(|name| Tool::named(name).is_some()));
    }

    #[test]
    fn schemas_are_objects_that_say_what_each_field_is() {
        for tool in ALL {
            let tool = tool.define();
            let schema = serde_json::to_value(&*tool.input_schema).unwrap();
            assert_eq!(schema["type"], "object", "{}", tool.name);
            assert_eq!(schema["additionalProperties"], false, "{}", tool.name);
            let text = schema.to_string();
            assert!(!text.contains("$ref") && !text.contains("\"null\""), "{text}");
            for (name, field) in schema["properties"].as_object().into_iter().flatten() {
                assert!(field["description"].is_string(), "{} {name}", tool.name);
            }
        }
    }

    #[test]
    fn a_wrong_argument_is_named() {
        let told = Tool::Stop.read::<Child>(json!({ "di": "x" })).unwrap_err().body();
        assert_eq!(told["code"], "invalid_arguments");
        assert!(told["error"].as_str().unwrap().contains("di"), "{told}");
    }
}
