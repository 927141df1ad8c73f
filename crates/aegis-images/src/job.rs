//! One job from its line to its last word.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write as _};
use std::sync::Mutex;

use aegis_wire::images::{Job, Made, Progress, RunConfig, Task, blob_dir};

use crate::blobs::{self, Blobs};
use crate::digest::Digest;
use crate::erofs::Writer;
use crate::manifest::{self, Config};
use crate::tree::Tree;
use crate::{import, layer, pull};

/// Longest word of a failure: much of it may be a stranger's.
const WORDS_MAX: usize = 500;
/// Directories that every machine needs, and their rights.
const NEEDED: [(&[u8], u16); 6] = [
    (b"dev", 0o755),
    (b"proc", 0o555),
    (b"sys", 0o555),
    (b"run", 0o755),
    (b"tmp", 0o1777),
    (b"root", 0o700),
];

/// Why there is no image.
#[derive(Debug)]
pub struct Failure {
    /// As in [`Progress::Failed`].
    pub code: &'static str,
    /// One sentence.
    pub message: String,
    /// Another try may bring it.
    pub may_pass: bool,
}

impl Failure {
    /// With its word and its sentence.
    pub fn new(code: &'static str, message: impl Into<String>) -> Failure {
        Failure { code, message: message.into(), may_pass: false }
    }

    /// The same, with who said it.
    pub fn at(mut self, host: &str) -> Failure {
        self.message = format!("{host}: {}", self.message);
        self
    }

    /// As a job's last line: no control characters of strangers reach a terminal.
    pub fn line(&self) -> Progress {
        let plain = |c: char| if c.is_control() { ' ' } else { c };
        let error = self.message.chars().map(plain).take(WORDS_MAX).collect();
        Progress::Failed { error, code: self.code.to_owned() }
    }
}

impl From<io::Error> for Failure {
    fn from(e: io::Error) -> Failure {
        match e.kind() {
            io::ErrorKind::InvalidData => Failure::new("image_broken", e.to_string()),
            io::ErrorKind::FileTooLarge => Failure::new("image_refused", e.to_string()),
            _ => Failure::new("image_failed", format!("this host failed: {e}")),
        }
    }
}

impl From<manifest::Error> for Failure {
    fn from(e: manifest::Error) -> Failure {
        Failure::new("image_refused", e.to_string())
    }
}

impl From<layer::Error> for Failure {
    fn from(e: layer::Error) -> Failure {
        let code = match &e {
            layer::Error::Refused(..) => "image_refused",
            layer::Error::Broken(_, e) if e.kind() == io::ErrorKind::FileTooLarge => {
                "image_refused"
            }
            layer::Error::Broken(_, e) if e.kind() == io::ErrorKind::StorageFull => "image_failed",
            layer::Error::Broken(..) | layer::Error::Other(..) => "image_broken",
        };
        Failure::new(code, e.to_string())
    }
}

/// All that an image consists of, verified, among the blobs.
#[derive(Debug)]
pub struct Obtained {
    /// Of its manifest.
    pub digest: Digest,
    /// Names that it came with.
    pub names: Vec<String>,
    /// How it is run, and what its layers unpack to.
    pub config: Config,
    /// The blob of that.
    pub config_blob: Digest,
    /// Its layers, from below.
    pub layers: Vec<Digest>,
    /// Bytes that it may have.
    pub bytes_max: u64,
}

/// Tells whoever started the job.
#[derive(Debug)]
pub struct Tell(Mutex<io::Stdout>);

impl Default for Tell {
    fn default() -> Tell {
        Tell(Mutex::new(io::stdout()))
    }
}

impl Tell {
    /// One line; whoever does not listen any more has ended the job.
    pub fn say(&self, progress: &Progress) {
        let Ok(mut line) = serde_json::to_vec(progress) else { return };
        line.push(b'\n');
        let mut out = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if out.write_all(&line).and_then(|()| out.flush()).is_err() {
            std::process::exit(1);
        }
    }
}

