//! What a machine asks of the host: the guest API's calls on the control channel
//! (contracts/aegis.md 4 and 5, seeds/002 section 7).
//!
//! ```text
//! process ── HTTP ──▶ harness ── these, token attached ──▶ worker ── worker::Brokered ──▶ aegisd
//! ```
//! The harness attaches the token and checks nothing; aegisd believes nothing. A result is the body
//! that the process gets; an error's `data` is the [`crate::error::ErrorBody`] that it gets.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::files::{FileAsk, Meta};
use super::rpc;

/// Port of the guest API on the machine's loopback.
pub const API_PORT: u16 = 7777;
/// Its unix socket.
pub const API_SOCKET: &str = "/run/aegis/guestd.sock";
/// Its URL, as processes see it in `AEGIS_GUEST_API`.
pub const API_URL: &str = "http://127.0.0.1:7777";
/// Names the guest API's URL in the environment of processes.
pub const API_ENV: &str = "AEGIS_GUEST_API";
/// Directory of a golden machine's first file system, without its slash, that lies over the image
/// of every machine.
pub const LAYER: &str = "aegis";
/// Where every machine has the MCP server of its guest API.
pub const MCP_PATH: &str = "/usr/bin/aegis-mcp-guest";
/// Names the machine's instance id in the environment of processes.
pub const ID_ENV: &str = "AEGIS_INSTANCE_ID";

/// `guest.spawn` → the child, as in `POST /v1/instances` of seeds/003.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Spawn {
    /// The capability token.
    pub token: String,
    /// The body as it came; parsed on the host.
    pub request: Value,
}

/// Params of calls that say nothing but who calls: `guest.list_children`, `guest.self_info`,
/// `guest.release_keepalive`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Caller {
    /// The capability token.
    pub token: String,
}

/// Params of `guest.get_child`, `guest.start_child`, `guest.stop_child`, `guest.delete_child`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Child {
    /// The capability token.
    pub token: String,
    /// Id or handle of a child.
    pub child_id: String,
}

/// `guest.exec_child` → [`Streamed`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ExecChild {
    /// The capability token.
    pub token: String,
    /// Id or handle of a child.
    pub child_id: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Added to the environment of the child's primary process.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// The process group is killed after this long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_secs: Option<u64>,
    /// What it reads, as text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// What it reads, base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin_b64: Option<String>,
}

/// `guest.child_logs` → [`Streamed`]. The query of `GET /v1/instances/{id}/logs`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChildLogs {
    /// The capability token.
    pub token: String,
    /// Id or handle of a child.
    pub child_id: String,
    /// Go on with new lines.
    #[serde(default)]
    pub follow: bool,
    /// Only entries from then on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
    /// Only the last so many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tail: Option<usize>,
    /// Only those of one exec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec_id: Option<String>,
}

/// Params of `guest.look_at_child_files`, `guest.change_child_files` → a
/// [`crate::files::FileShape`] or a [`crate::host::StatusWord`]; of `guest.read_child_files`,
/// `guest.write_child_file` → [`Streamed`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChildFiles {
    /// The capability token.
    pub token: String,
    /// Id or handle of a child.
    pub child_id: String,
    /// What is asked for; only what the method is for.
    pub ask: FileAsk,
}

/// `guest.keepalive` → the lease `{"lease_held","lease_reason","lease_expires_at"}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Keepalive {
    /// The capability token.
    pub token: String,
    /// How long, milliseconds.
    pub ttl_ms: u64,
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// `guest.expose` → the endpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Expose {
    /// The capability token.
    pub token: String,
    /// The port on the machine's loopback.
    pub guest_port: u64,
    /// `http` or `tcp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
}

/// `guest.unexpose` → `{"status":"unexposed"}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Unexpose {
    /// The capability token.
    pub token: String,
    /// The port on the machine's loopback.
    pub guest_port: u64,
}

/// `guest.request_access` → the requests of its guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Access {
    /// The capability token.
    pub token: String,
    /// As the body of `POST /v1/self/requests`.
    pub request: Value,
}

