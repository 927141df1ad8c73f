//! The guest kernel: taken out of the distribution's package, never installed on the host.

use std::fs;
use std::path::{Path, PathBuf};

use aegis_wire::words::Time;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::modules::{Catalogue, Module};
use super::packages;
use super::publish::Draft;
use super::tool::{self, Tool};
use super::vmlinux::{self, Kind};
use crate::failure::{Failure, Result};
use crate::home::Home;
use crate::human;
use crate::output::Work;

/// File that says what lies in `HOME/kernel`.
pub const RECORD: &str = "kernel.json";
/// The kernel itself.
pub const VMLINUX: &str = "vmlinux";
/// Its modules, flat.
pub const MODULES: &str = "modules";

/// Packages that depend on the newest kernel made for virtual machines, best first.
const META_PACKAGES: [&str; 4] =
    ["linux-image-cloud-amd64", "linux-image-virtual", "linux-image-kvm", "linux-image-amd64"];

/// What lies in `HOME/kernel`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Version, as `uname -r` will say; `own` for one's own kernel.
    pub version: String,
    /// Of `vmlinux`, hexadecimal.
    pub sha256: String,
    /// `elf-pvh` or `bzimage`.
    pub format: String,
    /// Module files in the order in which they can be loaded.
    pub modules: Vec<String>,
    /// When it was put there.
    pub made_at: Time,
}

/// Where the kernel comes from.
#[derive(Clone, Debug, Default)]
pub struct Source {
    /// One's own kernel.
    pub kernel: Option<PathBuf>,
    /// Its modules.
    pub modules: Option<PathBuf>,
    /// Make it anew though one is there.
    pub rebuild: bool,
    /// Package lists may be brought up to date.
    pub may_update_lists: bool,
}

/// Reads what lies in a home, if it is whole: the kernel is there and still the recorded one.
pub fn present(home: &Home) -> Option<Record> {
    let record = read_record(home)?;
    let kernel = fs::read(home.kernel().join(VMLINUX)).ok()?;
    let modules = home.kernel().join(MODULES);
    let whole = hex(&Sha256::digest(&kernel)) == record.sha256
        && record.modules.iter().all(|module| modules.join(module).is_file());
    whole.then_some(record)
}

/// Reads what is said to lie in a home.
pub fn read_record(home: &Home) -> Option<Record> {
    serde_json::from_slice(&fs::read(home.kernel().join(RECORD)).ok()?).ok()
}

/// Makes sure that there is a kernel. Says whether it is a new one.
pub fn ensure(home: &Home, source: &Source) -> Result<(Record, bool)> {
    let mut work = Work::begin("kernel", "looking");
    if !source.rebuild
        && source.kernel.is_none()
        && let Some(record) = present(home)
    {
        work.done(&format!("{} is there", record.version));
        return Ok((record, false));
    }
    let draft = Draft::beside(&home.kernel())?;
    let (version, image, modules) = match &source.kernel {
        Some(path) => own(path, source.modules.as_deref())?,
        None => packaged(&mut work, source.may_update_lists)?,
    };
    work.now("unpacking the kernel");
    let (kernel, format) = startable(image)?;
    let write = |path: PathBuf, bytes: &[u8]| {
        fs::write(&path, bytes).map_err(|e| Failure::file("write", &path, e))
    };
    write(draft.path().join(VMLINUX), &kernel)?;
    let dir = draft.path().join(MODULES);
    fs::create_dir(&dir).map_err(|e| Failure::file("make", &dir, e))?;
    for module in &modules {
        write(dir.join(&module.file), &module.bytes)?;
    }
    let record = Record {
        version,
        sha256: hex(&Sha256::digest(&kernel)),
        format: format.to_owned(),
        modules: modules.into_iter().map(|module| module.file).collect(),
        made_at: Time(Timestamp::now().as_millisecond()),
    };
    let text = serde_json::to_vec_pretty(&record)
        .map_err(|e| Failure::because("cannot record the kernel", e))?;
    write(draft.path().join(RECORD), &text)?;
    draft.publish()?;
    work.done(&format!(
        "{} ({}, {} modules)",
        record.version,
        human::bytes(kernel.len() as u64),
        record.modules.len()
    ));
    Ok((record, true))
}

/// The form in which a kernel is kept: as ELF where it can be started so, else as bzImage.
fn startable(image: Vec<u8>) -> Result<(Vec<u8>, &'static str)> {
    match vmlinux::kind(&image) {
        Kind::Pvh => Ok((image, "elf-pvh")),
        Kind::BzImage => match vmlinux::extract(&image) {
            Ok(kernel) if vmlinux::kind(&kernel) == Kind::Pvh => Ok((kernel, "elf-pvh")),
            _ => Ok((image, "bzimage")),
        },
        Kind::ElfWithoutPvh => Err(Failure::here("this kernel has no PVH entry (CONFIG_PVH)")
            .fix("give its bzImage instead, or build it with CONFIG_PVH=y")),
        Kind::Unknown => Err(Failure::here("this is neither a bzImage nor an ELF kernel")),
    }
}

type Parts = (String, Vec<u8>, Vec<Module>);

