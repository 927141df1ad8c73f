//! Layers, archives and layouts as others make them; running a job; looking into what it made.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use aegis_images::digest::Digest;
use aegis_wire::images::{Job, Made, Progress, Pull, Task, blob_dir};
use serde_json::{Value, json};
use tempfile::TempDir;

/// More than any image of these tests has.
pub const BYTES_MAX: u64 = 1 << 30;

/// A layer on its way.
pub struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    pub fn new() -> Layer {
        Layer(tar::Builder::new(Vec::new()))
    }

    /// An entry whose name is written as it is, whatever it is.
    pub fn raw(
        mut self,
        kind: tar::EntryType,
        name: &str,
        link: &str,
        mode: u32,
        data: &[u8],
    ) -> Layer {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_mtime(1_700_000_000);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(data.len() as u64);
        let old = header.as_old_mut();
        old.name[..name.len()].copy_from_slice(name.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    pub fn file(self, name: &str, data: &[u8]) -> Layer {
        self.raw(tar::EntryType::Regular, name, "", 0o644, data)
    }

    pub fn directory(self, name: &str, mode: u32) -> Layer {
        self.raw(tar::EntryType::Directory, name, "", mode, b"")
    }

    pub fn link(self, name: &str, to: &str) -> Layer {
        self.raw(tar::EntryType::Symlink, name, to, 0o777, b"")
    }

    pub fn hard(self, name: &str, to: &str) -> Layer {
        self.raw(tar::EntryType::Link, name, to, 0o644, b"")
    }

    pub fn done(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

pub fn plain(bytes: &[u8]) -> Vec<u8> {
    bytes.to_vec()
}

pub fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// An image as a registry or a layout has it: its manifest, and blobs by digest.
pub struct Image {
    pub manifest: Vec<u8>,
    pub blobs: BTreeMap<Digest, Vec<u8>>,
    pub config: Digest,
    pub layers: Vec<Digest>,
}

fn descriptor(kind: &str, bytes: &[u8]) -> Value {
    json!({ "mediaType": kind, "digest": Digest::of_bytes(bytes), "size": bytes.len() })
}

impl Image {
    /// Of layers as tars, packed by `pack`.
    pub fn new(layers: &[Vec<u8>], pack: fn(&[u8]) -> Vec<u8>, run: Value) -> Image {
        let diffs: Vec<Digest> = layers.iter().map(|l| Digest::of_bytes(l)).collect();
        let packed: Vec<Vec<u8>> = layers.iter().map(|l| pack(l)).collect();
        let config = json!({ "os": "linux", "architecture": "amd64", "config": run,
            "rootfs": { "type": "layers", "diff_ids": diffs } })
        .to_string()
        .into_bytes();
        let layer = |l: &Vec<u8>| descriptor("application/vnd.oci.image.layer.v1.tar+gzip", l);
        let manifest = json!({ "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": packed.iter().map(layer).collect::<Vec<_>>() });
        let config_digest = Digest::of_bytes(&config);
        let layers = packed.iter().map(|l| Digest::of_bytes(l)).collect();
        let mut blobs: BTreeMap<_, _> =
            packed.into_iter().map(|l| (Digest::of_bytes(&l), l)).collect();
        blobs.insert(config_digest.clone(), config);
        Image { manifest: manifest.to_string().into_bytes(), blobs, config: config_digest, layers }
    }

    pub fn digest(&self) -> Digest {
        Digest::of_bytes(&self.manifest)
    }

    /// As an OCI layout in a tar.
    pub fn layout(&self) -> Vec<u8> {
        let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &self.manifest);
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": "made:1" });
        let index = json!({ "schemaVersion": 2, "manifests": [entry] }).to_string();
        let mut out = Layer::new()
            .file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)
            .file("./index.json", index.as_bytes());
        let manifest = (self.digest(), self.manifest.clone());
        for (digest, bytes) in self.blobs.clone().into_iter().chain([manifest]) {
            out = out.file(&format!("blobs/{}", digest.as_str().replace(':', "/")), &bytes);
        }
        out.done()
    }

    /// As an earlier `docker save` writes it: names by directory, and a layer twice as a link.
    pub fn saved(&self, name: &str) -> Vec<u8> {
        let mut out = Layer::new();
        let (mut names, mut seen) = (Vec::new(), BTreeMap::new());
        for (n, digest) in self.layers.iter().enumerate() {
            let path = format!("{n}/layer.tar");
            out = match seen.get(digest) {
                Some(first) => out.link(&path, &format!("../{first}")),
                None => out.file(&path, &self.blobs[digest]),
            };
            seen.entry(digest).or_insert(path.clone());
            names.push(path);
        }
        let config = "config.json";
        let manifest = json!([{ "Config": config, "RepoTags": [name], "Layers": names }]);
        out.file(config, &self.blobs[&self.config])
            .file("manifest.json", manifest.to_string().as_bytes())
            .done()
    }
}

/// A directory of images, and jobs in it.
pub struct Home {
    pub dir: TempDir,
    pub bytes_max: u64,
}

/// How a job ended.
pub type Outcome = Result<Made, (String, String)>;

impl Home {
    pub fn new() -> Home {
        // Its mode is 0700: the job's own user gets there all the same.
        let dir = tempfile::tempdir().unwrap();
        Home { dir, bytes_max: BYTES_MAX }
    }

    pub fn blobs(&self) -> PathBuf {
        self.dir.path().join("blobs")
    }

    pub fn image(&self) -> PathBuf {
        self.blobs().join(blob_dir::WORK).join(blob_dir::IMAGE)
    }

    pub fn import(&self, archive: &[u8]) -> Outcome {
        self.run(Task::Archive, archive).0
    }

    pub fn pull(&self, pull: Pull) -> Outcome {
        self.run(Task::Registry(pull), &[]).0
    }

    /// Runs a job; gives how it ended, and what it said before.
    pub fn run(&self, task: Task, archive: &[u8]) -> (Outcome, Vec<Progress>) {
        let job = Job { dir: self.blobs(), bytes_max: self.bytes_max, task };
        let mut child = Command::new(env!("CARGO_BIN_EXE_aegis-image"))
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let mut line = serde_json::to_vec(&job).unwrap();
        line.push(b'\n');
        line.extend(archive);
        let feeder = std::thread::spawn(move || drop(stdin.write_all(&line)));
        let out = child.wait_with_output().unwrap();
        feeder.join().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        let mut said: Vec<Progress> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let outcome = match said.pop() {
            Some(Progress::Done(made)) => Ok(*made),
            Some(Progress::Failed { error, code }) => Err((code, error)),
            other => panic!("{other:?} after {said:?}"),
        };
        assert_eq!(out.status.success(), outcome.is_ok());
        (outcome, said)
    }

    /// Unpacks what was made by a program that is not ours, and tells what is in it.
    pub fn look(&self) -> Tree {
        let to = tempfile::tempdir().unwrap();
        let out = Command::new("fsck.erofs")
            .arg(format!("--extract={}", to.path().join("x").display()))
            .args(["--overwrite", "--preserve"])
            .arg(self.image())
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let mut found = BTreeMap::new();
        walk(&to.path().join("x"), "", &mut found);
        Tree { found, dir: to }
    }

    /// What another program says of a path: its links and rights, which unpacking does not keep.
    pub fn inode(&self, path: &str) -> String {
        let out = Command::new("dump.erofs")
            .arg(format!("--path={path}"))
            .arg(self.image())
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .output()
            .unwrap();
        String::from_utf8(out.stdout).unwrap()
    }

    /// Files that a job left, besides its work and the blobs' names.
    pub fn parts(&self) -> Vec<String> {
        let entries = fs::read_dir(self.blobs()).unwrap().flatten();
        let names = entries.map(|e| e.file_name().into_string().unwrap());
        names.filter(|n| !n.starts_with("sha256-") || n.ends_with(".part")).collect()
    }
}

/// What an image has: paths, and their kind, rights and owner.
pub struct Tree {
    pub found: BTreeMap<String, String>,
    pub dir: TempDir,
}

impl Tree {
    pub fn read(&self, path: &str) -> Vec<u8> {
        fs::read(self.dir.path().join("x").join(path)).unwrap()
    }

    pub fn has(&self, path: &str) -> bool {
        self.found.contains_key(path)
    }
}

fn walk(dir: &Path, above: &str, found: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = format!("{above}{}", entry.file_name().to_string_lossy());
        let meta = fs::symlink_metadata(entry.path()).unwrap();
        let kind = if meta.is_dir() {
            "dir".to_owned()
        } else if meta.is_symlink() {
            format!("-> {}", fs::read_link(entry.path()).unwrap().display())
        } else {
            format!("file {}", meta.len())
        };
        let mode = meta.permissions().mode() & 0o7777;
        found.insert(path.clone(), format!("{kind} {mode:o}"));
        if meta.is_dir() {
            walk(&entry.path(), &format!("{path}/"), found);
        }
    }
}
