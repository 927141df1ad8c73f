//! Archives that people have: OCI layouts and `docker save`, layers over layers.

use aegis_wire::images::{RunConfig, Task};
use serde_json::json;

use crate::support::{Home, Image, Layer, gzip, plain, zstd};

fn three_layers() -> Vec<Vec<u8>> {
    let big: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7) as u8).collect();
    vec![
        Layer::new()
            .directory("etc/", 0o755)
            .file("etc/passwd", b"root:x:0:0::/root:/bin/sh\n")
            .file("etc/gone", b"x")
            .file("opt/a/old", b"x")
            .file("big", &big)
            .link("sh", "bin/busybox")
            .done(),
        Layer::new()
            .raw(tar::EntryType::Regular, "bin/su", "", 0o4755, b"setuid")
            .hard("bin/sudo", "bin/su")
            .file("etc/.wh.gone", b"")
            .directory("opt/a", 0o700)
            .file("opt/a/.wh..wh..opq", b"")
            .file("opt/a/new", b"new")
            .done(),
        Layer::new().file("big", b"small now").file("empty", b"").done(),
    ]
}

#[test]
fn a_layout_becomes_one_tree() {
    for pack in [gzip, zstd, plain] {
        let home = Home::new();
        let run = json!({ "Env": ["A=b"], "Cmd": ["/bin/su"], "User": "1000" });
        let image = Image::new(&three_layers(), pack, run);
        let made = home.import(&image.layout()).unwrap();
        assert_eq!(made.digest, image.digest().to_string());
        assert_eq!(made.names, ["made:1"]);
        assert_eq!(made.config.command(), ["/bin/su"]);
        assert_eq!(made.bytes, std::fs::metadata(home.image()).unwrap().len());
        let tree = home.look();
        assert_eq!(tree.read("big"), b"small now");
        assert_eq!(tree.read("opt/a/new"), b"new");
        assert_eq!(tree.read("bin/sudo"), b"setuid");
        let su = home.inode("/bin/su");
        assert!(su.contains("Links: 2"), "{su}");
        assert!(home.inode("/").contains("Links: 11"), "{}", home.inode("/"));
        assert_eq!(tree.found["sh"], "-> bin/busybox 777");
        assert_eq!(tree.found["opt/a"], "dir 700");
        assert_eq!(tree.found["tmp"], "dir 1777", "every machine needs one");
        assert!(!tree.has("etc/gone") && !tree.has("opt/a/old") && !tree.has("etc/.wh.gone"));
        assert_eq!(home.parts(), ["work"]);
    }
}

#[test]
fn what_docker_saves_is_read() {
    let home = Home::new();
    let mut layers = three_layers();
    layers.push(layers[2].clone());
    let image = Image::new(&layers, plain, json!({}));
    let made = home.import(&image.saved("acme/bot:3")).unwrap();
    assert_eq!(made.names, ["acme/bot:3"]);
    assert_eq!(home.look().read("big"), b"small now");
    let again = home.import(&image.saved("acme/bot:3")).unwrap();
    assert_eq!(made, again, "the same archive is the same image");
}

#[test]
fn many_names_and_long_files_are_kept() {
    let home = Home::new();
    let mut layer = Layer::new();
    let name = |n: usize| format!("dir/{}-{n:05}", "n".repeat(60 + n % 30));
    for n in 0..3000 {
        // Of all sizes around the borders of inodes and blocks.
        layer = layer.file(&name(n), &vec![b'x'; n * 3 % 5000]);
    }
    let image = Image::new(&[layer.done()], gzip, json!({}));
    home.import(&image.layout()).unwrap();
    let tree = home.look();
    for n in 0..3000 {
        assert_eq!(tree.read(&name(n)), vec![b'x'; n * 3 % 5000], "{n}");
    }
}

#[test]
fn what_is_no_image_is_said_to_be_none() {
    let home = Home::new();
    for (archive, code) in [
        (Layer::new().file("hello", b"x").done(), "image_refused"),
        (b"not a tar at all, but long enough for a header".repeat(50), "image_broken"),
        (Vec::new(), "image_refused"),
    ] {
        assert_eq!(home.import(&archive).unwrap_err().0, code);
        assert!(!home.image().exists());
    }
}

#[test]
fn a_tree_is_an_image_as_it_is() {
    let home = Home::new();
    let config = RunConfig { cmd: vec!["/bin/su".to_owned()], ..RunConfig::default() };
    let task = || Task::Tree { config: config.clone() };
    let tree = Layer::new()
        .directory("etc/", 0o750)
        .file("etc/passwd", b"root:x:0:0::/root:/bin/sh\n")
        .raw(tar::EntryType::Regular, "./bin/su", "", 0o4755, b"setuid")
        .link("sh", "bin/su")
        .done();
    let made = home.run(task(), &tree).0.unwrap();
    assert_eq!(made.config, config);
    assert_eq!(made.bytes, std::fs::metadata(home.image()).unwrap().len());
    let found = home.look();
    assert_eq!(found.found["etc"], "dir 750");
    assert_eq!(
        (&found.found["sh"][..], &found.read("bin/su")[..]),
        ("-> bin/su 777", &b"setuid"[..])
    );
    assert!(home.inode("/bin/su").contains("0755"), "{}", home.inode("/bin/su"));
    assert_eq!(found.found["tmp"], "dir 1777", "every machine needs one");
    assert_eq!(home.parts(), ["work"], "nothing else is kept");
    // Equal trees are equal images; another command makes another one.
    assert_eq!(home.run(task(), &tree).0.unwrap().digest, made.digest);
    let other = Task::Tree { config: RunConfig::default() };
    assert_ne!(home.run(other, &tree).0.unwrap().digest, made.digest);
    for (bad, code) in [
        (b"no tar".repeat(1000), "image_broken"),
        (tree[..700].to_vec(), "image_broken"),
        (Layer::new().file("../evil", b"x").done(), "image_refused"),
    ] {
        let (failed, why) = home.run(task(), &bad).0.unwrap_err();
        assert_eq!(failed, code, "{why}");
        assert!(why.contains("the tree can't be taken"), "{why}");
    }
    let config = RunConfig { cwd: Some("relative".to_owned()), ..RunConfig::default() };
    let (failed, _) = home.run(Task::Tree { config }, &tree).0.unwrap_err();
    assert_eq!(failed, "image_refused");
}
