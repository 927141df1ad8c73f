//! What a machine trusts beside its image's authorities: the host's, for the hosts of its placeholders.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};

use crate::note::note;
use crate::root::write_below;

/// Where an image's own programs look for authorities that were added.
const CERTIFICATE: &str = "usr/local/share/ca-certificates/aegis.crt";
/// The image's authorities, and the host's.
const BUNDLE: &str = "etc/aegis/ca-bundle.crt";
/// Where images keep theirs: Debian's and Alpine's, Fedora's, SUSE's.
const OF_IMAGE: [&str; 3] = [
    "etc/ssl/certs/ca-certificates.crt",
    "etc/pki/tls/certs/ca-bundle.crt",
    "etc/ssl/ca-bundle.pem",
];
/// Most of an image's bundle, bytes: usual ones are a twentieth of it.
const BUNDLE_MAX: u64 = 4 * 1024 * 1024;
/// What tells programs of the bundle, and of the certificate alone.
const BUNDLE_VARS: [&str; 4] =
    ["SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "GIT_SSL_CAINFO"];
const CERTIFICATE_VAR: &str = "NODE_EXTRA_CA_CERTS";

/// Makes the machine trust this certificate, PEM, and nothing of an earlier start; gives the variables
/// that say so. A machine that can't is as it was.
pub fn set(root: &OwnedFd, certificate: Option<&str>) -> BTreeMap<String, String> {
    let Some(certificate) = certificate else {
        for path in [CERTIFICATE, BUNDLE] {
            if let Err(e) = remove(root, path)
                && e.kind() != io::ErrorKind::NotFound
            {
                note(&format!("/{path} stays: {e}"));
            }
        }
        return BTreeMap::new();
    };
    if let Err(e) = write(root, certificate) {
        note(&format!("no placeholders inside of TLS, as there is no place for certificates: {e}"));
        return BTreeMap::new();
    }
    let bundle = BUNDLE_VARS.map(|name| (name.to_owned(), format!("/{BUNDLE}")));
    let own = (CERTIFICATE_VAR.to_owned(), format!("/{CERTIFICATE}"));
    bundle.into_iter().chain([own]).collect()
}

fn write(root: &OwnedFd, certificate: &str) -> io::Result<()> {
    let mut bundle = OF_IMAGE.iter().find_map(|path| read(root, path).ok()).unwrap_or_default();
    if !bundle.is_empty() && !bundle.ends_with(b"\n") {
        bundle.push(b'\n');
    }
    bundle.extend(certificate.as_bytes());
    for (path, bytes) in [(CERTIFICATE, certificate.as_bytes()), (BUNDLE, &bundle)] {
        let (directory, _) = path.rsplit_once('/').unwrap_or_default();
        make_directories(root, directory)?;
        match remove(root, path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => write_below(root, path, bytes)?,
        }
    }
    Ok(())
}

/// A file of the image, wherever links lead inside of it; nothing that has no end.
pub fn read(root: impl AsFd, path: &str) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOATIME;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_XDEV | ResolveFlags::NO_MAGICLINKS;
    let file = File::from(rustix::fs::openat2(root, path, flags, Mode::empty(), inside)?);
    let about = file.metadata()?;
    if !about.is_file() || about.len() > BUNDLE_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut bytes = Vec::new();
    file.take(BUNDLE_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Opens a directory below one that user code may have filled with links.
fn open(root: &OwnedFd, path: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    Ok(rustix::fs::openat2(root, path, flags, Mode::empty(), inside)?)
}

fn make_directories(root: &OwnedFd, path: &str) -> io::Result<()> {
    let mut above = ".".to_owned();
    for name in path.split('/') {
        let directory = open(root, &above)?;
        match rustix::fs::mkdirat(&directory, name, Mode::from_raw_mode(0o755)) {
            Err(e) if e != rustix::io::Errno::EXIST => return Err(e.into()),
            _ => above = format!("{above}/{name}"),
        }
    }
    Ok(())
}

/// Removes what is there in a file's place, be it a link.
fn remove(root: &OwnedFd, path: &str) -> io::Result<()> {
    let (directory, name) = path.rsplit_once('/').unwrap_or_default();
    Ok(rustix::fs::unlinkat(open(root, directory)?, name, AtFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::*;

    const OWN: &str = "-----BEGIN CERTIFICATE-----\nown\n-----END CERTIFICATE-----\n";

    fn root(dir: &Path) -> OwnedFd {
        File::open(dir).unwrap().into()
    }

    #[test]
    fn what_the_image_trusts_and_the_host_is_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let (at, root) = (dir.path(), root(dir.path()));
        fs::create_dir_all(at.join("etc/ssl/certs")).unwrap();
        fs::create_dir_all(at.join("usr/share")).unwrap();
        // As some images have it; absolute links are meant inside of the image.
        fs::write(at.join("usr/share/roots"), "theirs").unwrap();
        symlink("/usr/share/roots", at.join(OF_IMAGE[0])).unwrap();
        let vars = set(&root, Some(OWN));
        assert_eq!(vars["SSL_CERT_FILE"], "/etc/aegis/ca-bundle.crt");
        assert_eq!(vars[CERTIFICATE_VAR], "/usr/local/share/ca-certificates/aegis.crt");
        assert_eq!(vars.len(), 5);
        let text = |path: &str| fs::read_to_string(at.join(path)).unwrap();
        assert_eq!((text(BUNDLE), text(CERTIFICATE)), (format!("theirs\n{OWN}"), OWN.to_owned()));
        // Another start has another one, and the next none.
        let other = OWN.replace("own", "other");
        set(&root, Some(&other));
        assert_eq!((text(BUNDLE), text(CERTIFICATE)), (format!("theirs\n{other}"), other));
        assert!(set(&root, None).is_empty());
        assert!(!at.join(BUNDLE).exists() && !at.join(CERTIFICATE).exists());
        assert!(set(&root, None).is_empty());
    }

    #[test]
    fn links_lead_nowhere_and_what_has_no_place_says_nothing() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (at, root) = (dir.path(), root(dir.path()));
        let theirs = elsewhere.path().join("theirs");
        fs::write(&theirs, "stays").unwrap();
        fs::create_dir_all(at.join("usr/local/share/ca-certificates")).unwrap();
        fs::create_dir_all(at.join("etc/aegis")).unwrap();
        // In the place of a file it is taken away, not written to.
        symlink(&theirs, at.join(CERTIFICATE)).unwrap();
        assert!(!set(&root, Some(OWN)).is_empty());
        assert_eq!(fs::read_to_string(at.join(BUNDLE)).unwrap(), OWN);
        assert_eq!(fs::read_to_string(at.join(CERTIFICATE)).unwrap(), OWN);
        // In the place of a directory nothing is done at all.
        fs::remove_dir_all(at.join("etc/aegis")).unwrap();
        symlink(elsewhere.path(), at.join("etc/aegis")).unwrap();
        assert!(set(&root, Some(OWN)).is_empty());
        set(&root, None);
        assert_eq!(fs::read_to_string(&theirs).unwrap(), "stays");
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 1);
        // A bundle that has no end is none.
        fs::remove_file(at.join("etc/aegis")).unwrap();
        fs::create_dir_all(at.join("etc/ssl/certs")).unwrap();
        symlink("/dev/zero", at.join(OF_IMAGE[0])).unwrap();
        fs::create_dir(at.join("dev")).unwrap();
        rustix::fs::mkfifoat(&root, "dev/zero", Mode::from_raw_mode(0o644)).unwrap();
        assert!(!set(&root, Some(OWN)).is_empty());
        assert_eq!(fs::read_to_string(at.join(BUNDLE)).unwrap(), OWN);
    }
}