fn own(kernel: &Path, modules: Option<&Path>) -> Result<Parts> {
    let image = fs::read(kernel).map_err(|e| Failure::file("read", kernel, e))?;
    let modules = match modules {
        // A kernel of one's own may have everything built in, so nothing is required of it.
        None => Vec::new(),
        Some(dir) => Catalogue::of(&[dir.to_owned()])?.take()?,
    };
    Ok(("own".into(), image, modules))
}

fn packaged(work: &mut Work, may_update_lists: bool) -> Result<Parts> {
    if std::env::consts::ARCH != "x86_64" {
        return Err(Failure::here("only x86-64 hosts are supported so far").fix(
            "use an x86-64 host, or bring a kernel: aegis setup --kernel FILE --modules DIR",
        ));
    }
    work.now("asking apt for the newest kernel");
    let version = match newest() {
        Some(version) => version,
        None if may_update_lists => {
            packages::update_lists()?;
            newest().ok_or_else(no_kernel)?
        }
        None => return Err(no_kernel()),
    };
    let temp = tempfile::tempdir().map_err(|e| Failure::because("cannot make a directory", e))?;
    let tree = temp.path().join("tree");
    // Debian has all in one package; Ubuntu puts modules into one or two others.
    let mut lacking = Vec::new();
    for kind in ["image", "modules", "modules-extra"] {
        let package = format!("linux-{kind}-{version}");
        match fetch(&package, temp.path(), &tree, work) {
            Ok(()) => {}
            // Its absence is told by what is lacking then.
            Err(_) if kind != "image" => continue,
            Err(failure) => return Err(failure),
        }
        let dirs: Vec<PathBuf> = ["lib/modules", "usr/lib/modules"]
            .iter()
            .map(|dir| tree.join(dir).join(&version))
            .filter(|dir| dir.is_dir())
            .collect();
        let catalogue = Catalogue::of(&dirs)?;
        lacking = catalogue.lacking();
        if lacking.is_empty() {
            let path = tree.join("boot").join(format!("vmlinuz-{version}"));
            let image = fs::read(&path).map_err(|e| Failure::file("read", &path, e))?;
            return Ok((version, image, catalogue.take()?));
        }
    }
    Err(Failure::here(format!(
        "the packages of Linux {version} lack the modules {}",
        lacking.join(", ")
    ))
    .fix("bring a kernel that has them: aegis setup --kernel FILE [--modules DIR]"))
}

fn no_kernel() -> Failure {
    let sudo = if tool::is_root() { "" } else { "sudo " };
    Failure::here("apt knows no kernel package that fits").fix(format!(
        "run `{sudo}apt-get update`, or bring a kernel: aegis setup --kernel FILE [--modules DIR]"
    ))
}

fn newest() -> Option<String> {
    META_PACKAGES.iter().find_map(|meta| {
        let printed = Tool::new("apt-cache", &["depends", meta]).ok()?.run().ok()?;
        image_version(&String::from_utf8_lossy(&printed))
    })
}

/// The version in `Depends: linux-image-<version>`.
fn image_version(depends: &str) -> Option<String> {
    depends.lines().find_map(|line| {
        let package = line.trim().strip_prefix("Depends: ")?;
        let version = package.strip_prefix("linux-image-")?;
        let version = version.strip_prefix("unsigned-").unwrap_or(version);
        version.starts_with(|c: char| c.is_ascii_digit()).then(|| version.to_owned())
    })
}

fn fetch(package: &str, temp: &Path, tree: &Path, work: &mut Work) -> Result<()> {
    let debs = temp.join(package);
    fs::create_dir(&debs).map_err(|e| Failure::file("make", &debs, e))?;
    work.now(&format!("downloading {package}"));
    let mut download = Tool::new("apt-get", &["-q", "download"])?;
    if tool::is_root() {
        // Else apt drops to a user of its own, who may not write here, and complains.
        download = download.args(["-o", "APT::Sandbox::User=root"]);
    }
    download.arg(package).dir(&debs).run().map_err(|failure| {
        let sudo = if tool::is_root() { "" } else { "sudo " };
        failure.fix(format!("run `{sudo}apt-get update` and try again; the lists may be old"))
    })?;
    let deb = fs::read_dir(&debs)
        .ok()
        .and_then(|mut entries| entries.next()?.ok())
        .ok_or_else(|| Failure::here(format!("apt-get brought no file for {package}")))?;
    work.now(&format!("unpacking {package}"));
    Tool::new("dpkg-deb", &["--extract"])?.arg(deb.path()).arg(tree).run()?;
    Ok(())
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_apt() {
        let debian = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(image_version(debian).as_deref(), Some("6.1.0-56-cloud-amd64"));
        let ubuntu =
            "linux-image-virtual\n  Depends: linux-base\n  Depends: linux-image-6.8.0-49-generic\n";
        assert_eq!(image_version(ubuntu).as_deref(), Some("6.8.0-49-generic"));
        assert_eq!(image_version("<linux-image-amd64>\n"), None);
        assert_eq!(image_version("  Depends: linux-image-generic\n"), None);
    }

    #[test]
    fn an_own_kernel_that_is_none_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("kernel");
        fs::write(&file, b"not a kernel").unwrap();
        let home = Home::resolve(Some(&dir.path().join("home"))).unwrap();
        let source = Source { kernel: Some(file), ..Source::default() };
        assert!(ensure(&home, &source).unwrap_err().words().contains("neither"));
        assert!(!home.kernel().exists());
    }
}
