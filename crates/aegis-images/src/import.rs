//! From an archive: what `docker save` writes, or an OCI layout as a tar. Its files go to the blobs by
//! what they are; their names are only looked up in memory.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read};

use serde::Deserialize;
use tar::{Archive, EntryType};

use crate::blobs::Blobs;
use crate::digest::Digest;
use crate::job::{Failure, Obtained};
use crate::manifest::{self, Config, Descriptor, LAYERS_MAX, Manifest, TEXT_MAX};

/// Files of an archive: a few for each layer.
const FILES_MAX: usize = 16 * LAYERS_MAX;
/// Names that an archive gives its image.
const NAMES_MAX: usize = 16;
/// Where an OCI index notes an image's name in full.
const FULL_NAME: &str = "io.containerd.image.name";
/// Where it notes a name, or only a tag.
const SHORT_NAME: &str = "org.opencontainers.image.ref.name";

/// What lies in an archive, by its name there.
struct Files<'a> {
    blobs: &'a Blobs,
    found: BTreeMap<String, (Digest, u64)>,
    links: HashMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

fn refused(message: impl Into<String>) -> Failure {
    Failure::new("image_refused", message)
}

/// Reads an archive to its end.
pub fn import(from: impl Read, blobs: &Blobs, bytes_max: u64) -> Result<Obtained, Failure> {
    let files = Files::read(from, blobs, bytes_max)?;
    if files.found.contains_key("manifest.json") {
        return files.saved(bytes_max);
    }
    if files.found.contains_key("index.json") {
        return files.layout(bytes_max);
    }
    Err(refused("this is neither an archive of `docker save` nor an OCI layout"))
}

/// A name without what means nothing in it.
fn plain(name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    let parts = name.split('/').filter(|part| !part.is_empty() && *part != ".");
    parts.collect::<Vec<_>>().join("/")
}

