//! Files that their owner may not open: for a moment it gives itself the right.

use std::os::unix::fs::PermissionsExt as _;

use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::*;

/// A folder with one file of that mode, as a thread sees it that has not root's right to open all.
fn scene(mode: u32, read_only: bool) -> (Scene, u64) {
    let mut rights = capabilities(None).unwrap();
    rights.effective -= CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
    set_capabilities(None, rights).unwrap();
    let scene = Scene::of(1 << 30, read_only, BOUNDS);
    fs::write(scene.at("a"), "text").unwrap();
    fs::set_permissions(scene.at("a"), fs::Permissions::from_mode(mode)).unwrap();
    let node = scene.lookup(ROOT_ID, "a").unwrap();
    (scene, node)
}

fn mode(scene: &Scene) -> u32 {
    fs::metadata(scene.at("a")).unwrap().permissions().mode() & 0o7777
}

/// Many threads read and write so many bytes at once.
fn race(scene: &Scene, node: u64, bytes: &[u8]) {
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..100 {
                    assert_eq!(scene.write(node, 0, bytes), Ok(bytes.len() as u32));
                    scene.folder.opened.close(node);
                    assert_eq!(scene.read(node, 0, 9).unwrap(), b"text");
                }
            });
        }
    });
}

#[test]
fn a_mode_is_as_it_was_whoever_opened_the_file() {
    for kept in [0o444, 0o111, 0o000] {
        let (scene, node) = scene(kept, false);
        race(&scene, node, b"text");
        assert_eq!(mode(&scene), kept);
    }
}

#[test]
fn what_else_a_mode_says_stays() {
    // A write would end it, as it does anywhere.
    for kept in [0o4555, 0o2555, 0o6111] {
        let (scene, node) = scene(kept, false);
        race(&scene, node, b"");
        assert_eq!(mode(&scene), kept);
    }
}

#[test]
fn a_mode_that_the_machine_gives_meanwhile_stays() {
    let (scene, node) = scene(0o444, false);
    let mut ask = Ask::new();
    ask.u32(crate::abi::set::MODE).0.resize(88, 0);
    for given in [0o400u32, 0o440, 0o404].into_iter().cycle().take(60) {
        ask.0[68..72].copy_from_slice(&given.to_le_bytes());
        std::thread::scope(|scope| {
            scope.spawn(|| scene.write(node, 0, b"text").unwrap());
            scope.spawn(|| scene.say(op::SETATTR, node, &ask).unwrap());
        });
        assert_eq!(mode(&scene), given);
    }
}

#[test]
fn what_is_only_looked_at_keeps_its_mode() {
    let (scene, node) = scene(0o111, true);
    let before = fs::metadata(scene.at("a")).unwrap();
    assert_eq!(scene.read(node, 0, 9), Err(Errno::ACCESS));
    let after = fs::metadata(scene.at("a")).unwrap();
    let changed = std::os::unix::fs::MetadataExt::ctime_nsec;
    assert_eq!(changed(&before), changed(&after), "not for a moment");
    assert_eq!(mode(&scene), 0o111);
}