/// Answer whose bulk comes on a stream of its own, which the host opened before it answered:
/// [`super::StreamHead::Guest`] with this ticket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Streamed {
    /// Chosen by the host; used once.
    pub ticket: String,
    /// Of a file's bytes: what they are of, and how many come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<StreamedFile>,
}

/// What is said of a file before its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamedFile {
    /// What it is.
    pub meta: Meta,
    /// How many bytes come; unknown where the file system does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<u64>,
}

/// `renew_token`, host → machine: the token from now on. → `{}`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RenewToken {
    /// The capability token.
    pub token: String,
}

/// Names of the methods that a machine calls.
pub mod method {
    /// [`super::Spawn`]
    pub const SPAWN: &str = "guest.spawn";
    /// [`super::Caller`]
    pub const LIST_CHILDREN: &str = "guest.list_children";
    /// [`super::Child`]
    pub const GET_CHILD: &str = "guest.get_child";
    /// [`super::Child`]
    pub const START_CHILD: &str = "guest.start_child";
    /// [`super::Child`]
    pub const STOP_CHILD: &str = "guest.stop_child";
    /// [`super::Child`]
    pub const DELETE_CHILD: &str = "guest.delete_child";
    /// [`super::ExecChild`]
    pub const EXEC_CHILD: &str = "guest.exec_child";
    /// [`super::ChildLogs`]
    pub const CHILD_LOGS: &str = "guest.child_logs";
    /// [`super::ChildFiles`]: stat.
    pub const LOOK_AT_CHILD_FILES: &str = "guest.look_at_child_files";
    /// [`super::ChildFiles`]: read, list, watch.
    pub const READ_CHILD_FILES: &str = "guest.read_child_files";
    /// [`super::ChildFiles`]: mkdir, symlink, rename, remove.
    pub const CHANGE_CHILD_FILES: &str = "guest.change_child_files";
    /// [`super::ChildFiles`]: write. The stream carries the frames of a write.
    pub const WRITE_CHILD_FILE: &str = "guest.write_child_file";
    /// [`super::Caller`]
    pub const SELF_INFO: &str = "guest.self_info";
    /// [`super::Keepalive`]
    pub const KEEPALIVE: &str = "guest.keepalive";
    /// [`super::Caller`]
    pub const RELEASE_KEEPALIVE: &str = "guest.release_keepalive";
    /// [`super::Expose`]
    pub const EXPOSE: &str = "guest.expose";
    /// [`super::Unexpose`]
    pub const UNEXPOSE: &str = "guest.unexpose";

    /// [`super::Access`]
    pub const REQUEST_ACCESS: &str = "guest.request_access";
    /// [`super::Caller`]
    pub const LIST_REQUESTS: &str = "guest.list_requests";

    /// All of them: what a worker passes on, and nothing else.
    pub const ALL: [&str; 19] = [
        SPAWN,
        LIST_CHILDREN,
        GET_CHILD,
        START_CHILD,
        STOP_CHILD,
        DELETE_CHILD,
        EXEC_CHILD,
        CHILD_LOGS,
        LOOK_AT_CHILD_FILES,
        READ_CHILD_FILES,
        CHANGE_CHILD_FILES,
        WRITE_CHILD_FILE,
        SELF_INFO,
        KEEPALIVE,
        RELEASE_KEEPALIVE,
        EXPOSE,
        UNEXPOSE,
        REQUEST_ACCESS,
        LIST_REQUESTS,
    ];
}

/// The HTTP status with which the guest API answers an RPC error of this code.
pub fn status(code: i32) -> u16 {
    match code {
        rpc::CODE_DENIED => 403,
        rpc::CODE_NOT_FOUND => 404,
        rpc::CODE_EXHAUSTED | rpc::CODE_CONFLICT => 409,
        rpc::CODE_PARAMS | rpc::CODE_INVALID => 400,
        rpc::CODE_RATE => 429,
        rpc::CODE_UNAVAILABLE => 503,
        rpc::CODE_NO_SPACE => 507,
        _ => 500,
    }
}