impl<'a> Files<'a> {
    fn read(from: impl Read, blobs: &'a Blobs, bytes_max: u64) -> Result<Files<'a>, Failure> {
        let broken =
            |e: io::Error| Failure::new("image_broken", format!("the archive is broken: {e}"));
        let mut files = Files { blobs, found: BTreeMap::new(), links: HashMap::new() };
        let (mut archive, mut sum) = (Archive::new(from), 0u64);
        for (n, entry) in archive.entries().map_err(broken)?.enumerate() {
            let mut entry = entry.map_err(broken)?;
            let name = plain(&entry.path_bytes());
            if n >= FILES_MAX || name.len() > 4096 {
                return Err(refused(format!("the archive has more than {FILES_MAX} files")));
            }
            match entry.header().entry_type() {
                EntryType::Regular | EntryType::Continuous => {
                    sum = sum.saturating_add(entry.size());
                    if sum > bytes_max {
                        return Err(refused(format!(
                            "the archive has more than {bytes_max} bytes"
                        )));
                    }
                    let mut draft = blobs.begin("import")?;
                    let mut piece = vec![0; 1 << 20];
                    loop {
                        let n = entry.read(&mut piece).map_err(broken)?;
                        if n == 0 {
                            break;
                        }
                        draft.push(&piece[..n])?;
                    }
                    if draft.bytes != entry.size() {
                        return Err(broken(io::ErrorKind::UnexpectedEof.into()));
                    }
                    files.found.insert(name, blobs.keep(draft)?);
                }
                // An earlier `docker save` links a layer that several images have.
                EntryType::Symlink | EntryType::Link => {
                    let target = entry.link_name_bytes().unwrap_or_default();
                    let target = if entry.header().entry_type() == EntryType::Symlink {
                        let above = name.rsplit_once('/').map_or("", |(above, _)| above);
                        joined(above, &String::from_utf8_lossy(&target))
                    } else {
                        plain(&target)
                    };
                    files.links.insert(name, target);
                }
                _ => {}
            }
        }
        Ok(files)
    }

    /// A file by its name, over one link.
    fn get(&self, name: &str) -> Result<&(Digest, u64), Failure> {
        let name = plain(name.as_bytes());
        let target = self.links.get(&name);
        let found = self.found.get(&name).or_else(|| self.found.get(target?));
        found.ok_or_else(|| refused(format!("the archive lacks {name:.200}")))
    }

    fn text(&self, name: &str) -> Result<Vec<u8>, Failure> {
        Ok(self.blobs.read(&self.get(name)?.0, TEXT_MAX)?)
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<Digest, Failure> {
        let digest = &descriptor.digest;
        let name = format!("blobs/{}", digest.as_str().replace(':', "/"));
        let (found, size) = self.get(&name)?;
        if found != digest || *size != descriptor.size {
            let message = format!("what the archive has as {digest} is {found}");
            return Err(Failure::new("image_broken", message));
        }
        Ok(digest.clone())
    }

    /// `docker save`.
    fn saved(&self, bytes_max: u64) -> Result<Obtained, Failure> {
        let text = self.text("manifest.json")?;
        let mut all: Vec<Saved> = serde_json::from_slice(&text)
            .map_err(|e| refused(format!("the archive's manifest.json is not understood: {e}")))?;
        let (Some(saved), true) = (all.pop(), all.is_empty()) else {
            return Err(refused("the archive must have one image; save one at a time"));
        };
        if saved.layers.len() > LAYERS_MAX {
            return Err(refused(format!("the image has more than {LAYERS_MAX} layers")));
        }
        let (config_blob, config_size) = self.get(&saved.config)?.clone();
        let config = Config::parse(&self.blobs.read(&config_blob, TEXT_MAX)?)?;
        let layers = saved.layers.iter().map(|name| self.get(name).cloned());
        let layers: Vec<(Digest, u64)> = layers.collect::<Result<_, _>>()?;
        let manifest = manifest::made_up((&config_blob, config_size), &layers);
        let mut names = saved.repo_tags.unwrap_or_default();
        names.truncate(NAMES_MAX);
        Ok(Obtained {
            digest: Digest::of_bytes(&manifest),
            names,
            config,
            config_blob,
            layers: layers.into_iter().map(|(digest, _)| digest).collect(),
            bytes_max,
        })
    }

    /// An OCI layout.
    fn layout(&self, bytes_max: u64) -> Result<Obtained, Failure> {
        let index = self.text("index.json")?;
        let Manifest::Index(entries) = Manifest::parse(&index, bytes_max)? else {
            return Err(refused("the archive's index.json is no list of images"));
        };
        let mut names = Vec::new();
        for entry in &entries {
            let notes = entry.annotations.iter();
            let said = notes.filter_map(|n| n.get(FULL_NAME).or_else(|| n.get(SHORT_NAME)));
            names.extend(said.cloned());
        }
        names.dedup();
        names.truncate(NAMES_MAX);
        let mut entry = manifest::choose(&entries)?.clone();
        // A list in the list is common: one per name, one per platform.
        for _ in 0..2 {
            self.blob(&entry)?;
            let text = self.blobs.read(&entry.digest, TEXT_MAX)?;
            match Manifest::parse(&text, bytes_max)? {
                Manifest::Index(entries) => entry = manifest::choose(&entries)?.clone(),
                Manifest::Image { config, layers } => {
                    let config_blob = self.blob(&config)?;
                    let config = Config::parse(&self.blobs.read(&config_blob, TEXT_MAX)?)?;
                    let layers = layers.iter().map(|layer| self.blob(layer));
                    let layers = layers.collect::<Result<_, _>>()?;
                    let digest = entry.digest;
                    return Ok(Obtained { digest, names, config, config_blob, layers, bytes_max });
                }
            }
        }
        Err(refused("the archive's list of images leads nowhere"))
    }
}

/// A link's target, seen from its directory; `..` ends at the archive's root.
fn joined(above: &str, target: &str) -> String {
    let mut parts: Vec<&str> = above.split('/').filter(|p| !p.is_empty()).collect();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}
