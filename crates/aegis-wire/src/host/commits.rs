//! Shapes of commits and forks (contracts/aegis.md 7).

use serde::{Deserialize, Serialize};

use crate::refusal::Refusal;
use crate::words::{Handle, Time};
use aegis_rules::commit::Commit;

/// Machines that one fork makes at most.
pub const FORKS_MAX: u32 = 64;

/// Body of `POST /v1/instances/{id}/commit`, as it comes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CommitBody {
    /// The host's name for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Keeps its disk alone: machines boot from it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub disk_only: bool,
}

impl CommitBody {
    /// The name, checked.
    ///
    /// # Errors
    /// A refusal of `name`.
    pub fn parse(self) -> Result<(Option<Handle>, bool), Refusal> {
        let name = self.name.map(|name| handle("name", name)).transpose()?;
        Ok((name, self.disk_only))
    }
}

/// Body of `POST /v1/instances/{id}/fork`, as it comes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ForkBody {
    /// How many machines; one when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
    /// Their handles begin with this; `-1`, `-2`, … is added where there are several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub handle: Option<String>,
    /// From its disk alone.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub disk_only: bool,
}

/// Machines that are to be made of one that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fork {
    /// One name for each.
    pub handles: Vec<Option<Handle>>,
    /// From its disk alone.
    pub disk_only: bool,
}

impl ForkBody {
    /// All names, checked.
    ///
    /// # Errors
    /// A refusal of `count` or `handle`.
    pub fn parse(self) -> Result<Fork, Refusal> {
        let count = self.count.unwrap_or(1);
        if count == 0 || count > FORKS_MAX {
            return Err(Refusal::out_of_range(
                "count".to_owned(),
                count.to_string(),
                format!("a whole number from 1 to {FORKS_MAX}"),
            ));
        }
        let name = |n: u32| match &self.handle {
            None => Ok(None),
            Some(first) if count == 1 => handle("handle", first.clone()).map(Some),
            Some(first) => handle("handle", format!("{first}-{n}")).map(Some),
        };
        let handles = (1..=count).map(name).collect::<Result<_, _>>()?;
        Ok(Fork { handles, disk_only: self.disk_only })
    }
}

fn handle(field: &str, text: String) -> Result<Handle, Refusal> {
    text.parse().map_err(|e: crate::words::BadWord| Refusal::field(field, e.expected))
}

/// A commit in answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "as in rules::commit::Commit")]
pub struct CommitShape {
    pub id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whose it was.
    pub instance_id: String,
    pub image_ref: String,
    /// Whether its processes go on in machines that start from it.
    pub memory: bool,
    pub memory_mb: u32,
    pub vcpus: f64,
    pub disk_gb: f64,
    /// What it takes on the host.
    pub bytes: u64,
    /// For how long the machine stood still.
    pub stopped_ms: f64,
    /// It goes with the last machine that was made of it.
    pub temporary: bool,
    /// Instances that start from it.
    pub in_use: u64,
    pub created_at: Time,
}

impl CommitShape {
    /// Of a commit that takes so many bytes, and so many instances start from.
    pub fn new(commit: &Commit, bytes: u64, stopped_us: u64, in_use: u64) -> CommitShape {
        CommitShape {
            id: commit.id.to_string(),
            name: commit.name.as_ref().map(ToString::to_string),
            instance_id: commit.source.to_string(),
            image_ref: commit.image.to_string(),
            memory: commit.with_memory,
            memory_mb: commit.memory.0,
            vcpus: commit.cpu.cores(),
            disk_gb: commit.disk.0 as f64 / 1e9,
            bytes,
            stopped_ms: stopped_us as f64 / 1e3,
            temporary: commit.temporary,
            in_use,
            created_at: commit.created_at,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forks_have_a_name_each() {
        let body = ForkBody { count: Some(3), handle: Some("web".to_owned()), disk_only: false };
        let names = body.parse().unwrap().handles;
        let names: Vec<String> = names.into_iter().flatten().map(String::from).collect();
        assert_eq!(names, ["web-1", "web-2", "web-3"]);
        assert_eq!(ForkBody::default().parse().unwrap().handles, [None]);
        for count in [0, FORKS_MAX + 1] {
            let body = ForkBody { count: Some(count), ..ForkBody::default() };
            assert_eq!(body.parse().unwrap_err().field.as_deref(), Some("count"));
        }
    }
}
