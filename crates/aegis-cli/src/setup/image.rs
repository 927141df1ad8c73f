//! Images, the base image first: a small Debian or Ubuntu userland by mmdebstrap, as one read-only erofs file.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;

use aegis_wire::words::{ImageRef, Time};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::kernel::hex;
use super::publish::{Draft, make_private};
use super::tool::{self, Tool};
use crate::failure::{Failure, Result};
use crate::home::Home;
use crate::human;
use crate::output::Work;

/// File that says what lies in `HOME/images/NAME`.
pub const RECORD: &str = "image.json";
/// The image itself.
pub const FILE: &str = "base.erofs";
/// The image that machines get whose request names none.
pub const BASE: &str = "base";

/// What is in every one besides the minimum.
const PACKAGES: [&str; 6] = ["python3", "curl", "ca-certificates", "git", "procps", "iproute2"];
/// What no machine reads.
const LEFT_OUT: [&str; 4] =
    ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/info/*", "/usr/share/locale/*"];
/// A fixed file system id, so that equal trees make equal files.
const FS_UUID: &str = "00000000-0000-0000-0000-000000000000";
/// Bytes at 1024 in every erofs file.
const EROFS_MAGIC: [u8; 4] = [0xe2, 0xe1, 0xf5, 0xe0];

/// From the tree's tar ($1) to the image ($2) and its list of packages ($3), in a scratch
/// directory ($4). It runs as root, or as what is root inside mmdebstrap's user namespace. The
/// files that it empties would else be those of the host that built the image.
const ASSEMBLE: &str = r#"
set -eu
trap 'rm -rf "$4/tree"' EXIT
mkdir "$4/tree"
tar --extract --file "$1" --directory "$4/tree" --numeric-owner --preserve-permissions --xattrs --xattrs-include='*' --exclude='./dev/*'
cd "$4/tree"
echo aegis > etc/hostname
: > etc/resolv.conf
: > etc/machine-id
mkdir -p dev proc sys run tmp workspace
rm -rf var/cache/apt/archives var/cache/ldconfig var/lib/apt/lists/* var/log/apt var/log/*.log
dpkg-query --admindir=var/lib/dpkg --show --showformat='${Package} ${Version}\n' > "$3"
mkfs.erofs --quiet -U "$5" "$2" .
"#;

/// Which image is wanted.
#[derive(Clone, Debug)]
pub struct Wish {
    /// How requests call it.
    pub name: String,
    /// Packages that it has besides those of every image.
    pub include: Vec<String>,
    /// Release that it is made of; else the host's.
    pub suite: Option<String>,
    /// Make it anew, whatever is there.
    pub rebuild: bool,
}

/// What lies in `HOME/images/NAME`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// How requests call it.
    pub name: String,
    /// `sha256:` of the file.
    pub digest: String,
    /// Bytes of the file.
    pub size: u64,
    /// The distribution's release that it is made of.
    pub suite: String,
    /// When.
    pub built_at: Time,
    /// `name version` of all packages in it.
    pub packages: Vec<String>,
}

/// Reads what lies in a home, if it is whole: size and magic fit. (Reading 200 MB at each look
/// would be slow, and the file is only ever replaced whole.)
pub fn present(home: &Home, name: &str) -> Option<Record> {
    let dir = home.image(name);
    let record: Record = serde_json::from_slice(&fs::read(dir.join(RECORD)).ok()?).ok()?;
    let mut file = File::open(dir.join(FILE)).ok()?;
    let whole = file.metadata().ok()?.len() == record.size && is_erofs(&mut file);
    whole.then_some(record)
}

fn is_erofs(file: &mut File) -> bool {
    let mut start = [0; 1028];
    file.read_exact(&mut start).is_ok() && start[1024..] == EROFS_MAGIC
}

impl Record {
    /// Whether all of these packages are in it.
    fn has(&self, packages: &[String]) -> bool {
        let name = |line: &String| line.split(' ').next().unwrap_or_default().to_owned();
        let names: BTreeSet<String> = self.packages.iter().map(name).collect();
        packages.iter().all(|package| names.contains(package))
    }
}

/// Makes sure that there is such an image. Says whether it is a new one.
pub fn ensure(home: &Home, wish: &Wish) -> Result<(Record, bool)> {
    let mut work = Work::begin("image", "looking");
    let there = present(home, &wish.name).filter(|record| record.has(&wish.include));
    if let (false, Some(record)) = (wish.rebuild, there) {
        work.done(&format!("{} is there ({})", record.name, human::bytes(record.size)));
        return Ok((record, false));
    }
    let suite = match &wish.suite {
        Some(suite) => suite.clone(),
        None => host_suite()?,
    };
    make_private(home.root())?;
    let draft = Draft::beside(&home.image(&wish.name))?;
    // Scratch goes to the temporary directory: without root its files belong to mapped users, who
    // can't reach into a home of mode 0700.
    let temp = tempfile::tempdir().map_err(|e| Failure::because("cannot make a directory", e))?;
    let epoch = epoch();
    let tar = temp.path().join("tree.tar");
    bootstrap(&mut work, &suite, &wish.include, &epoch, &tar)?;
    let (file, list) = (temp.path().join(FILE), temp.path().join("packages"));
    work.now("writing the image");
    assemble(&epoch, &tar, &file, &list, temp.path())?;

    let packages = fs::read_to_string(&list).map_err(|e| Failure::file("read", &list, e))?;
    let target = draft.path().join(FILE);
    let (size, digest) = copy(&file, &target, &work)?;
    let record = Record {
        name: wish.name.clone(),
        digest: format!("sha256:{digest}"),
        size,
        suite,
        built_at: Time(Timestamp::now().as_millisecond()),
        packages: packages.lines().map(str::to_owned).collect(),
    };
    let text = serde_json::to_vec_pretty(&record)
        .map_err(|e| Failure::because("cannot record the image", e))?;
    let path = draft.path().join(RECORD);
    fs::write(&path, text).map_err(|e| Failure::file("write", &path, e))?;
    draft.publish()?;
    work.done(&format!(
        "{} of {} ({}, {} packages)",
        record.name,
        record.suite,
        human::bytes(size),
        record.packages.len()
    ));
    Ok((record, true))
}

fn bootstrap(
    work: &mut Work,
    suite: &str,
    include: &[String],
    epoch: &str,
    tar: &Path,
) -> Result<()> {
    work.now(&format!("mmdebstrap {suite}"));
    let mode = if tool::is_root() { "--mode=root" } else { "--mode=unshare" };
    let mut mmdebstrap = Tool::new("mmdebstrap", &["--variant=minbase", "--format=tar", mode])?
        .arg(format!("--include={}", PACKAGES.join(",")))
        .args(include.iter().map(|package| format!("--include={package}")))
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .env("SOURCE_DATE_EPOCH", epoch);
    for path in LEFT_OUT {
        mmdebstrap = mmdebstrap.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    mmdebstrap = mmdebstrap.arg(suite).arg(tar).args(host_sources(suite));
    mmdebstrap.watch(|words| work.now(words.strip_prefix("I: ").unwrap_or(words))).map_err(
        |failure| {
            let fix = if tool::is_root() {
                "check that the package mirror can be reached, and that this host may mount and chroot"
            } else {
                "check that the package mirror can be reached, that /etc/subuid has a line for you \
                 and that user namespaces are allowed; or run `sudo aegis setup --home DIR`"
            };
            failure.fix(fix)
        },
    )?;
    Ok(())
}

fn assemble(epoch: &str, tar: &Path, file: &Path, list: &Path, scratch: &Path) -> Result<()> {
    let shell = if tool::is_root() {
        Tool::new("sh", &[])?
    } else {
        use std::os::unix::fs::PermissionsExt as _;
        // Inside the namespace this directory's owner is a stranger, so all may write there; it
        // lives in a random name for some seconds only.
        let open = fs::Permissions::from_mode(0o1777);
        fs::set_permissions(scratch, open).map_err(|e| Failure::file("open", scratch, e))?;
        Tool::new("mmdebstrap", &["--unshare-helper", "sh"])?
    };
    // mkfs.erofs lies in /usr/sbin, which is not on everybody's PATH.
    let path = std::env::var("PATH").unwrap_or_default();
    shell
        .args(["-c", ASSEMBLE, "assemble"])
        .args([tar, file, list, scratch])
        .arg(FS_UUID)
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .env("SOURCE_DATE_EPOCH", epoch)
        .run()?;
    Ok(())
}

/// Copies, counts and hashes in one go.
fn copy(from: &Path, to: &Path, work: &Work) -> Result<(u64, String)> {
    const PIECE: usize = 1 << 20;
    let mut source = File::open(from).map_err(|e| Failure::file("read", from, e))?;
    let total = source.metadata().map_err(|e| Failure::file("read", from, e))?.len();
    let mut target = File::create(to).map_err(|e| Failure::file("write", to, e))?;
    let (mut hash, mut size, mut piece) = (Sha256::new(), 0, vec![0; PIECE]);
    loop {
        let n = source.read(&mut piece).map_err(|e| Failure::file("read", from, e))?;
        if n == 0 {
            break;
        }
        hash.update(&piece[..n]);
        std::io::Write::write_all(&mut target, &piece[..n])
            .map_err(|e| Failure::file("write", to, e))?;
        size += n as u64;
        work.at(size, total);
    }
    Ok((size, hex(&hash.finalize())))
}

/// Time stamps in the image are not later than this: the caller's, else today's midnight, so that
/// builds of one day with the same packages are equal. Older stamps stay, since python trusts its
/// compiled files only while their source's stamp is the one that they were made from.
fn epoch() -> String {
    const DAY: i64 = 86_400;
    std::env::var("SOURCE_DATE_EPOCH")
        .ok()
        .filter(|text| text.parse::<i64>().is_ok())
        .unwrap_or_else(|| (Timestamp::now().as_second() / DAY * DAY).to_string())
}

/// A name of an image, as requests may say it.
pub fn parse_name(text: &str) -> Result<String, String> {
    match text.parse::<ImageRef>() {
        Ok(_) if !text.contains('/') && !text.starts_with('.') => Ok(text.to_owned()),
        _ => Err("must be the name of an image, as in base".into()),
    }
}

/// A name of a package (Debian policy, 5.6.1): nothing else may reach the programs that install it.
pub fn parse_package(text: &str) -> Result<String, String> {
    let first = text.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b);
    if first && text.len() >= 2 && text.bytes().all(fits) {
        Ok(text.to_owned())
    } else {
        Err("must be the name of a package of the distribution".into())
    }
}

fn host_suite() -> Result<String> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    suite_of(&release).ok_or_else(|| {
        Failure::here("the base image is made of this host's release, which is not known here")
            .fix("name one: aegis setup --suite bookworm")
    })
}

/// `VERSION_CODENAME` of Debian and Ubuntu.
fn suite_of(os_release: &str) -> Option<String> {
    let field = |name: &str| {
        os_release.lines().find_map(|line| {
            let value = line.strip_prefix(name)?.strip_prefix('=')?;
            Some(value.trim_matches('"').to_owned())
        })
    };
    matches!(field("ID")?.as_str(), "debian" | "ubuntu").then(|| field("VERSION_CODENAME"))?
}

/// The mirrors that this host's apt uses for a release, as apt lines: a host behind a private
/// mirror builds from that. Nothing when apt does not know the release: mmdebstrap has defaults.
fn host_sources(suite: &str) -> Vec<String> {
    const FORMAT: &str = "$(ORIGIN)\t$(REPO_URI)\t$(RELEASE)\t$(COMPONENT)";
    Tool::new("apt-get", &["indextargets", "--format", FORMAT, "Created-By: Packages"])
        .and_then(Tool::run)
        .map(|printed| sources_of(suite, &String::from_utf8_lossy(&printed)))
        .unwrap_or_default()
}

fn sources_of(suite: &str, targets: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for target in targets.lines() {
        let fields: Vec<&str> = target.split('\t').collect();
        let [origin @ ("Debian" | "Ubuntu"), uri, release, "main"] = fields[..] else { continue };
        let ours = release == suite
            || release
                .strip_prefix(suite)
                .is_some_and(|rest| matches!(rest, "-updates" | "-security"));
        let line = format!("deb {uri} {release} main");
        // Plain http and https only: file: and cdrom: mean nothing inside.
        if ours && !origin.is_empty() && uri.starts_with("http") && !lines.contains(&line) {
            lines.push(line);
        }
    }
    // Updates alone make no system.
    let whole = lines.iter().any(|line| line.ends_with(&format!(" {suite} main")));
    if whole { lines } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_in_an_image_is_seen() {
        let packages = ["curl 7.88", "python3-pip 23.0"].map(str::to_owned).to_vec();
        let (name, suite) = ("clients".to_owned(), "bookworm".to_owned());
        let (digest, built_at) = (String::new(), Time(0));
        let record = Record { name, digest, size: 0, suite, built_at, packages };
        let has =
            |names: &[&str]| record.has(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        assert!(has(&[]) && has(&["curl"]) && has(&["python3-pip", "curl"]));
        assert!(!has(&["python3"]) && !has(&["curl", "git"]));
    }

    #[test]
    fn names_of_images_and_packages() {
        for yes in ["base", "clients", "python-3.12"] {
            assert!(parse_name(yes).is_ok(), "{yes}");
        }
        for no in ["", ".", "..", ".hidden", "a/b", "../x", "a b"] {
            assert!(parse_name(no).is_err(), "{no}");
        }
        for yes in ["git", "g++", "libc6", "python3-pip", "0ad"] {
            assert!(parse_package(yes).is_ok(), "{yes}");
        }
        for no in ["", "x", "-y", "--include", "a,b", "Git", "a b", "a;b", "./x.deb", "?essential"]
        {
            assert!(parse_package(no).is_err(), "{no}");
        }
    }

    #[test]
    fn the_release_is_read() {
        let debian = "PRETTY_NAME=\"Debian\"\nVERSION_CODENAME=bookworm\nID=debian\n";
        assert_eq!(suite_of(debian).as_deref(), Some("bookworm"));
        assert_eq!(suite_of("ID=ubuntu\nVERSION_CODENAME=noble").as_deref(), Some("noble"));
        assert_eq!(suite_of("ID=fedora\nVERSION_CODENAME=x"), None);
        assert_eq!(suite_of("ID=debian"), None);
    }

    #[test]
    fn only_the_distributions_own_mirrors_are_used() {
        let targets = "Debian\thttp://mirror.test/debian/\tbookworm\tmain\n\
            Debian\thttp://mirror.test/debian/\tbookworm\tcontrib\n\
            Debian\thttp://mirror.test/sec/\tbookworm-security\tmain\n\
            Debian\thttp://mirror.test/debian/\tbookworm-backports\tmain\n\
            Debian\thttp://mirror.test/debian/\tbookworm\tmain\n\
            Vendor\thttp://vendor.test/\tbookworm\tmain\n";
        assert_eq!(
            sources_of("bookworm", targets),
            [
                "deb http://mirror.test/debian/ bookworm main",
                "deb http://mirror.test/sec/ bookworm-security main"
            ]
        );
        assert!(sources_of("trixie", targets).is_empty());
    }
}
