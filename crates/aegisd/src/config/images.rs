//! `[images]`: where images come from.

use std::collections::BTreeMap;
use std::path::PathBuf;

use aegis_wire::words::is_loopback;
use serde::Deserialize;

use super::{BadConfig, bad};

/// Bytes of an image where nothing is said, GB.
const MAX_GB: f64 = 20.0;

/// Where images come from, and how large they may be.
#[derive(Clone, Debug)]
pub struct Images {
    /// An image that is asked for and is not there is pulled.
    pub pull_missing: bool,
    /// Who is asked before a registry, by the registry's name.
    pub mirrors: BTreeMap<String, Mirror>,
    /// Bytes that an image may have.
    pub bytes_max: u64,
    /// Docker's file with credentials for registries.
    pub docker_config: Option<PathBuf>,
}

/// A server that has what a registry has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// `HOST` or `HOST:PORT`.
    pub host: String,
    /// Without TLS.
    pub plain: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Section {
    pull: Option<Pull>,
    #[serde(default)]
    mirrors: BTreeMap<String, String>,
    max_gb: Option<f64>,
    docker_config: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Pull {
    Missing,
    Never,
}

/// `http://127.0.0.1:5000`: whoever writes `http` has said that it is meant.
fn mirror(url: &str) -> Option<Mirror> {
    let (host, plain) = match url.strip_prefix("http://") {
        Some(host) => (host, true),
        None => (url.strip_prefix("https://")?, false),
    };
    let host = host.strip_suffix('/').unwrap_or(host);
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b':');
    (!host.is_empty() && host.bytes().all(fits)).then(|| Mirror { host: host.to_owned(), plain })
}

pub(super) fn images(
    section: Section,
    env: &BTreeMap<String, String>,
) -> Result<Images, BadConfig> {
    let mut mirrors = BTreeMap::new();
    for (registry, url) in section.mirrors {
        let wanted = "must be http://HOST[:PORT] or https://HOST[:PORT]";
        let mirror =
            mirror(&url).ok_or_else(|| bad(&format!("images.mirrors.{registry}"), wanted))?;
        mirrors.insert(registry, mirror);
    }
    let max_gb = section.max_gb.unwrap_or(MAX_GB);
    if !(max_gb > 0.0 && max_gb <= 1000.0) {
        return Err(bad("images.max_gb", "must be above 0 and at most 1000"));
    }
    let said = |name: &str| env.get(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let dir = said("DOCKER_CONFIG").or_else(|| Some(said("HOME")?.join(".docker")));
    Ok(Images {
        pull_missing: !matches!(section.pull, Some(Pull::Never)),
        mirrors,
        bytes_max: (max_gb * 1e9) as u64,
        docker_config: section.docker_config.or_else(|| Some(dir?.join("config.json"))),
    })
}

impl Images {
    /// Who is asked for what a registry has, in this order.
    pub fn sources(&self, registry: &str) -> Vec<Mirror> {
        let own = Mirror { host: registry.to_owned(), plain: is_loopback(registry) };
        self.mirrors.get(registry).cloned().into_iter().chain([own]).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Images, BadConfig> {
        let env = BTreeMap::from([("HOME".to_owned(), "/home/x".to_owned())]);
        images(toml::from_str(text).unwrap(), &env)
    }

    #[test]
    fn mirrors_are_asked_before_registries() {
        let images =
            of("[mirrors]\n\"docker.io\" = \"http://127.0.0.1:5000/\"\n\"ghcr.io\" = \"https://m.test\"")
                .unwrap();
        let hosts = |registry: &str| {
            let sources = images.sources(registry);
            sources.iter().map(|s| (s.host.clone(), s.plain)).collect::<Vec<_>>()
        };
        let own = |name: &str, plain| (name.to_owned(), plain);
        assert_eq!(hosts("docker.io"), [own("127.0.0.1:5000", true), own("docker.io", false)]);
        assert_eq!(hosts("ghcr.io"), [own("m.test", false), own("ghcr.io", false)]);
        assert_eq!(hosts("quay.io"), [own("quay.io", false)]);
        assert_eq!(hosts("localhost:5000"), [own("localhost:5000", true)]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(of("max_gb = 0").unwrap_err().setting, "images.max_gb");
        for url in ["127.0.0.1:5000", "http://", "http://a/b", "https://u@h"] {
            let text = format!("[mirrors]\nx = \"{url}\"");
            assert_eq!(of(&text).unwrap_err().setting, "images.mirrors.x", "{url}");
        }
        let usual = of("").unwrap();
        assert!(usual.pull_missing && !of("pull = 'never'").unwrap().pull_missing);
        let file = usual.docker_config.unwrap();
        assert_eq!(file, PathBuf::from("/home/x/.docker/config.json"));
    }
}
