//! The host's tools: which are needed, for what, and which package brings them.

use std::io::{BufRead as _, IsTerminal as _};
use std::process::Command;

use serde::Serialize;

use super::tool;
use crate::failure::{Failure, Result};
use crate::output::{Work, say};

/// A tool that Aegis needs on the host.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// The program.
    pub program: &'static str,
    /// The package of Debian and Ubuntu that brings it.
    pub package: &'static str,
    /// What it is for.
    pub why: &'static str,
}

const fn need(program: &'static str, package: &'static str, why: &'static str) -> Need {
    Need { program, package, why }
}

/// What machines need.
pub const RUN: [Need; 2] = [
    need("qemu-system-x86_64", "qemu-system-x86", "runs the machines"),
    need("mke2fs", "e2fsprogs", "makes the machines' disks"),
];

/// What `aegis setup` itself needs.
pub const SETUP: [Need; 7] = [
    need("apt-get", "apt", "fetches the guest kernel's package"),
    need("dpkg-deb", "dpkg", "unpacks the guest kernel's package"),
    need("xz", "xz-utils", "unpacks kernels and modules"),
    need("zstd", "zstd", "unpacks kernels and modules"),
    need("tar", "tar", "unpacks the base image's tree"),
    need("mmdebstrap", "mmdebstrap", "puts the base image together"),
    need("mkfs.erofs", "erofs-utils", "makes the base image's file"),
];

/// Without root, mmdebstrap maps users by this.
const UNPRIVILEGED: Need = need("newuidmap", "uidmap", "lets mmdebstrap work without root");

/// A tool as it was found.
#[derive(Debug, Serialize)]
pub struct Found {
    /// The program.
    pub program: &'static str,
    /// Where it is; nothing when it is missing.
    pub path: Option<std::path::PathBuf>,
}

/// The package that brings a tool.
pub fn package_of(program: &str) -> Option<&'static str> {
    RUN.iter()
        .chain(&SETUP)
        .chain([&UNPRIVILEGED])
        .find(|need| need.program == program)
        .map(|need| need.package)
}

/// The exact command that installs packages.
pub fn install_command(packages: &[&str]) -> String {
    let sudo = if tool::is_root() { "" } else { "sudo " };
    format!("{sudo}apt-get install --no-install-recommends {}", packages.join(" "))
}

/// Makes sure that every tool is there; installs what is missing if that is wanted.
pub fn ensure(install: bool, yes: bool) -> Result<Vec<Found>> {
    let work = Work::begin("packages", "looking for tools");
    let mut missing = lacking();
    if missing.is_empty() {
        work.done("all tools are there");
    } else {
        drop(work);
        for need in &missing {
            say(&format!("packages: {} is missing ({})", need.program, need.why));
        }
        let mut packages: Vec<&str> = missing.iter().map(|need| need.package).collect();
        packages.sort_unstable();
        packages.dedup();
        let agreed = (install && yes) || asked(install, &packages)?;
        if !agreed {
            return Err(Failure::here(format!("{} tools are missing", missing.len()))
                .fix(format!("run `{}`, or `aegis setup --install`", install_command(&packages))));
        }
        install_packages(&packages)?;
        missing = lacking();
        if let Some(need) = missing.first() {
            return Err(Failure::here(format!(
                "{} is still missing after {} was installed",
                need.program, need.package
            )));
        }
        say("packages: installed");
    }
    let all = RUN.iter().chain(&SETUP);
    Ok(all.map(|n| Found { program: n.program, path: tool::find(n.program) }).collect())
}

fn lacking() -> Vec<Need> {
    let unprivileged = (!tool::is_root()).then_some(UNPRIVILEGED);
    let needs = RUN.into_iter().chain(SETUP).chain(unprivileged);
    needs.filter(|need| tool::find(need.program).is_none()).collect()
}

/// Asks on a terminal; without one, `--install` alone is the consent.
fn asked(install: bool, packages: &[&str]) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Ok(install);
    }
    say(&format!("Install with `{}`? [y/N]", install_command(packages)));
    let mut answer = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut answer)
        .map_err(|e| Failure::because("cannot read the answer", e))?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes"))
}

fn install_packages(packages: &[&str]) -> Result<()> {
    if tool::find("apt-get").is_none() {
        return Err(Failure::here("apt-get is not there: this is neither Debian nor Ubuntu")
            .fix(format!("install by hand what brings: {}", packages.join(" "))));
    }
    apt_get(&["update"])?;
    let mut args = vec!["install", "--yes", "--no-install-recommends"];
    args.extend(packages);
    apt_get(&args)
}

/// Brings the package lists up to date.
pub fn update_lists() -> Result<()> {
    apt_get(&["update"])
}

/// Its words go to our stderr: apt shows progress itself, and sudo may ask for a password.
fn apt_get(args: &[&str]) -> Result<()> {
    let mut command = if tool::is_root() {
        Command::new("apt-get")
    } else if let Some(sudo) = tool::find("sudo") {
        let mut command = Command::new(sudo);
        command.args(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        command
    } else {
        return Err(Failure::here("installing needs root, and there is no sudo")
            .fix(format!("run as root: apt-get {}", args.join(" "))));
    };
    say(&format!("packages: apt-get {}", args.join(" ")));
    let stderr = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stderr(), 3)
        .map_err(|e| Failure::because("cannot run apt-get", std::io::Error::from(e)))?;
    let status = command
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdout(stderr)
        .status()
        .map_err(|e| Failure::because("cannot run apt-get", e))?;
    if status.success() {
        return Ok(());
    }
    Err(Failure::here(format!("apt-get {} failed ({status})", args[0]))
        .fix("read apt's words above; often `apt-get update` or a look at the sources helps"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tool_names_its_package() {
        assert_eq!(package_of("mkfs.erofs"), Some("erofs-utils"));
        assert_eq!(package_of("newuidmap"), Some("uidmap"));
        assert_eq!(package_of("sh"), None);
        assert!(install_command(&["zstd"]).ends_with("--no-install-recommends zstd"));
    }
}
