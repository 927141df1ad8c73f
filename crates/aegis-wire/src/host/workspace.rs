//! Workspaces: how one is asked for, and `/v1/workspaces`.

use serde::{Deserialize, Serialize};

use crate::bounds::WORKSPACE_PATH_MAX;
use crate::refusal::Refusal;

/// What stands behind one that can't be changed.
const READ_ONLY: &str = ":ro";

/// A workspace as it is asked for: `NAME` or `PATH`, and perhaps `:ro` behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkspaceAsk {
    /// A name, or an absolute path.
    pub place: String,
    /// Nothing is to be changed in it.
    pub read_only: bool,
}

impl WorkspaceAsk {
    /// From text.
    ///
    /// # Errors
    /// A refusal of the field `workspace`.
    pub fn parse(text: &str) -> Result<WorkspaceAsk, Refusal> {
        let (place, read_only) = match text.strip_suffix(READ_ONLY) {
            Some(place) => (place, true),
            None => (text, false),
        };
        if place.is_empty() || place.len() > WORKSPACE_PATH_MAX || place.contains('\0') {
            let allowed =
                format!("a name or an absolute path, of at most {WORKSPACE_PATH_MAX} bytes");
            return Err(Refusal::field("workspace", allowed));
        }
        Ok(WorkspaceAsk { place: place.to_owned(), read_only })
    }
}

/// As it is shown: what [`WorkspaceAsk::parse`] takes.
pub(super) fn shown(folder: &aegis_rules::given::Folder) -> String {
    format!("{}{}", folder.path, if folder.read_only { READ_ONLY } else { "" })
}

/// A named workspace.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the field names say it")]
pub struct WorkspaceShape {
    pub name: String,
    pub path: String,
    /// Bytes of the files in it.
    pub bytes: u64,
    pub files: u64,
    /// There are more files than were counted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub more: bool,
    /// Ids of instances that have it, or a part of it.
    pub used_by: Vec<String>,
}

/// Answer to `GET /v1/workspaces`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkspaceList {
    /// By name.
    pub workspaces: Vec<WorkspaceShape>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_read() {
        let read = |text: &str| WorkspaceAsk::parse(text).map(|w| (w.place, w.read_only));
        assert_eq!(read("notes"), Ok(("notes".to_owned(), false)));
        assert_eq!(read("/srv/a:ro"), Ok(("/srv/a".to_owned(), true)));
        let long = "x".repeat(WORKSPACE_PATH_MAX + 1);
        for bad in ["", ":ro", "a\0b", &long] {
            assert_eq!(read(bad).unwrap_err().field.as_deref(), Some("workspace"));
        }
    }
}
