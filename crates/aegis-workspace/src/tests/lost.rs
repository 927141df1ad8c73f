//! What the host took from under the name that the machine knows it by.

use super::changes::{News, news, watch};
use super::*;

fn scene() -> Scene {
    let mut scene = Scene::new();
    watch(&mut scene, 6400);
    scene
}

/// Has all that is not in use closed.
fn evict(scene: &Scene) {
    for i in 0..3 * HANDLES {
        let name = format!("other{i}");
        fs::write(scene.at(&name), "").unwrap();
        let node = scene.lookup(ROOT_ID, &name).unwrap();
        scene.read(node, 0, 1).unwrap();
    }
}

fn replace(scene: &Scene, name: &str) {
    fs::write(scene.at("next"), "new").unwrap();
    fs::rename(scene.at("next"), scene.at(name)).unwrap();
}

#[test]
fn a_file_that_was_replaced_is_read_to_its_end() {
    let scene = scene();
    for (name, heard) in [("a", true), ("b", false)] {
        fs::write(scene.at(name), "old").unwrap();
        let old = scene.lookup(ROOT_ID, name).unwrap();
        assert_eq!(scene.read(old, 0, 9).unwrap(), b"old");
        replace(&scene, name);
        if heard {
            news(&scene);
        }
        // Without news the machine's own look shows it.
        let new = scene.lookup(ROOT_ID, name).unwrap();
        assert_eq!(scene.folder.nodes.held().2, 1);
        evict(&scene);
        news(&scene);
        assert_eq!(scene.read(old, 0, 9).unwrap(), b"old");
        assert_eq!(scene.read(new, 0, 9).unwrap(), b"new");
        assert_eq!(scene.write(old, 0, b"mine"), Ok(4), "it is open to be written too");
        scene.forget(old, 1);
        assert_eq!(scene.folder.nodes.held().2, 0, "nothing is kept for nobody");
        for i in 0..3 * HANDLES {
            scene.forget(scene.lookup(ROOT_ID, &format!("other{i}")).unwrap(), 2);
        }
    }
}

#[test]
fn what_was_open_when_its_descriptor_was_not_is_kept_too() {
    let scene = scene();
    fs::write(scene.at("a"), "old").unwrap();
    let old = scene.lookup(ROOT_ID, "a").unwrap();
    // Looked at, not read: only descriptors of files that are looked at are closed.
    scene.read(old, 0, 9).unwrap();
    for i in 0..3 * BOUNDS.descriptors {
        fs::write(scene.at(&format!("f{i}")), "").unwrap();
        scene.lookup(ROOT_ID, &format!("f{i}")).unwrap();
    }
    assert!(!scene.folder.nodes.is_open(old));
    replace(&scene, "a");
    news(&scene);
    evict(&scene);
    assert_eq!(scene.read(old, 0, 9).unwrap(), b"old");
}

#[test]
fn a_file_that_lost_one_of_its_names_is_there() {
    let scene = scene();
    fs::write(scene.at("a"), "text").unwrap();
    fs::hard_link(scene.at("a"), scene.at("b")).unwrap();
    let node = scene.lookup(ROOT_ID, "a").unwrap();
    scene.unlink(ROOT_ID, "a").unwrap();
    evict(&scene);
    assert_eq!(scene.read(node, 0, 9).unwrap(), b"text");
    assert_eq!(scene.folder.nodes.held().2, 1);
    // By its other name it is found again.
    assert_eq!(scene.lookup(ROOT_ID, "b"), Ok(node));
    assert_eq!(scene.folder.nodes.held().2, 0);
    evict(&scene);
    assert_eq!(scene.read(node, 0, 9).unwrap(), b"text");
}

#[test]
fn the_host_takes_no_more_room_than_is_left_to_the_machine() {
    let scene = scene();
    let names: Vec<String> = (0..3 * BOUNDS.nameless).map(|i| format!("f{i}")).collect();
    for name in &names {
        fs::write(scene.at(name), "").unwrap();
        scene.lookup(ROOT_ID, name).unwrap();
    }
    for name in &names {
        fs::remove_file(scene.at(name)).unwrap();
    }
    news(&scene);
    assert!(scene.folder.nodes.held().2 <= BOUNDS.nameless / 2);
    scene.create(ROOT_ID, "own").unwrap();
    scene.unlink(ROOT_ID, "own").unwrap();
}

#[test]
fn a_directory_that_was_moved_out_is_out() {
    let scene = scene();
    fs::create_dir_all(scene.at("sub/below")).unwrap();
    let sub = scene.lookup(ROOT_ID, "sub").unwrap();
    let below = scene.lookup(sub, "below").unwrap();
    assert!(scene.lookup(below, "x").is_err());
    fs::rename(scene.at("sub"), scene.dir.path().join("outside")).unwrap();
    fs::write(scene.dir.path().join("outside/below/x"), "the host's").unwrap();
    assert!(news(&scene).contains(&News::Name(ROOT_ID, "sub".to_owned())));
    for node in [sub, below] {
        assert_eq!(scene.lookup(node, "x"), Err(Errno::STALE));
        assert_eq!(scene.create(node, "y"), Err(Errno::STALE));
    }
    // Not by having what is above it forgotten either.
    scene.forget(sub, 1);
    assert_eq!(scene.lookup(below, "x"), Err(Errno::STALE));
    // Back in the folder it is found.
    fs::rename(scene.dir.path().join("outside"), scene.at("sub")).unwrap();
    let sub = scene.lookup(ROOT_ID, "sub").unwrap();
    assert_eq!(scene.lookup(sub, "below"), Ok(below));
    assert!(scene.lookup(below, "x").is_ok());
}

#[test]
fn a_directory_that_was_moved_within_is_within() {
    let scene = scene();
    fs::create_dir_all(scene.at("sub/below")).unwrap();
    let sub = scene.lookup(ROOT_ID, "sub").unwrap();
    let below = scene.lookup(sub, "below").unwrap();
    fs::rename(scene.at("sub"), scene.at("moved")).unwrap();
    fs::write(scene.at("moved/below/x"), "").unwrap();
    news(&scene);
    assert!(scene.lookup(below, "x").is_ok(), "who is in it stays there");
    fs::rename(scene.at("moved"), scene.dir.path().join("outside")).unwrap();
    news(&scene);
    assert_eq!(scene.lookup(below, "x"), Err(Errno::STALE));
}
