//! The vers API, as its clients and its servers say it (contracts/vers.md 2 to 4). Written down once
//! here: `aegis-vers` speaks it to the cloud, its double and the daemon's own door answer in it.
//!
//! What is read is forgiving, as the other side is not ours: unknown fields are left alone, unknown
//! states are none that anybody may act on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::words::Uuid;

/// Body of an answer from the cloud, bytes: a list of some ten thousand machines.
pub const ANSWER_MAX: usize = 8 * 1024 * 1024;
/// Body of a request, bytes: a file of 16 MiB as base64 fits.
pub const BODY_MAX: usize = 24 * 1024 * 1024;
/// A file in one piece, bytes.
pub const FILE_MAX: usize = 16 * 1024 * 1024;
/// Labels of one machine.
pub const LABELS_MAX: usize = 64;
/// Bytes of a label's name, and of its value.
pub const LABEL_BYTES_MAX: usize = 1024;
/// Machines that one branch may make: the count is a byte.
pub const BRANCH_MAX: u8 = u8::MAX;

/// What a refused key is told: text, without a content type, with status 403.
pub const AUTH_TEXT: &str = "403 Forbidden";
/// What is said, as JSON, of a machine that is not the asker's to delete.
pub const FORBIDDEN: &str = "Forbidden";
/// Of what is unknown.
pub const NOT_FOUND: &str = "not found";
/// Of an unknown commit.
pub const COMMIT_NOT_FOUND: &str = "commit not found";
/// Of an unknown tag.
pub const TAG_NOT_FOUND: &str = "tag not found";
/// Of a reference that is none.
pub const BAD_REF: &str = "Invalid ref format. Expected 'repo_name:tag_name'";

/// Where a machine is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// On its way.
    Booting,
    /// Ready.
    Running,
    /// Its clock stands still.
    Paused,
    /// It has no node; waking gives it one.
    Sleeping,
    /// It ended by itself.
    Dead,
    /// A word of a later version.
    #[serde(other)]
    Unknown,
}

/// A machine, as lists and `status` show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// Its id.
    pub vm_id: Uuid,
    /// Whose it is.
    #[serde(default)]
    pub owner_id: String,
    /// RFC 3339.
    #[serde(default)]
    pub created_at: String,
    /// Where it is in its life.
    pub state: VmState,
    /// Left out when there are none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// What `metadata` says of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmMetadata {
    /// Its id.
    pub vm_id: Uuid,
    /// Whose it is.
    pub owner_id: String,
    /// RFC 3339.
    pub created_at: String,
    /// RFC 3339, where it was deleted.
    pub deleted_at: Option<String>,
    /// Where it is in its life.
    pub state: VmState,
    /// An IPv6 address inside of the cloud.
    pub ip: String,
    /// What it was made from.
    pub parent_commit_id: Option<Uuid>,
    /// The machine of which that was a commit.
    pub grandparent_vm_id: Option<Uuid>,
}

/// A commit, as lists show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitInfo {
    /// Its id.
    pub commit_id: Uuid,
    /// Whose it is.
    pub owner_id: String,
    /// Empty where it has none.
    pub name: String,
    /// For people.
    pub description: Option<String>,
    /// Whether others may start from it.
    pub is_public: bool,
    /// RFC 3339.
    pub created_at: String,
    /// The machine of which it is a commit.
    pub parent_vm_id: Option<Uuid>,
    /// The commit that this machine came from.
    pub grandparent_commit_id: Option<Uuid>,
}

/// Answer of `GET /commits`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "a page")]
pub struct Commits {
    pub commits: Vec<CommitInfo>,
    pub total: usize,
    pub limit: usize,
    pub offset: usize,
}

/// Answer where a machine was made or ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmId {
    /// Which.
    pub vm_id: Uuid,
}

/// Answer where machines were made from one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmIds {
    /// Which.
    pub vms: Vec<VmId>,
}

/// Answer where a commit was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitId {
    /// Which.
    pub commit_id: Uuid,
}

/// Body of `POST /vm/from_commit`: exactly one of them. As an enum it fails as the cloud's own does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromCommit {
    /// That commit.
    CommitId(Uuid),
    /// The commit that an organisation's tag names.
    TagName(String),
    /// `repository:tag`.
    Ref(String),
}

/// Body of `POST /vm/new_root`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NewRoot {
    /// What it is made of.
    pub vm_config: VmConfig,
}

/// What a new machine is made of.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct VmConfig {
    /// Its kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel_name: Option<String>,
    /// Its image; `default` where none is named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_name: Option<String>,
    /// Virtual CPUs; 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpu_count: Option<u32>,
    /// Memory, MiB; 512.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem_size_mib: Option<u32>,
    /// Disk, MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fs_size_mib: Option<u32>,
    /// For people and drivers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<BTreeMap<String, String>>,
}

