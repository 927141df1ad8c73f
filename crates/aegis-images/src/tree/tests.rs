use super::*;
use proptest::prelude::*;

fn file() -> Kind {
    Kind::File { content: Content::Inline(Vec::new()), size: 0 }
}

fn directory() -> Kind {
    Kind::Directory(BTreeMap::new())
}

/// All paths, with a sign of what they are.
fn paths(tree: &Tree) -> Vec<String> {
    fn walk(tree: &Tree, id: Id, path: &str, out: &mut Vec<String>) {
        if let Kind::Directory(entries) = &tree.node(id).kind {
            for (name, entry) in entries {
                let path = format!("{path}/{}", String::from_utf8_lossy(name));
                out.push(match &tree.node(entry.id).kind {
                    Kind::Directory(_) => format!("{path}/"),
                    Kind::Link(to) => format!("{path} -> {}", String::from_utf8_lossy(to)),
                    _ => path.clone(),
                });
                walk(tree, entry.id, &path, out);
            }
        }
    }
    let mut out = Vec::new();
    walk(tree, ROOT, "", &mut out);
    out
}

fn put(tree: &mut Tree, path: &str, kind: Kind) {
    tree.put(path.as_bytes(), Meta::default(), kind).unwrap();
}

#[test]
fn later_layers_lie_over_earlier_ones() {
    let mut tree = Tree::default();
    tree.begin_layer();
    for path in ["a/one", "a/two", "b/x/deep", "c"] {
        put(&mut tree, path, file());
    }
    tree.begin_layer();
    put(&mut tree, "a/three", file());
    tree.whiteout(b"a/two").unwrap();
    tree.whiteout(b"b").unwrap();
    tree.whiteout(b"nothing/there").unwrap();
    put(&mut tree, "c/now/a/directory", file());
    assert_eq!(
        paths(&tree),
        ["/a/", "/a/one", "/a/three", "/c/", "/c/now/", "/c/now/a/", "/c/now/a/directory"]
    );
}

#[test]
fn whiteouts_hide_nothing_of_their_own_layer() {
    for opaque_first in [true, false] {
        let mut tree = Tree::default();
        tree.begin_layer();
        put(&mut tree, "d/old", file());
        put(&mut tree, "d/sub/old", file());
        tree.begin_layer();
        if opaque_first {
            tree.opaque(b"d").unwrap();
        }
        put(&mut tree, "d/sub/new", file());
        put(&mut tree, "d/new", file());
        if !opaque_first {
            tree.opaque(b"d/").unwrap();
        }
        tree.whiteout(b"d/new").unwrap();
        assert_eq!(paths(&tree), ["/d/", "/d/new", "/d/sub/", "/d/sub/new"], "{opaque_first}");
    }
}

#[test]
fn a_directory_over_a_directory_keeps_what_is_in_it() {
    let mut tree = Tree::default();
    tree.begin_layer();
    put(&mut tree, "d/in", file());
    tree.begin_layer();
    tree.put(b"d/", Meta { mode: 0o700, ..Meta::default() }, directory()).unwrap();
    assert_eq!(paths(&tree), ["/d/", "/d/in"]);
    let id = tree.entries(ROOT)[&b"d"[..]].id;
    assert_eq!(tree.node(id).meta.mode, 0o700);
    put(&mut tree, "d", file());
    assert_eq!(paths(&tree), ["/d"]);
    assert_eq!(tree.dead().count(), 2, "the directory and what was in it");
}

#[test]
fn links_stay_inside() {
    let mut tree = Tree::default();
    put(&mut tree, "usr/lib/x", file());
    put(&mut tree, "lib", Kind::Link(b"usr/lib".to_vec()));
    put(&mut tree, "out", Kind::Link(b"/../../../etc".to_vec()));
    put(&mut tree, "lib/y", file());
    put(&mut tree, "out/passwd", file());
    assert_eq!(
        paths(&tree),
        [
            "/etc/",
            "/etc/passwd",
            "/lib -> usr/lib",
            "/out -> /../../../etc",
            "/usr/",
            "/usr/lib/",
            "/usr/lib/x",
            "/usr/lib/y"
        ]
    );
    put(&mut tree, "loop", Kind::Link(b"loop".to_vec()));
    let loops = tree.put(b"loop/x", Meta::default(), file()).unwrap_err();
    assert_eq!(loops, Bad::Hops("loop/x".into()));
}

#[test]
fn names_that_lead_out_are_refused() {
    let mut tree = Tree::default();
    put(&mut tree, "here", file());
    for path in ["..", "../x", "a/../../x", "a/..", "nul\0"] {
        let bad = tree.put(path.as_bytes(), Meta::default(), file()).unwrap_err();
        assert_eq!(bad, Bad::Name(path.into()));
        assert!(tree.whiteout(path.as_bytes()).is_err() && tree.opaque(path.as_bytes()).is_err());
        assert!(tree.link(b"l", path.as_bytes()).is_err(), "{path}");
        assert!(tree.link(path.as_bytes(), b"here").is_err(), "{path}");
    }
    let long = "x".repeat(256);
    assert!(tree.put(long.as_bytes(), Meta::default(), file()).is_err());
    assert!(tree.put(b"./", Meta::default(), file()).is_err(), "the root is a directory");
    // A path from the root is one from the image's root, as elsewhere.
    put(&mut tree, "/app/x", file());
    assert_eq!(paths(&tree), ["/app/", "/app/x", "/here"]);
}

#[test]
fn hard_links_lead_to_files_of_the_image() {
    let mut tree = Tree::default();
    tree.begin_layer();
    put(&mut tree, "dir/file", file());
    tree.begin_layer();
    tree.link(b"also", b"/dir/file").unwrap();
    tree.whiteout(b"dir/file").unwrap();
    assert_eq!(paths(&tree), ["/also", "/dir/"]);
    for target in ["dir", "nothing", "dir/nothing", ""] {
        assert!(tree.link(b"bad", target.as_bytes()).is_err(), "{target}");
    }
}

proptest! {
    /// Whatever comes, the tree stays one: every name is a plain one, and nothing is its own parent.
    #[test]
    fn no_sequence_breaks_the_tree(steps in proptest::collection::vec(
        (0..6u8, "[ab./]{0,6}", "[ab./]{0,6}"), 0..60)
    ) {
        let mut tree = Tree::default();
        for (what, path, other) in steps {
            let (path, other) = (path.as_bytes(), other.as_bytes());
            let _ = match what {
                0 => tree.put(path, Meta::default(), file()),
                1 => tree.put(path, Meta::default(), directory()),
                2 => tree.put(path, Meta::default(), Kind::Link(other.to_vec())),
                3 => tree.link(path, other),
                4 => tree.whiteout(path),
                _ => { tree.begin_layer(); tree.opaque(path) }
            };
        }
        let all = paths(&tree);
        let names = all.iter().map(|p| p.split(" -> ").next().unwrap().trim_end_matches('/'));
        let plain = |name: &str| !matches!(name, "." | ".." | "");
        let fits = names.clone().all(|p| p[1..].split('/').all(plain));
        prop_assert!(fits, "{all:?}");
        prop_assert!(all.len() + tree.dead().count() + 1 >= tree.nodes.len());
    }
}