/// Does it; the working directory is the job's.
pub async fn run(job: &Job, archive: impl Read, tell: &Tell) -> Result<Made, Failure> {
    let blobs = Blobs::new(".");
    blobs::emptied(blob_dir::WORK.as_ref())?;
    let made = match &job.task {
        Task::Registry(wanted) => {
            let pulled = pull::pull(wanted, &blobs, job.bytes_max, tell).await;
            pulled.and_then(|obtained| make(&obtained, &blobs, tell))
        }
        Task::Tree { config } => tree(archive, &blobs, job.bytes_max, config),
        Task::Archive => {
            let before = blobs.names()?;
            let imported = import::import(archive, &blobs, job.bytes_max);
            let made = imported.and_then(|obtained| make(&obtained, &blobs, tell));
            // Nobody will ask for what was in an archive by its digest again.
            blobs.retain(&before)?;
            made.map(|made| Made { blobs: Vec::new(), ..made })
        }
    };
    if made.is_err() {
        blobs::emptied(blob_dir::WORK.as_ref())?;
    }
    made
}

fn begin(blobs: &Blobs, bytes_max: u64) -> Result<Writer, Failure> {
    let path = blobs.work().join(blob_dir::IMAGE);
    let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
    Ok(Writer::new(file, bytes_max))
}

fn finish(image: Writer, mut tree: Tree) -> Result<u64, Failure> {
    for (name, mode) in NEEDED {
        tree.ensure_directory(name, mode)
            .map_err(|e| Failure::new("image_refused", e.to_string()))?;
    }
    Ok(image.finish(&tree)?)
}

/// Writes a root file system as it comes: nothing of it is kept but the image.
fn tree(
    from: impl Read,
    blobs: &Blobs,
    bytes_max: u64,
    config: &RunConfig,
) -> Result<Made, Failure> {
    if !config.is_bounded() {
        return Err(manifest::Error::Unfit("no process could be started as it says").into());
    }
    let (mut image, mut tree, mut left) = (begin(blobs, bytes_max)?, Tree::default(), bytes_max);
    // It has no name yet by which it could be told.
    let nameless = Digest::of_bytes(b"");
    let said = |failure: layer::Error| {
        let why = match &failure {
            layer::Error::Broken(_, e) => e.to_string(),
            layer::Error::Refused(_, e) => e.to_string(),
            layer::Error::Other(..) => failure.to_string(),
        };
        Failure { message: format!("the tree can't be taken: {why}"), ..failure.into() }
    };
    let tar = layer::apply(&nameless, from, None, &mut left, &mut tree, &mut image);
    let tar = tar.map_err(said)?;
    let manifest = serde_json::to_vec(&(tar, config)).map_err(io::Error::from)?;
    let digest = Digest::of_bytes(&manifest).to_string();
    let bytes = finish(image, tree)?;
    Ok(Made { digest, bytes, names: Vec::new(), blobs: Vec::new(), config: config.clone() })
}

/// Lays the layers over each other, and writes them as one file.
pub fn make(obtained: &Obtained, blobs: &Blobs, tell: &Tell) -> Result<Made, Failure> {
    let (layers, diffs) = (&obtained.layers, &obtained.config.diffs);
    if layers.len() != diffs.len() {
        return Err(manifest::Error::Unfit("its configuration counts other layers").into());
    }
    let mut image = begin(blobs, obtained.bytes_max)?;
    let (mut tree, mut left) = (Tree::default(), obtained.bytes_max);
    let of = layers.len() as u32;
    for (n, (digest, diff)) in (1..).zip(layers.iter().zip(diffs)) {
        tell.say(&Progress::Unpack { layer: n, of });
        let from = File::open(blobs.path(digest))?;
        let done = layer::apply(digest, from, Some(diff), &mut left, &mut tree, &mut image);
        if let Err(layer::Error::Broken(..) | layer::Error::Other(..)) = &done {
            // Were it this host's disk that broke it, the next pull would find it broken again.
            blobs.remove(digest);
        }
        done?;
    }
    let bytes = finish(image, tree)?;
    let mut used = vec![obtained.config_blob.to_string()];
    used.extend(layers.iter().map(ToString::to_string));
    Ok(Made {
        digest: obtained.digest.to_string(),
        bytes,
        names: obtained.names.clone(),
        blobs: used,
        config: obtained.config.run.clone(),
    })
}
