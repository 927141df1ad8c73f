//! Images: between aegisd and its one-shot `aegis-image`, and what `/v1/images` says
//! (contracts/aegis.md 1).
//!
//! `aegis-image` reads one JSON line, a [`Job`], from stdin (for an import the archive's bytes follow)
//! and prints [`Progress`] lines, the last of which is [`Progress::Done`] or [`Progress::Failed`].
//! Secrets are on stdin only.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::bounds::{COMMAND_BYTES_MAX, COMMAND_WORDS_MAX};
use crate::words::Time;

/// File names in the directory that a [`Job`] names.
pub mod blob_dir {
    /// What the job makes lies below; it is emptied before.
    pub const WORK: &str = "work";
    /// The image, below [`WORK`].
    pub const IMAGE: &str = "base.erofs";
}

/// What `aegis-image` shall do.
#[derive(Debug, Serialize, Deserialize)]
pub struct Job {
    /// The only directory that it may write to: blobs by their digests, and its work.
    pub dir: PathBuf,
    /// Bytes that an image may have: packed, unpacked, and as a file, each.
    pub bytes_max: u64,
    /// What to do.
    pub task: Task,
}

/// From where an image comes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum Task {
    /// A registry.
    Registry(Pull),
    /// A tar of `docker save`, or of an OCI layout, that follows on stdin.
    Archive,
    /// A tar of a whole root file system, that follows on stdin.
    Tree {
        /// How the image is run.
        config: RunConfig,
    },
}

/// Which image of a registry.
#[derive(Debug, Serialize, Deserialize)]
pub struct Pull {
    /// As in [`crate::words::Reference`].
    pub registry: String,
    /// Its name there.
    pub repository: String,
    /// A tag; not beside a digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// A digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Who is asked, in this order; the first that has it is believed as far as digests go.
    pub sources: Vec<Source>,
}

/// A server that may have an image.
#[derive(Debug, Serialize, Deserialize)]
pub struct Source {
    /// `HOST` or `HOST:PORT`.
    pub host: String,
    /// Without TLS.
    pub plain: bool,
    /// Who asks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<Credentials>,
}

/// Name and password at a registry.
#[derive(Serialize, Deserialize)]
pub struct Credentials {
    /// The name.
    pub username: String,
    /// The password, or a token in its place.
    pub password: String,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(…)")
    }
}

/// How far a job is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Progress {
    /// What the image consists of.
    Layers {
        /// From below.
        layers: Vec<Part>,
    },
    /// So much of a layer is there.
    Layer {
        /// Which.
        digest: String,
        /// Bytes.
        bytes: u64,
    },
    /// Layers are laid over each other.
    Unpack {
        /// Which one is at work, from 1.
        layer: u32,
        /// How many there are.
        of: u32,
    },
    /// It is there.
    Done(Box<Made>),
    /// It is not.
    Failed {
        /// Why.
        error: String,
        /// `image_not_found`, `image_denied`, `image_unreachable`, `image_broken`, `image_refused`
        /// or `image_failed`.
        code: String,
    },
}

/// A layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Of what the registry has.
    pub digest: String,
    /// Bytes of that.
    pub bytes: u64,
}

/// An image that lies at [`blob_dir::IMAGE`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Made {
    /// Of its manifest.
    pub digest: String,
    /// Bytes of the file.
    pub bytes: u64,
    /// Names that the archive gives it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// Digests of the blobs that it was made of.
    pub blobs: Vec<String>,
    /// How it is run.
    pub config: RunConfig,
}

/// What an image says of how it is run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunConfig {
    /// Environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// `NAME` or number, and perhaps `:GROUP`; root when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The command's first words.
    #[serde(default)]
    pub entrypoint: Vec<String>,
    /// The command's further words.
    #[serde(default)]
    pub cmd: Vec<String>,
}

impl RunConfig {
    /// What is run when nobody says what; empty when the image does not say either.
    pub fn command(&self) -> Vec<String> {
        self.entrypoint.iter().chain(&self.cmd).cloned().collect()
    }

    /// Whether a process could be started with all of it.
    pub fn is_bounded(&self) -> bool {
        let words = self.entrypoint.len() + self.cmd.len();
        let bytes = self.command().iter().map(String::len).sum::<usize>()
            + self.env.iter().map(|(n, v)| n.len() + v.len()).sum::<usize>();
        let zero = |text: &str| text.contains('\0');
        words <= COMMAND_WORDS_MAX
            && self.env.len() <= COMMAND_WORDS_MAX
            && bytes <= COMMAND_BYTES_MAX / 2
            && self.cwd.as_ref().is_none_or(|d| d.starts_with('/') && d.len() < 4096 && !zero(d))
            && self.user.as_ref().is_none_or(|u| u.len() < 256 && !zero(u))
            && !self.command().iter().any(|word| zero(word))
            && !self.env.iter().any(|(n, v)| n.is_empty() || n.contains(['=', '\0']) || zero(v))
    }
}

/// Body of `POST /v1/images`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PullBody {
    /// What is pulled.
    pub image_ref: String,
    /// Who asks the registry, where that is not what `~/.docker/config.json` says.
    #[serde(default)]
    pub credentials: Option<Credentials>,
    /// Only where it is not there, and the host's settings let it be pulled for a new machine.
    #[serde(default)]
    pub if_missing: bool,
}

/// Body of `POST /v1/images/warm`: a kind of machine.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WarmBody {
    /// Its image; else the configured one.
    #[serde(default)]
    pub image_ref: Option<String>,
    /// Cores, as for an instance.
    #[serde(default)]
    pub vcpus: Option<f64>,
    /// MiB, as for an instance.
    #[serde(default)]
    pub memory_mb: Option<f64>,
}

/// An image in `GET /v1/images`, and the last line of a pull or import.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageShape {
    /// The name that it was pulled by, in full; a local image's own name.
    pub reference: String,
    /// Of its manifest; a local image has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Bytes on this host.
    pub bytes: u64,
    /// When it came to this host.
    pub created_at: Time,
    /// Instances that have it.
    pub in_use: u64,
    /// What is run when nobody says what.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_process_could_be_given_is_not_bounded() {
        let fits = RunConfig {
            env: BTreeMap::from([("A".to_owned(), "b".to_owned())]),
            cwd: Some("/srv".to_owned()),
            user: Some("app:app".to_owned()),
            entrypoint: vec!["/run".to_owned()],
            cmd: vec![],
        };
        assert!(fits.is_bounded() && RunConfig::default().is_bounded());
        let with = |change: &dyn Fn(&mut RunConfig)| {
            let mut config = fits.clone();
            change(&mut config);
            config.is_bounded()
        };
        assert!(!with(&|c| c.cwd = Some("srv".to_owned())));
        assert!(!with(&|c| c.cmd = vec!["x".to_owned(); COMMAND_WORDS_MAX]));
        assert!(!with(&|c| c.cmd = vec!["x".repeat(COMMAND_BYTES_MAX)]));
        assert!(!with(&|c| drop(c.env.insert("A=B".to_owned(), String::new()))));
        assert!(!with(&|c| c.user = Some("a\0b".to_owned())));
    }

    #[test]
    fn no_password_is_shown() {
        let password = "hush".to_owned();
        let shown = format!("{:?}", Credentials { username: "me".to_owned(), password });
        assert!(!shown.contains("hush") && !shown.contains("me"));
    }
}
