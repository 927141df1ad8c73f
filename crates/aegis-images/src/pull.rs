//! From a registry: manifest, configuration and layers, each verified against its digest, whoever
//! sent it. What breaks off is continued, here and by a later job.

use std::time::{Duration, Instant};

use aegis_wire::images::{Part, Progress, Pull, Source};
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use oci_client::client::{BlobResponse, ClientConfig, ClientProtocol};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference};

use crate::blobs::Blobs;
use crate::digest::Digest;
use crate::job::{Failure, Obtained, Tell};
use crate::manifest::{self, Config, Descriptor, Manifest, TEXT_MAX};

/// Layers that are fetched at a time.
const PARALLEL: usize = 4;
/// Tries for one blob; one that brought more bytes is not counted.
const TRIES: u32 = 3;
/// Tries for one blob, those counted that brought something.
const TRIES_ALL: u32 = 50;
/// A registry that says nothing for so long says nothing more.
const SILENCE: Duration = Duration::from_secs(60);
const CONNECT: Duration = Duration::from_secs(15);
/// Progress of a layer is told this often.
const TELL_EVERY: Duration = Duration::from_millis(100);
/// What is understood.
const MANIFESTS: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// One server, asked for one image.
struct Registry {
    client: Client,
    reference: Reference,
    auth: RegistryAuth,
}

/// Fetches all that an image consists of, from the first source that has it.
pub async fn pull(
    pull: &Pull,
    blobs: &Blobs,
    bytes_max: u64,
    tell: &Tell,
) -> Result<Obtained, Failure> {
    let mut last: Option<Failure> = None;
    for source in &pull.sources {
        let registry = Registry::new(pull, source)?;
        match registry.manifest(pull, bytes_max).await {
            Ok(found) => return registry.fetch(found, blobs, bytes_max, tell).await,
            Err(failure) => {
                // What the registry itself says counts, not what a mirror lacks.
                last = Some(failure.at(&source.host));
            }
        }
    }
    Err(last.unwrap_or_else(|| Failure::new("image_failed", "there is no registry to ask")))
}

/// A manifest of one image.
struct Found {
    digest: Digest,
    config: Descriptor,
    layers: Vec<Descriptor>,
}

