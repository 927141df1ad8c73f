//! Whom processes run as: what an image says, looked up in the machine's own files. They are the
//! user's to write, and only decide about the user's own processes.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use aegis_wire::channel::rpc::{CODE_PARAMS, RpcError};
use rustix::process::{Gid, Uid};

/// Largest file of users or groups, bytes.
const FILE_MAX: u64 = 1 << 20;
/// Groups that a user is in besides the own one.
const GROUPS_MAX: usize = 64;

/// A user, and what belongs to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its number.
    pub uid: Uid,
    /// Its group's.
    pub gid: Gid,
    /// Further groups'.
    pub groups: Vec<Gid>,
    /// Where it is at home.
    pub home: String,
}

/// Looks up `NAME`, `NUMBER`, and perhaps `:GROUP`, below the root; nobody for root itself.
pub fn find(text: &str) -> Result<Option<User>, RpcError> {
    let read = |path: &str| read(Path::new(path)).unwrap_or_default();
    look(text, &read("/etc/passwd"), &read("/etc/group"))
}

fn read(path: &Path) -> std::io::Result<String> {
    // A pipe in its place is not waited for.
    let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    let mut bytes = Vec::new();
    file.take(FILE_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A number as the kernel takes it; the last one means "none" there.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|n| *n != u32::MAX)
}

fn look(text: &str, passwd: &str, group: &str) -> Result<Option<User>, RpcError> {
    let (name, of) = match text.split_once(':') {
        Some((name, of)) => (name, Some(of).filter(|of| !of.is_empty())),
        None => (text, None),
    };
    let unknown = |what: &str, name: &str| {
        RpcError::new(
            CODE_PARAMS,
            format!("the image runs as {what} {name}, whom it does not have"),
        )
    };
    let users = || passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let groups = || group.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let known = users().find(|u| {
        u.len() >= 6 && (u[0] == name || number(name).is_some_and(|n| number(u[2]) == Some(n)))
    });
    let (uid, own, home) = match (&known, number(name)) {
        (Some(u), _) => {
            let uid = number(u[2]).ok_or_else(|| unknown("user", name))?;
            (uid, number(u[3]).unwrap_or(0), u[5])
        }
        (None, Some(n)) => (n, 0, "/"),
        (None, None) => return Err(unknown("user", name)),
    };
    let gid = match of {
        None => own,
        Some(of) => {
            let known = groups().find(|g| g.len() >= 3 && g[0] == of).and_then(|g| number(g[2]));
            known.or_else(|| number(of)).ok_or_else(|| unknown("group", of))?
        }
    };
    // Who names a group wants that one alone.
    let member = |g: &Vec<&str>| {
        g.len() >= 4 && known.as_ref().is_some_and(|u| g[3].split(',').any(|m| m == u[0]))
    };
    let more = groups().filter(|g| of.is_none() && member(g)).filter_map(|g| number(g[2]));
    let groups: Vec<Gid> = more.take(GROUPS_MAX).map(Gid::from_raw).collect();
    if (uid, gid) == (0, 0) {
        return Ok(None);
    }
    let home = if home.starts_with('/') { home } else { "/" };
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    Ok(Some(User { uid, gid, groups, home: home.to_owned() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/srv/app:/bin/sh\n\
                          bad:x:4294967295:0::/:/\nshort:x\n";
    const GROUP: &str = "root:x:0:\napp:x:1001:\nwheel:x:10:root,app\nsecret:x:42:\n";

    fn of(text: &str) -> Option<(u32, u32, Vec<u32>, String)> {
        look(text, PASSWD, GROUP).unwrap().map(|u| {
            let groups = u.groups.iter().map(|g| g.as_raw()).collect();
            (u.uid.as_raw(), u.gid.as_raw(), groups, u.home)
        })
    }

    #[test]
    fn users_are_found_by_name_and_by_number() {
        let app = |gid, groups| Some((1000, gid, groups, "/srv/app".to_owned()));
        for (text, found) in [
            ("root", None),
            ("0", None),
            ("0:0", None),
            ("app", app(1001, vec![10])),
            ("1000", app(1001, vec![10])),
            ("app:secret", app(42, vec![])),
            ("app:7", app(7, vec![])),
            ("65532", Some((65532, 0, vec![], "/".to_owned()))),
            ("65532:65532", Some((65532, 65532, vec![], "/".to_owned()))),
            ("0:app", Some((0, 1001, vec![], "/root".to_owned()))),
        ] {
            assert_eq!(of(text), found, "{text}");
        }
    }

    #[test]
    fn nobody_becomes_root_by_accident() {
        for text in ["nobody", "", "app:none", "bad", "4294967295", "short", "-1"] {
            assert!(look(text, PASSWD, GROUP).is_err(), "{text}");
        }
    }
}
