//! Which directories of the host a child may get (contracts/aegis.md 3). An allowed directory
//! allows what lies below it; names that only begin alike do not.

use super::glob::Glob;

/// Longest path that is looked at, bytes.
const PATH_MAX: usize = 1024;
/// Where a machine sees its own workspace.
const OWN: &str = "/workspace";

/// A workspace as a machine asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkspaceAsk {
    /// As it was given.
    pub given: String,
    /// The same on the host after all links; absent when there is no such directory.
    pub resolved: Option<String>,
}

impl WorkspaceAsk {
    /// What of the asker's own workspace is asked for, if it is that: the path below it, without a
    /// leading slash.
    pub fn below_own(&self) -> Option<String> {
        let given = clean(&self.given)?;
        let below = given.strip_prefix(OWN)?;
        let own = below.is_empty() || below.starts_with('/');
        own.then(|| below.trim_start_matches('/').to_owned())
    }
}

/// A workspace that may be given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Workspace {
    /// A part of the parent's own one.
    OfParent {
        /// The path below it, without a leading slash; empty for the whole of it.
        below: String,
    },
    /// A directory of the host.
    Host {
        /// The path after all links: the one that was judged.
        path: String,
    },
}

/// The path without empty and `.` parts; none where it is relative, goes up, or is too long.
pub(super) fn clean(path: &str) -> Option<String> {
    if !path.starts_with('/') || path.len() > PATH_MAX || path.contains('\0') {
        return None;
    }
    let mut out = String::with_capacity(path.len());
    for part in path.split('/').filter(|part| !part.is_empty() && *part != ".") {
        if part == ".." {
            return None;
        }
        out.push('/');
        out.push_str(part);
    }
    Some(out)
}

/// What may be given of what was asked for, if anything.
pub(super) fn judge(allowed: &[String], ask: &WorkspaceAsk) -> Option<Workspace> {
    if let Some(below) = ask.below_own() {
        return Some(Workspace::OfParent { below });
    }
    let given = clean(&ask.given)?;
    let path = clean(ask.resolved.as_deref()?)?;
    let lies_in = |path: &str| allowed.iter().any(|pattern| allows(pattern, path));
    (lies_in(&given) && lies_in(&path)).then_some(Workspace::Host { path })
}

fn allows(pattern: &str, path: &str) -> bool {
    contains(pattern, &Glob::literal(path))
}

/// Whether everything that `narrow` allows is allowed by `wide`.
pub(super) fn covers(wide: &str, narrow: &str) -> bool {
    contains(wide, &Glob::new(narrow.trim_end_matches('/')))
}

fn contains(pattern: &str, what: &Glob) -> bool {
    if !pattern.starts_with('/') {
        return false;
    }
    let pattern = Glob::new(pattern.trim_end_matches('/'));
    pattern.covers(what) || pattern.then("/**").covers(what)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn given(allowed: &[&str], given: &str, resolved: Option<&str>) -> Option<Workspace> {
        let allowed: Vec<String> = allowed.iter().map(|a| (*a).to_owned()).collect();
        let ask =
            WorkspaceAsk { given: given.to_owned(), resolved: resolved.map(ToOwned::to_owned) };
        judge(&allowed, &ask)
    }

    #[test]
    fn no_trick_leads_out_of_what_is_allowed() {
        let host = |path: &str| Some(Workspace::Host { path: path.to_owned() });
        let own = |below: &str| Some(Workspace::OfParent { below: below.to_owned() });
        assert_eq!(given(&["/a/b"], "/a/b", Some("/a/b")), host("/a/b"));
        assert_eq!(given(&["/a/b"], "/a//b/./c/", Some("/a/b/c")), host("/a/b/c"));
        assert_eq!(given(&["/a/*"], "/a/x", Some("/a/x")), host("/a/x"));
        for (path, resolved) in [
            ("/a/bc", Some("/a/bc")),
            ("/a/b/../c", Some("/a/c")),
            ("/a/b/../b", Some("/a/b")),
            ("/a/b", Some("/etc")),
            ("/a/b", None),
            ("/link", Some("/a/b")),
            ("a/b", Some("/a/b")),
            ("", Some("/a/b")),
            ("/", Some("/")),
            ("/a", Some("/a")),
            ("/a/b\0", Some("/a/b")),
        ] {
            assert_eq!(given(&["/a/b"], path, resolved), None, "{path:?}");
        }
        assert_eq!(given(&[], "/a", Some("/a")), None);
        assert_eq!(given(&["", "a", "*"], "/a", Some("/a")), None);
        assert_eq!(given(&["/"], "/a", Some("/a")), host("/a"), "all of the host, by its own word");
        assert_eq!(given(&[], "/workspace", None), own(""));
        assert_eq!(given(&[], "/workspace/x/y/", None), own("x/y"));
        assert_eq!(given(&[], "/workspace/../etc", Some("/etc")), None);
        assert_eq!(given(&[], "/workspaces", Some("/workspaces")), None);
    }

    proptest! {
        #[test]
        fn covering_is_never_wrong(
            wide in "(/[ab*]{1,3}){1,3}", narrow in "(/[ab*]{1,3}){1,3}", path in "(/[ab]{1,3}){1,4}",
        ) {
            if covers(&wide, &narrow) && allows(&narrow, &path) {
                prop_assert!(allows(&wide, &path), "{wide} {narrow} {path}");
            }
        }
    }
}
