//! The names that a machine bears in its files.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};

use rustix::fs::{CWD, OFlags};

use crate::net;
use crate::note::note;
use crate::root::{OWN, open_below, write_below};

/// Longest [`HOSTS`] of which anything is known, bytes.
const HOSTS_MAX: u64 = 4096;
const HOSTS: &str = "etc/hosts";

/// The names that a machine bears.
pub struct Names<'a> {
    /// Its host name.
    pub hostname: &'a str,
    /// Its machine id.
    pub machine_id: &'a str,
}

impl Names<'_> {
    /// Writes them into the upper layer before it is one, which saves the overlay's copying.
    /// A machine that has broken its own /etc goes without.
    pub fn write(&self, own: &OwnedFd) {
        let new = fs::DirBuilder::new().mode(0o755).create(format!("{OWN}/upper/etc")).is_ok();
        let mut texts = self.always().to_vec();
        // What a machine made of these in an earlier life stays.
        if new {
            texts.push((HOSTS, hosts(self.hostname)));
            texts.push(("etc/resolv.conf", net::resolv_conf()));
        }
        for (path, text) in texts {
            if let Err(e) = write_below(own, &format!("upper/{path}"), text.as_bytes()) {
                note(&format!("/{path}: {e}"));
            }
        }
    }

    fn always(&self) -> [(&'static str, String); 2] {
        [
            ("etc/hostname", format!("{}\n", self.hostname)),
            ("etc/machine-id", format!("{}\n", self.machine_id)),
        ]
    }

    fn text(&self, path: &str) -> Option<String> {
        if path == HOSTS {
            return Some(hosts(self.hostname));
        }
        self.always().into_iter().find(|(of, _)| *of == path).map(|(_, text)| text)
    }
}

/// The files with the names of a machine whose copies are to bear others. Opened while nothing else
/// runs, and saved with it: no copy need look for them.
#[derive(Default)]
pub struct Opened(Vec<(&'static str, File, u64)>);

impl Opened {
    /// Opens the files of a machine of that name. What its user made of them stays: then it is not
    /// among them.
    pub fn of(hostname: &str) -> Opened {
        // This process never leaves its root.
        Opened::below(CWD, hostname)
    }

    fn below(root: impl AsFd, hostname: &str) -> Opened {
        let open = |path| {
            let made = if path == HOSTS { OFlags::empty() } else { OFlags::CREATE };
            let file = open_below(root.as_fd(), path, OFlags::RDWR | made)?;
            let about = file.metadata()?;
            Ok(about.is_file().then_some((path, file, about.len())))
        };
        let mut opened = Vec::new();
        for path in ["etc/hostname", "etc/machine-id", HOSTS] {
            let found: io::Result<_> = open(path);
            match found {
                Ok(Some((_, ref file, _))) if path == HOSTS && !says(file, &hosts(hostname)) => {}
                Ok(found) => opened.extend(found),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => note(&format!("/{path}: {e}")),
            }
        }
        Opened(opened)
    }

    /// Writes other names over them, which costs less than to write them anew: blocks are not freed and
    /// taken again, and nothing is forced out to the disk.
    pub fn change(self, names: &Names<'_>) {
        for (path, file, old) in self.0 {
            let Some(text) = names.text(path) else { continue };
            let written = file.write_all_at(text.as_bytes(), 0).and_then(|()| {
                let new = text.len() as u64;
                if old > new { file.set_len(new) } else { Ok(()) }
            });
            if let Err(e) = written {
                note(&format!("/{path}: {e}"));
            }
        }
    }
}

fn says(file: &File, text: &str) -> bool {
    let mut now = String::new();
    file.take(HOSTS_MAX).read_to_string(&mut now).is_ok_and(|_| now == text)
}

fn hosts(hostname: &str) -> String {
    format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_knows_its_own_name() {
        let hosts = hosts("box");
        assert!(hosts.contains("127.0.0.1\tlocalhost\n") && hosts.ends_with("127.0.1.1\tbox\n"));
    }

    #[test]
    fn copies_bear_other_names_and_keep_what_is_their_users() {
        let root = std::env::temp_dir().join(format!("aegis-harness-names-{}", std::process::id()));
        let etc = root.join("etc");
        let read = |name: &str| fs::read_to_string(etc.join(name)).unwrap();
        let new = Names { hostname: "b", machine_id: "fedcba" };
        for users in [false, true] {
            fs::create_dir_all(&etc).unwrap();
            fs::write(etc.join("hostname"), "a-long-name\n").unwrap();
            let own = if users { "127.0.0.1 mine\n".to_owned() } else { hosts("a-long-name") };
            fs::write(etc.join("hosts"), &own).unwrap();
            let below = File::open(&root).unwrap();
            Opened::below(&below, "a-long-name").change(&new);
            // One that is not there is made.
            assert_eq!((read("hostname"), read("machine-id")), ("b\n".into(), "fedcba\n".into()));
            assert_eq!(read("hosts"), if users { own } else { hosts("b") });
            fs::remove_dir_all(&root).unwrap();
        }
        // Links lead nowhere, and nothing is made through them.
        fs::create_dir_all(&etc).unwrap();
        std::os::unix::fs::symlink(root.join("stolen"), etc.join("hostname")).unwrap();
        let below = File::open(&root).unwrap();
        Opened::below(&below, "a").change(&new);
        assert!(!root.join("stolen").exists());
        fs::remove_dir_all(&root).unwrap();
    }
}
