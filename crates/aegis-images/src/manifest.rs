//! Manifests and configurations of images, as far as machines need them. Others' words: what is not
//! understood is ignored where it does no harm, and refused where it could.

use std::collections::BTreeMap;

use aegis_wire::images::RunConfig;
use serde::Deserialize;
use serde_json::json;

use crate::digest::Digest;

/// Layers of an image.
pub const LAYERS_MAX: usize = 128;
/// Bytes of a manifest or configuration.
pub const TEXT_MAX: u64 = 4 << 20;

/// Why something is no image for machines here.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not JSON, or not of that shape.
    #[error("the image's {0} is not understood: {1}")]
    Malformed(&'static str, #[source] serde_json::Error),
    /// None for this processor.
    #[error("the image is not made for linux/amd64, but for {0}")]
    Platform(String),
    /// Something else.
    #[error("this is no image that a machine can have: {0}")]
    Kind(String),
    /// More than is taken.
    #[error("the image is too large: {0}")]
    Large(String),
    /// Its parts contradict each other.
    #[error("the image's parts do not fit together: {0}")]
    Unfit(&'static str),
}

/// Something named by what it is.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What kind of thing.
    #[serde(default)]
    pub media_type: String,
    /// What it is.
    pub digest: Digest,
    /// Its bytes.
    pub size: u64,
    /// For whom.
    #[serde(default)]
    pub platform: Option<Platform>,
    /// Notes.
    #[serde(default)]
    pub annotations: Option<BTreeMap<String, String>>,
}

/// For whom something is made.
#[derive(Clone, Debug, Deserialize)]
pub struct Platform {
    os: String,
    architecture: String,
}