impl Registry {
    fn new(pull: &Pull, source: &Source) -> Result<Registry, Failure> {
        let (registry, repository) = (pull.registry.clone(), pull.repository.clone());
        let mut reference = match (&pull.digest, &pull.tag) {
            (Some(digest), _) => Reference::with_digest(registry, repository, digest.clone()),
            (None, tag) => {
                let tag = tag.clone().unwrap_or_else(|| "latest".to_owned());
                Reference::with_tag(registry, repository, tag)
            }
        };
        if source.host != pull.registry {
            reference.set_mirror_registry(source.host.clone());
        }
        let protocol = if source.plain { ClientProtocol::Http } else { ClientProtocol::Https };
        let config = ClientConfig {
            protocol,
            read_timeout: Some(SILENCE),
            connect_timeout: Some(CONNECT),
            user_agent: concat!("aegis/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        };
        let client = Client::try_from(config).map_err(Failure::from)?;
        let auth = match &source.credentials {
            Some(c) => RegistryAuth::Basic(c.username.clone(), c.password.clone()),
            None => RegistryAuth::Anonymous,
        };
        Ok(Registry { client, reference, auth })
    }

    /// The manifest for this processor.
    async fn manifest(&self, pull: &Pull, bytes_max: u64) -> Result<Found, Failure> {
        let wanted = pull.digest.as_deref().map(str::parse).transpose();
        let wanted: Option<Digest> =
            wanted.map_err(|e| Failure::new("image_refused", format!("the digest {e}")))?;
        let (digest, manifest) = self.read(&self.reference, wanted.as_ref(), bytes_max).await?;
        let entries = match manifest {
            Manifest::Image { config, layers } => return Ok(Found { digest, config, layers }),
            Manifest::Index(entries) => entries,
        };
        let chosen = manifest::choose(&entries)?.digest.clone();
        let reference = self.reference.clone_with_digest(chosen.as_str().to_owned());
        match self.read(&reference, Some(&chosen), bytes_max).await? {
            (digest, Manifest::Image { config, layers }) => Ok(Found { digest, config, layers }),
            (_, Manifest::Index(_)) => {
                Err(Failure::new("image_refused", "the image's list names another list"))
            }
        }
    }

    async fn read(
        &self,
        reference: &Reference,
        wanted: Option<&Digest>,
        bytes_max: u64,
    ) -> Result<(Digest, Manifest), Failure> {
        let (bytes, _) = self.client.pull_manifest_raw(reference, &self.auth, &MANIFESTS).await?;
        if bytes.len() as u64 > TEXT_MAX {
            let message = format!("its manifest has more than {TEXT_MAX} bytes");
            return Err(Failure::new("image_refused", message));
        }
        let digest = Digest::of_bytes(&bytes);
        if let Some(wanted) = wanted.filter(|wanted| **wanted != digest) {
            let message = format!("the manifest that was sent is {digest}, not {wanted}");
            return Err(Failure::new("image_broken", message));
        }
        Ok((digest, Manifest::parse(&bytes, bytes_max)?))
    }

    async fn fetch(
        &self,
        found: Found,
        blobs: &Blobs,
        bytes_max: u64,
        tell: &Tell,
    ) -> Result<Obtained, Failure> {
        let part = |l: &Descriptor| Part { digest: l.digest.to_string(), bytes: l.size };
        tell.say(&Progress::Layers { layers: found.layers.iter().map(part).collect() });
        self.blob(&found.config, blobs, tell, false).await?;
        let text = blobs.read(&found.config.digest, TEXT_MAX)?;
        let config = Config::parse(&text)?;
        // The same layer may be there twice: once is enough, and two would write one file.
        let mut distinct: Vec<&Descriptor> = Vec::new();
        for layer in &found.layers {
            if !distinct.iter().any(|d| d.digest == layer.digest) {
                distinct.push(layer);
            }
        }
        stream::iter(distinct)
            .map(|layer| self.blob(layer, blobs, tell, true))
            .buffer_unordered(PARALLEL)
            .try_collect::<Vec<()>>()
            .await?;
        Ok(Obtained {
            digest: found.digest,
            names: Vec::new(),
            config,
            config_blob: found.config.digest,
            layers: found.layers.into_iter().map(|l| l.digest).collect(),
            bytes_max,
        })
    }

    /// Fetches a blob, or what is missing of it.
    async fn blob(
        &self,
        wanted: &Descriptor,
        blobs: &Blobs,
        tell: &Tell,
        layer: bool,
    ) -> Result<(), Failure> {
        let say = |bytes| {
            if layer {
                tell.say(&Progress::Layer { digest: wanted.digest.to_string(), bytes });
            }
        };
        if blobs.has(&wanted.digest, wanted.size) {
            say(wanted.size);
            return Ok(());
        }
        let mut draft = blobs.resume(&wanted.digest)?;
        let mut fruitless = 0;
        for _ in 0..TRIES_ALL {
            let before = draft.bytes;
            let ended = self.more(wanted, &mut draft, &say).await;
            if draft.bytes > wanted.size {
                draft.discard();
                let message = format!("{} has more bytes than its manifest says", wanted.digest);
                return Err(Failure::new("image_broken", message));
            }
            if draft.bytes == wanted.size {
                let made = draft.digest();
                if made == wanted.digest {
                    say(wanted.size);
                    blobs.keep(draft)?;
                    return Ok(());
                }
                if before > 0 {
                    // What was there before may be what is wrong.
                    draft.clear()?;
                    continue;
                }
                draft.discard();
                let message = format!("what was sent for {} is {made}", wanted.digest);
                return Err(Failure::new("image_broken", message));
            }
            fruitless = if draft.bytes > before { 0 } else { fruitless + 1 };
            let failure = match ended {
                Err(failure) if !failure.may_pass => return Err(failure),
                Err(failure) => failure,
                Ok(()) => {
                    let message = format!(
                        "{} broke off at {} of {} bytes",
                        wanted.digest, draft.bytes, wanted.size
                    );
                    Failure::new("image_broken", message)
                }
            };
            if fruitless >= TRIES {
                return Err(failure);
            }
        }
        Err(Failure::new("image_broken", format!("{} breaks off again and again", wanted.digest)))
    }

    /// Asks for the rest of a blob, and takes what comes.
    async fn more(
        &self,
        wanted: &Descriptor,
        draft: &mut crate::blobs::Draft,
        say: &impl Fn(u64),
    ) -> Result<(), Failure> {
        let digest = wanted.digest.as_str();
        if draft.bytes >= wanted.size {
            // Perhaps all of it was there: the digest will tell.
            return Ok(());
        }
        let mut stream = if draft.bytes == 0 {
            self.client.pull_blob_stream(&self.reference, digest).await?.stream
        } else {
            let rest =
                self.client.pull_blob_stream_partial(&self.reference, digest, draft.bytes, None);
            match rest.await? {
                BlobResponse::Partial(rest) => rest.stream,
                BlobResponse::Full(whole) => {
                    draft.clear()?;
                    whole.stream
                }
            }
        };
        let mut told = Instant::now();
        while let Some(bytes) = stream.next().await {
            let bytes = bytes.map_err(|e| {
                let mut failure = Failure::new("image_broken", format!("{digest} broke off: {e}"));
                failure.may_pass = true;
                failure
            })?;
            draft.push(&bytes)?;
            if draft.bytes > wanted.size {
                return Ok(());
            }
            if told.elapsed() >= TELL_EVERY {
                told = Instant::now();
                say(draft.bytes);
            }
        }
        Ok(())
    }
}

impl From<OciDistributionError> for Failure {
    fn from(error: OciDistributionError) -> Failure {
        use OciDistributionError as E;
        let absent = |code: &OciErrorCode| {
            matches!(
                code,
                OciErrorCode::ManifestUnknown
                    | OciErrorCode::NotFound
                    | OciErrorCode::NameUnknown
                    | OciErrorCode::BlobUnknown
                    | OciErrorCode::ManifestBlobUnknown
            )
        };
        let denied =
            |code: &OciErrorCode| matches!(code, OciErrorCode::Unauthorized | OciErrorCode::Denied);
        let (code, words, may_pass) = match &error {
            E::UnauthorizedError { .. } | E::AuthenticationFailure(_) => {
                ("image_denied", "it wants credentials, or others than these".to_owned(), false)
            }
            E::RegistryError { envelope, .. }
                if envelope.errors.iter().any(|e| absent(&e.code)) =>
            {
                ("image_not_found", "it has no such image".to_owned(), false)
            }
            E::RegistryError { envelope, .. }
                if envelope.errors.iter().any(|e| denied(&e.code)) =>
            {
                ("image_denied", "it does not allow it".to_owned(), false)
            }
            E::ServerError { code: 404, .. } | E::ImageManifestNotFoundError(_) => {
                ("image_not_found", "it has no such image".to_owned(), false)
            }
            E::ServerError { code: code @ 400..=499, .. } => {
                ("image_failed", format!("it answered with status {code}"), false)
            }
            E::ServerError { code, .. } => {
                ("image_unreachable", format!("it answered with status {code}"), true)
            }
            E::DigestError(_) => ("image_broken", error.to_string(), false),
            E::RequestError(e) => {
                let mut words = "it can't be reached".to_owned();
                let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(e);
                while let Some(e) = cause {
                    words = format!("it can't be reached: {e}");
                    cause = e.source();
                }
                ("image_unreachable", words, true)
            }
            other => ("image_failed", other.to_string(), false),
        };
        let mut failure = Failure::new(code, words);
        failure.may_pass = may_pass;
        failure
    }
}
