//! Running `aegis-image`: one job, its progress read with bounds, killed when nobody waits any more.

use std::io;
use std::time::Duration;

use aegis_wire::bounds::{IMAGE_DEADLINE, WORKER_LINE_MAX};
use aegis_wire::images::{Credentials, Job, Made, Progress, Pull, Source, Task};
use aegis_wire::words::Reference;
use axum::body::BodyDataStream;
use docker_credential::{DockerCredential, get_credential_from_reader};
use futures_util::StreamExt as _;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::ChildStdin;
use tokio::sync::mpsc;

use super::Images;
use crate::config::Config;
use crate::programs;

/// How Docker's own file calls its registry.
const DOCKER_KEY: &str = "https://index.docker.io/v1/";
/// What is read of what the program says beside its progress.
const WORDS_MAX: u64 = 4096;
/// A sender that says nothing for so long sends nothing more.
const SILENCE: Duration = Duration::from_secs(60);

/// Where progress goes, as lines.
pub type Teller = mpsc::Sender<io::Result<String>>;

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failed {
    /// As in [`Progress::Failed`].
    pub code: String,
    /// One sentence.
    pub message: String,
}

impl Failed {
    /// With a word and a sentence.
    pub fn new(code: &str, message: impl Into<String>) -> Failed {
        Failed { code: code.to_owned(), message: message.into() }
    }
}

impl From<io::Error> for Failed {
    fn from(e: io::Error) -> Failed {
        Failed::new("image_failed", format!("the image could not be fetched: {e}"))
    }
}

/// What to ask of whom; `said` goes before what Docker's file has.
pub async fn pull(
    config: &Config,
    reference: &Reference,
    said: Option<Credentials>,
) -> Result<Task, Failed> {
    let mut said = said;
    let mut sources = Vec::new();
    for mirror in config.images.sources(&reference.registry) {
        let own = mirror.host == reference.registry;
        let credentials = match said.take_if(|_| own) {
            Some(said) => Some(said),
            None => known(config, mirror.host.clone()).await?,
        };
        sources.push(Source { host: mirror.host, plain: mirror.plain, credentials });
    }
    Ok(Task::Registry(Pull {
        registry: reference.registry.clone(),
        repository: reference.repository.clone(),
        tag: reference.tag.clone(),
        digest: reference.digest.clone(),
        sources,
    }))
}

/// What Docker's file has for a registry: a helper may have to be asked, which blocks.
async fn known(config: &Config, host: String) -> Result<Option<Credentials>, Failed> {
    let Some(path) = config.images.docker_config.clone() else { return Ok(None) };
    let asked = tokio::task::spawn_blocking(move || {
        let key = if host == "docker.io" { DOCKER_KEY } else { &host };
        let file = std::fs::File::open(path).ok()?;
        match get_credential_from_reader(file, key) {
            Ok(DockerCredential::UsernamePassword(username, password)) => {
                Some(Credentials { username, password })
            }
            Ok(DockerCredential::IdentityToken(_)) => {
                tracing::warn!(registry = key, "an identity token is not understood; left out");
                None
            }
            Err(_) => None,
        }
    });
    asked.await.map_err(|e| Failed::new("image_failed", e.to_string()))
}

/// Does a job; an archive's bytes go to it as they come. When this is dropped, the job ends.
pub async fn fetch(
    config: &Config,
    task: Task,
    archive: Option<BodyDataStream>,
    tell: Option<&Teller>,
) -> Result<Made, Failed> {
    let images = Images::of(&config.home);
    let job = Job { dir: images.blobs()?, bytes_max: config.images.bytes_max, task };
    let program = config.machines.programs.join("aegis-image");
    let mut child = programs::piped(&program)
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| Failed::new("image_failed", format!("{}: {e}", program.display())))?;
    let (Some(stdin), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(Failed::new("image_failed", "its pipes are not there"));
    };
    let read = async {
        let mut lines = BufReader::new(stdout);
        loop {
            let mut line = Vec::new();
            (&mut lines).take(WORKER_LINE_MAX as u64).read_until(b'\n', &mut line).await?;
            if line.last() != Some(&b'\n') {
                return Ok::<_, Failed>(None);
            }
            match serde_json::from_slice(&line).map_err(io::Error::from)? {
                Progress::Done(made) => return Ok(Some(*made)),
                Progress::Failed { error, code } => return Err(Failed { code, message: error }),
                progress => {
                    if let (Some(to), Ok(line)) = (tell, serde_json::to_string(&progress)) {
                        let _ = to.send(Ok(format!("{line}\n"))).await;
                    }
                }
            }
        }
    };
    let words = async {
        let mut words = Vec::new();
        let _ = stderr.take(WORDS_MAX).read_to_end(&mut words).await;
        if !words.is_empty() {
            // Shown as a literal: some of it may be a stranger's.
            tracing::warn!(said = ?String::from_utf8_lossy(&words), "aegis-image complains");
        }
    };
    let work = async {
        let (fed, made, ()) = tokio::join!(feed(stdin, &job, archive), read, words);
        let status = child.wait().await?;
        match (made?, fed) {
            (_, Err(failed)) => Err(failed),
            (Some(made), Ok(())) if status.success() => Ok(made),
            _ => Err(Failed::new("image_failed", format!("aegis-image ended: {status}"))),
        }
    };
    tokio::time::timeout(IMAGE_DEADLINE, work).await.unwrap_or_else(|_| {
        Err(Failed::new(
            "image_failed",
            format!("it took longer than {}s", IMAGE_DEADLINE.as_secs()),
        ))
    })
}

/// The job, then the archive. A program that has heard enough closes its end, and says why itself.
async fn feed(
    mut to: ChildStdin,
    job: &Job,
    archive: Option<BodyDataStream>,
) -> Result<(), Failed> {
    let mut line = serde_json::to_vec(job).map_err(io::Error::from)?;
    line.push(b'\n');
    if to.write_all(&line).await.is_err() {
        return Ok(());
    }
    let Some(mut archive) = archive else { return Ok(()) };
    loop {
        let piece = tokio::time::timeout(SILENCE, archive.next()).await;
        let piece = piece.map_err(|_| Failed::new("image_broken", "the archive did not come"))?;
        let Some(piece) = piece else { return Ok(()) };
        let piece = piece.map_err(|_| Failed::new("image_broken", "the archive broke off"))?;
        if to.write_all(&piece).await.is_err() {
            return Ok(());
        }
    }
}