/// A list of images, or an image.
#[derive(Debug)]
pub enum Manifest {
    /// Images, one per platform mostly.
    Index(Vec<Descriptor>),
    /// One.
    Image {
        /// How it is run.
        config: Descriptor,
        /// What it consists of, from below.
        layers: Vec<Descriptor>,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Whole {
    schema_version: u32,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
}

impl Manifest {
    /// Reads one; layers are bounded, all together to `bytes_max`.
    pub fn parse(bytes: &[u8], bytes_max: u64) -> Result<Manifest, Error> {
        let whole: Whole =
            serde_json::from_slice(bytes).map_err(|e| Error::Malformed("manifest", e))?;
        if whole.schema_version != 2 {
            return Err(Error::Kind(format!("a manifest of schema {}", whole.schema_version)));
        }
        match (whole.manifests, whole.config, whole.layers) {
            (Some(manifests), None, None) => Ok(Manifest::Index(manifests)),
            (None, Some(config), Some(layers)) => {
                if layers.len() > LAYERS_MAX {
                    let message = format!("{} layers, and {LAYERS_MAX} are taken", layers.len());
                    return Err(Error::Large(message));
                }
                let sum = layers.iter().try_fold(0u64, |sum, layer| sum.checked_add(layer.size));
                if sum.is_none_or(|sum| sum > bytes_max) || config.size > TEXT_MAX {
                    return Err(Error::Large(format!("{bytes_max} bytes are taken")));
                }
                // What says nothing of itself is looked at when it is unpacked.
                let alien =
                    |l: &&Descriptor| !l.media_type.is_empty() && !l.media_type.contains("tar");
                match layers.iter().find(alien) {
                    Some(layer) => {
                        Err(Error::Kind(format!("a layer of {:.100}", layer.media_type)))
                    }
                    None => Ok(Manifest::Image { config, layers }),
                }
            }
            _ => Err(Error::Kind("neither a list of images nor an image".to_owned())),
        }
    }
}

/// The entry for this processor.
pub fn choose(entries: &[Descriptor]) -> Result<&Descriptor, Error> {
    let fits = |p: &Platform| p.os == "linux" && p.architecture == "amd64";
    let ours = entries.iter().find(|e| e.platform.as_ref().is_some_and(fits));
    match (ours, entries) {
        (Some(entry), _) => Ok(entry),
        // An archive's only image need not say for whom it is; its configuration does.
        (None, [only]) if only.platform.is_none() => Ok(only),
        _ => {
            let names = entries.iter().filter_map(|e| e.platform.as_ref());
            let names: Vec<String> =
                names.take(8).map(|p| format!("{:.32}/{:.32}", p.os, p.architecture)).collect();
            Err(Error::Platform(if names.is_empty() { "none".into() } else { names.join(", ") }))
        }
    }
}

/// An image's configuration.
#[derive(Debug)]
pub struct Config {
    /// How it is run.
    pub run: RunConfig,
    /// Digests of the unpacked layers, from below.
    pub diffs: Vec<Digest>,
}

#[derive(Deserialize)]
struct ConfigFile {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Option<ConfigRun>,
    rootfs: RootFs,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ConfigRun {
    #[serde(default)]
    env: Option<Vec<String>>,
    #[serde(default)]
    working_dir: Option<String>,
    #[serde(default)]
    user: Option<String>,
    #[serde(default)]
    entrypoint: Option<Vec<String>>,
    #[serde(default)]
    cmd: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Option<Vec<Digest>>,
}

impl Config {
    /// Reads one.
    pub fn parse(bytes: &[u8]) -> Result<Config, Error> {
        let file: ConfigFile =
            serde_json::from_slice(bytes).map_err(|e| Error::Malformed("configuration", e))?;
        if (file.os.as_str(), file.architecture.as_str()) != ("linux", "amd64") {
            return Err(Error::Platform(format!("{:.32}/{:.32}", file.os, file.architecture)));
        }
        let said = file.config.unwrap_or_default();
        let env = said.env.unwrap_or_default().into_iter().filter_map(|line| {
            let (name, value) = line.split_once('=')?;
            (!name.is_empty()).then(|| (name.to_owned(), value.to_owned()))
        });
        let some = |text: Option<String>| text.filter(|t| !t.is_empty());
        let run = RunConfig {
            env: env.collect(),
            cwd: some(said.working_dir)
                .map(|d| if d.starts_with('/') { d } else { format!("/{d}") }),
            user: some(said.user),
            entrypoint: said.entrypoint.unwrap_or_default(),
            cmd: said.cmd.unwrap_or_default(),
        };
        if !run.is_bounded() {
            return Err(Error::Kind("no process could be started as it says".to_owned()));
        }
        Ok(Config { run, diffs: file.rootfs.diff_ids.unwrap_or_default() })
    }
}

/// A manifest for an archive that has none, the same for the same contents.
pub fn made_up(config: (&Digest, u64), layers: &[(Digest, u64)]) -> Vec<u8> {
    let layer = |(digest, size): &(Digest, u64)| json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": size });
    let config = json!({ "mediaType": "application/vnd.oci.image.config.v1+json",
        "digest": config.0, "size": config.1 });
    let layers: Vec<_> = layers.iter().map(layer).collect();
    json!({ "schemaVersion": 2, "config": config, "layers": layers }).to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "0000000000000000000000000000000000000000000000000000000000000000";

    fn layer(size: u64) -> serde_json::Value {
        json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": format!("sha256:{HEX}"), "size": size })
    }

    fn image(layers: Vec<serde_json::Value>) -> Result<Manifest, Error> {
        let whole = json!({ "schemaVersion": 2, "config": layer(1), "layers": layers });
        Manifest::parse(whole.to_string().as_bytes(), 1000)
    }

    #[test]
    fn an_image_is_bounded() {
        assert!(matches!(image(vec![layer(500), layer(500)]), Ok(Manifest::Image { .. })));
        assert!(matches!(image(vec![layer(500), layer(501)]), Err(Error::Large(_))));
        assert!(matches!(image(vec![layer(u64::MAX), layer(2)]), Err(Error::Large(_))));
        assert!(matches!(image(vec![layer(1); LAYERS_MAX + 1]), Err(Error::Large(_))));
        let mut chart = layer(1);
        chart["mediaType"] = "application/vnd.cncf.helm.chart.content.v1".into();
        assert!(matches!(image(vec![chart]), Err(Error::Kind(_))));
        let mut bad = layer(1);
        bad["digest"] = "sha256:../../etc/passwd".into();
        assert!(matches!(image(vec![bad]), Err(Error::Malformed(..))));
    }

    #[test]
    fn the_entry_for_this_processor_is_chosen() {
        let entry = |os: &str, architecture: &str| {
            let mut entry = layer(1);
            entry["platform"] = json!({ "os": os, "architecture": architecture });
            serde_json::from_value::<Descriptor>(entry).unwrap()
        };
        let all = [entry("linux", "arm64"), entry("unknown", "unknown"), entry("linux", "amd64")];
        assert_eq!(choose(&all).unwrap().platform.as_ref().unwrap().architecture, "amd64");
        let none = choose(&all[..2]).unwrap_err().to_string();
        assert!(none.contains("linux/arm64"), "{none}");
    }

    #[test]
    fn a_configuration_says_how_it_is_run() {
        let file = json!({ "os": "linux", "architecture": "amd64", "rootfs": { "diff_ids": [] },
            "config": { "Env": ["PATH=/bin", "A=b=c", "bad"], "WorkingDir": "srv", "User": "app",
                "Entrypoint": ["/run"], "Cmd": null } });
        let config = Config::parse(file.to_string().as_bytes()).unwrap().run;
        assert_eq!(config.env["A"], "b=c");
        assert_eq!(config.env.len(), 2);
        assert_eq!(config.cwd.as_deref(), Some("/srv"));
        assert_eq!(config.command(), ["/run"]);
        let other = file.to_string().replace("amd64", "arm64");
        assert!(matches!(Config::parse(other.as_bytes()), Err(Error::Platform(_))));
    }
}
