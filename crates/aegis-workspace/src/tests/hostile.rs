//! A kernel that says whatever it likes.

use std::collections::BTreeSet;

use aegis_wire::bounds::WORKSPACE_MESSAGE_MAX;
use proptest::prelude::*;

use super::*;

/// Everything outside of the lent folder, as it is.
fn outside(scene: &Scene) -> BTreeSet<(PathBuf, Vec<u8>)> {
    let mut all = BTreeSet::new();
    for entry in fs::read_dir(scene.dir.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            all.insert((path.clone(), fs::read(&path).unwrap()));
        } else {
            all.insert((path, Vec::new()));
        }
    }
    all
}

#[test]
fn no_name_leads_out() {
    let scene = Scene::new();
    fs::create_dir(scene.at("sub")).unwrap();
    let sub = scene.lookup(ROOT_ID, "sub").unwrap();
    let long = "x".repeat(256);
    for name in ["..", ".", "", "/", "../secret", "/etc/passwd", "sub/../../secret", "a/", &long] {
        for node in [ROOT_ID, sub] {
            assert!(scene.lookup(node, name).is_err(), "{name}");
            assert!(scene.create(node, name).is_err(), "{name}");
            assert!(scene.mkdir(node, name).is_err(), "{name}");
            assert!(scene.unlink(node, name).is_err(), "{name}");
            let mut ask = Ask::new();
            ask.text(name).text("x");
            assert!(scene.say(op::SYMLINK, node, &ask).is_err(), "{name}");
            let link = scene.say(op::LINK, node, Ask::new().u64(sub).text(name));
            assert!(link.is_err(), "{name}");
            let mut ask = Ask::new();
            ask.u64(node).text("sub").text(name);
            assert!(scene.say(op::RENAME, ROOT_ID, &ask).is_err(), "{name}");
        }
    }
    assert!(scene.secret().exists());
}

#[test]
fn a_directory_that_becomes_a_link_is_another_thing() {
    let scene = Scene::new();
    let sub = scene.mkdir(ROOT_ID, "sub").unwrap();
    // So that its descriptor is closed here.
    for i in 0..100 {
        scene.create(ROOT_ID, &format!("f{i}")).unwrap();
        scene.lookup(ROOT_ID, &format!("f{i}")).unwrap();
    }
    fs::remove_dir(scene.at("sub")).unwrap();
    std::os::unix::fs::symlink(scene.dir.path(), scene.at("sub")).unwrap();
    assert_eq!(scene.lookup(sub, "secret"), Err(Errno::STALE));
    let link = scene.lookup(ROOT_ID, "sub").unwrap();
    assert!(scene.lookup(link, "secret").is_err());
    assert!(scene.create(link, "new").is_err());
}

#[test]
fn what_is_held_is_bounded() {
    let scene = Scene::new();
    // Files that are known.
    for i in 0..2 * BOUNDS.nodes {
        fs::write(scene.at(&format!("f{i}")), "x").unwrap();
    }
    let told = (0..2 * BOUNDS.nodes).filter(|i| scene.lookup(ROOT_ID, &format!("f{i}")).is_ok());
    assert_eq!(told.count(), BOUNDS.nodes - 1);
    assert_eq!(scene.list(ROOT_ID, true).len(), 2 * BOUNDS.nodes + 2, "listed all the same");
    // Directories that are open.
    let open = || scene.say(op::OPENDIR, ROOT_ID, Ask::new().u64(0)).map(|told| u64_at(&told, 0));
    let opened: Vec<u64> = (0..2 * HANDLES).map_while(|_| open().ok()).collect();
    assert_eq!(opened.len(), HANDLES);
    assert_eq!(open(), Err(Errno::NFILE));
    opened.into_iter().for_each(|handle| scene.release(handle));
    assert_eq!(scene.folder.handles.count(), 0);
    // Files that are open.
    for i in 0..BOUNDS.nodes - 1 {
        let node = scene.lookup(ROOT_ID, &format!("f{i}")).unwrap();
        assert_eq!(scene.read(node, 0, 1).unwrap(), b"x");
    }
    assert_eq!(scene.folder.opened.count(), HANDLES);
    // Files without a name.
    let gone = (0..BOUNDS.nodes - 1).filter(|i| scene.unlink(ROOT_ID, &format!("f{i}")).is_ok());
    assert_eq!(gone.count(), BOUNDS.nameless);
    // Nobody else pays for it.
    for i in 2..2 + BOUNDS.nodes as u64 {
        scene.forget(i, u64::MAX);
    }
    assert_eq!(scene.folder.nodes.held(), (1, 1, 0));
    assert!(scene.lookup(ROOT_ID, &format!("f{}", 2 * BOUNDS.nodes - 1)).is_ok());
}