/// Body of `PATCH …/state`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct SetState {
    /// The new one.
    pub state: WrittenState,
}

/// States, as they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WrittenState {
    /// Its clock is to stand still.
    Paused,
    /// It is to go on, or to wake.
    Running,
}

/// Body of `PATCH …/disk`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct SetDisk {
    /// The new size, MiB; disks only grow.
    pub fs_size_mib: u32,
}

/// Body of `PATCH …/label`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SetLabels {
    /// All of them.
    pub labels: BTreeMap<String, String>,
}

/// Body of `POST …/commit`; it may be left out.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Commit {
    /// The id that it is to have.
    pub commit_id: Option<Uuid>,
    /// A name.
    pub name: Option<String>,
    /// For people.
    pub description: Option<String>,
}

/// Body of `POST …/exec` and `POST …/exec/stream`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments.
    pub command: Vec<String>,
    /// The id that it is to have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec_id: Option<Uuid>,
    /// Its environment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    /// Its directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// What it reads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// It is ended after so long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_secs: Option<u64>,
}

/// Answer of `POST …/exec`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecDone {
    /// How it ended.
    pub exit_code: i32,
    /// What it put out, as text.
    pub stdout: String,
    /// What it put out, as text.
    pub stderr: String,
    /// Its id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec_id: Option<Uuid>,
}

/// Body of `POST …/exec/stream/attach`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attach {
    /// Which.
    pub exec_id: Uuid,
    /// Behind this line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<u64>,
    /// Only what comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_latest: Option<bool>,
}

/// One NDJSON line of a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
#[allow(missing_docs, reason = "the variants say it")]
pub enum StreamLine {
    /// Bytes that it put out.
    Chunk { exec_id: Uuid, cursor: u64, stream: StreamName, data_b64: String },
    /// It has ended.
    Exit { exec_id: Uuid, cursor: u64, exit_code: i32 },
}

/// By which way bytes came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StreamName {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Answer of `GET …/logs`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "a page")]
pub struct Logs {
    pub entries: Vec<LogEntry>,
    pub next_offset: u64,
    pub eof: bool,
}

/// One entry of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "a row")]
pub struct LogEntry {
    pub exec_id: Option<Uuid>,
    pub timestamp: String,
    pub stream: StreamName,
    pub data_b64: String,
}

/// Answer of `GET …/files`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FileContent {
    /// The file.
    pub content_b64: String,
}

/// Body of `PUT …/files`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PutFile {
    /// Absolute.
    pub path: String,
    /// The file.
    pub content_b64: String,
    /// Permissions; 0644 where they are left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
    /// Whether its directories are made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create_dirs: Option<bool>,
}

/// The envelope of application errors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppError {
    /// One sentence.
    pub error: String,
    /// Always false.
    #[serde(default)]
    pub success: bool,
}

/// The envelope of errors where machines were to be made from one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BranchError {
    /// None.
    pub vms: Vec<VmId>,
    /// One sentence.
    pub error: String,
}

const _: () = assert!(FILE_MAX / 3 * 4 + 64 * 1024 < BODY_MAX, "a file fits in a body");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn from_commit_takes_exactly_one_key() {
        let id = "0b9cf0ad-8d4e-4a4b-9c4b-3f3d1f0a6a01";
        let parse = |text: &str| serde_json::from_str::<FromCommit>(text);
        let one = parse(&format!("{{\"commit_id\":\"{id}\"}}")).unwrap();
        assert_eq!(one, FromCommit::CommitId(id.parse().unwrap()));
        assert_eq!(parse(r#"{"ref":"a:b"}"#).unwrap(), FromCommit::Ref("a:b".to_owned()));
        // These are faults of syntax to it, the next ones of types: 400 and 422.
        for text in ["", "{}", "x", &format!("{{\"commit_id\":\"{id}\",\"tag_name\":\"x\"}}")] {
            let wrong = parse(text).unwrap_err();
            assert!(wrong.is_syntax() || wrong.is_eof(), "{text}: {wrong}");
        }
        for text in [r#"{"commit_id":1}"#, r#"{"other":"x"}"#] {
            assert!(parse(text).unwrap_err().is_data(), "{text}");
        }
    }

    #[test]
    fn states_are_read_in_one_case_and_written_in_another() {
        assert_eq!(serde_json::to_string(&VmState::Sleeping).unwrap(), "\"sleeping\"");
        let later: VmState = serde_json::from_str("\"hibernating\"").unwrap();
        assert_eq!(later, VmState::Unknown);
        let written = SetState { state: WrittenState::Paused };
        assert_eq!(serde_json::to_string(&written).unwrap(), r#"{"state":"Paused"}"#);
        assert!(serde_json::from_str::<SetState>(r#"{"state":"paused"}"#).unwrap_err().is_data());
    }
}