#[test]
fn deep_trees_are_walked_without_a_stack() {
    let bounds = Bounds { nodes: 10_000, ..BOUNDS };
    let scene = Scene::of(1 << 40, false, bounds);
    let mut at = ROOT_ID;
    let mut all = Vec::new();
    for _ in 0..2200 {
        at = scene.mkdir(at, "d").unwrap();
        all.push(at);
    }
    // Those in the middle are closed by now: each is found again, or said to be stale.
    for node in all {
        let found = scene.lookup(node, "nothing");
        assert!(matches!(found, Err(Errno::NOENT | Errno::STALE)), "{found:?}");
    }
    // The test's own directory is removed by a way that has no such bound.
    let mut ask = Ask::new();
    ask.u64(0).u64(0);
    scene.say(op::GETATTR, ROOT_ID, &ask).unwrap();
}

#[test]
fn large_sizes_are_cut() {
    let scene = Scene::new();
    let node = scene.create(ROOT_ID, "a").unwrap();
    scene.write(node, 0, b"x").unwrap();
    assert_eq!(scene.read(node, 0, u32::MAX).unwrap(), b"x");
    assert!(scene.read(node, u64::MAX, u32::MAX).is_err());
    let mut ask = Ask::new();
    ask.u64(0).u64(0).u32(u32::MAX).u32(0).u64(0).u64(0);
    assert_eq!(scene.say(op::WRITE, node, &ask), Err(Errno::INVAL));
    assert!(scene.write(node, u64::MAX, b"xy").is_err());
    let mut request = Ask::new().u32(u32::MAX).u32(0).request(op::BATCH_FORGET, 0);
    assert!(scene.folder.answer(&request).is_none());
    // A length that lies.
    request[0] = request[0].wrapping_add(1);
    assert!(scene.folder.answer(&request).is_none());
}

/// Something to say: often nearly right.
fn requests() -> impl Strategy<Value = Vec<(u32, u64, Vec<u8>)>> {
    let opcode = prop_oneof![9 => 0..50u32, 1 => any::<u32>()];
    let node = prop_oneof![4 => 0..12u64, 1 => any::<u64>()];
    let name = prop_oneof![
        Just(&b"a\0"[..]),
        Just(&b"b\0"[..]),
        Just(&b"sub\0"[..]),
        Just(&b"..\0"[..]),
        Just(&b"../secret\0"[..]),
        Just(&b"/\0"[..]),
        Just(&b"unended"[..]),
    ];
    let number = prop_oneof![
        4 => 0..20u64,
        1 => Just(0o100_644u64),
        1 => Just(4096u64),
        1 => any::<u64>(),
    ];
    let part = prop_oneof![
        number.clone().prop_map(|n| n.to_le_bytes().to_vec()),
        number.prop_map(|n| (n as u32).to_le_bytes().to_vec()),
        name.prop_map(<[u8]>::to_vec),
        proptest::collection::vec(any::<u8>(), 0..64),
    ];
    let body = proptest::collection::vec(part, 0..8).prop_map(|parts| parts.concat());
    proptest::collection::vec((opcode, node, body), 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever is said, in whatever order: every answer is well-formed and bounded, what is held is
    /// bounded, and nothing outside of the folder changes.
    #[test]
    fn nothing_that_is_said_does_harm(all in requests()) {
        let mut scene = Scene::of(1 << 20, false, BOUNDS);
        changes::watch(&mut scene, 100);
        fs::create_dir(scene.at("sub")).unwrap();
        std::os::unix::fs::symlink("../..", scene.at("sub/up")).unwrap();
        fs::write(scene.at("a"), "a").unwrap();
        let before = outside(&scene);
        for (opcode, node, body) in all {
            let request = Ask(body).request(opcode, node);
            let Some(answer) = scene.folder.answer(&request) else { continue };
            prop_assert!((OUT_HEADER..=WORKSPACE_MESSAGE_MAX).contains(&answer.len()));
            let len = u32::from_le_bytes(answer[..4].try_into().unwrap());
            prop_assert_eq!(len as usize, answer.len());
            let errno = i32::from_le_bytes(answer[4..8].try_into().unwrap());
            prop_assert!((-4095..=0).contains(&errno));
        }
        let news = changes::news(&scene);
        prop_assert!(news.len() <= 4 * BOUNDS.nodes, "{}", news.len());
        let (known, open, nameless) = scene.folder.nodes.held();
        prop_assert!(known <= BOUNDS.nodes && nameless <= BOUNDS.nameless);
        prop_assert!(open <= 1 + BOUNDS.descriptors + BOUNDS.nameless);
        prop_assert!(scene.folder.handles.count() <= HANDLES);
        prop_assert!(scene.folder.opened.count() <= HANDLES);
        prop_assert!(scene.folder.quota.used() <= 1 << 20);
        prop_assert_eq!(outside(&scene), before);
    }

    /// Bytes that are no request at all.
    #[test]
    fn noise_is_no_request(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let scene = Scene::new();
        let _ = scene.folder.answer(&bytes);
    }
}
