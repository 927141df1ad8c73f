//! What is added is counted, and what is over is not done.

use super::*;
use crate::abi::set;
use crate::quota::NAME_BYTES;

const LIMIT: u64 = 256 * 1024;

fn scene() -> Scene {
    Scene::of(LIMIT, false, BOUNDS)
}

fn used(scene: &Scene) -> u64 {
    scene.folder.quota.used()
}

#[test]
fn a_full_machine_writes_nothing_new() {
    let scene = scene();
    let node = scene.create(ROOT_ID, "a").unwrap();
    assert_eq!(used(&scene), NAME_BYTES);
    let block = [7; 16 * 1024];
    let mut offset = 0;
    let ended = loop {
        match scene.write(node, offset, &block) {
            Ok(n) => offset += u64::from(n),
            Err(errno) => break errno,
        }
    };
    assert_eq!(ended, Errno::NOSPC);
    assert!(offset > LIMIT / 2 && used(&scene) <= LIMIT, "{offset} {}", used(&scene));
    assert_eq!(scene.write(node, 1 << 40, b"x"), Err(Errno::NOSPC));
    // What has its blocks already can be written anew.
    assert_eq!(scene.write(node, 0, &block), Ok(block.len() as u32));
    // Another name takes its place too.
    for i in 0.. {
        match scene.mkdir(ROOT_ID, &i.to_string()) {
            Ok(_) => assert!(i < LIMIT / NAME_BYTES, "without end"),
            Err(errno) => {
                assert_eq!(errno, Errno::NOSPC);
                break;
            }
        }
    }
    // What the host sees of its limit.
    let told = scene.say(op::STATFS, ROOT_ID, &Ask::new()).unwrap();
    assert_eq!(u64_at(&told, 0), LIMIT / 4096);
    assert!(u64_at(&told, 8) < 8);
    // Room comes back when the file is really gone.
    let before = used(&scene);
    scene.unlink(ROOT_ID, "a").unwrap();
    assert_eq!(used(&scene), before - NAME_BYTES);
    assert_eq!(scene.read(node, 0, 1).unwrap(), [7], "it is open");
    scene.forget(node, 1);
    assert!(used(&scene) < before - LIMIT / 2);
    assert!(scene.create(ROOT_ID, "b").is_ok());
}

#[test]
fn holes_are_free_and_filling_them_is_not() {
    let scene = scene();
    let node = scene.create(ROOT_ID, "a").unwrap();
    let mut ask = Ask::new();
    ask.u32(set::SIZE).u32(0).u64(0).u64(1 << 40);
    ask.0.resize(88, 0);
    scene.say(op::SETATTR, node, &ask).unwrap();
    assert_eq!(used(&scene), NAME_BYTES);
    assert_eq!(scene.write(node, 1 << 30, &[1; 4096]), Ok(4096));
    assert!(used(&scene) >= NAME_BYTES + 4096);
    assert_eq!(scene.write(node, 1 << 31, &[1; 256 * 1024]), Err(Errno::NOSPC));
    let allocate = |len: u64, mode: u32| {
        let mut ask = Ask::new();
        ask.u64(0).u64(0).u64(len).u32(mode).u32(0);
        scene.say(op::FALLOCATE, node, &ask).map(drop)
    };
    assert_eq!(allocate(LIMIT, 0), Err(Errno::NOSPC));
    // Behind the end nobody would count it.
    assert_eq!(allocate(4096, 1), Err(Errno::OPNOTSUPP));
    // Cut off, it is given back.
    let before = used(&scene);
    ask.0[16..24].copy_from_slice(&0u64.to_le_bytes());
    scene.say(op::SETATTR, node, &ask).unwrap();
    assert!(used(&scene) < before);
}

#[test]
fn what_the_host_had_gives_no_more_than_was_taken() {
    let scene = scene();
    fs::write(scene.at("old"), vec![1; 1 << 20]).unwrap();
    scene.unlink(ROOT_ID, "old").unwrap();
    assert_eq!(used(&scene), 0);
    let node = scene.create(ROOT_ID, "new").unwrap();
    let mut written = 0;
    while scene.write(node, written, &[1; 4096]).is_ok() {
        written += 4096;
    }
    assert!(written <= LIMIT);
}

#[test]
fn a_second_name_does_not_hide_a_file() {
    let scene = scene();
    let node = scene.create(ROOT_ID, "a").unwrap();
    scene.write(node, 0, &[1; 64 * 1024]).unwrap();
    scene.say(op::LINK, ROOT_ID, Ask::new().u64(node).text("b")).unwrap();
    let before = used(&scene);
    scene.unlink(ROOT_ID, "a").unwrap();
    scene.forget(node, 9);
    assert_eq!(used(&scene), before - NAME_BYTES, "it is there as b");
    scene.unlink(ROOT_ID, "b").unwrap();
    assert_eq!(used(&scene), 0);
}

#[test]
fn what_is_made_and_removed_gives_nothing() {
    let scene = scene();
    let node = scene.create(ROOT_ID, "a").unwrap();
    scene.write(node, 0, &[1; 100 * 1024]).unwrap();
    let before = used(&scene);
    for _ in 0..20 {
        let sub = scene.mkdir(ROOT_ID, "sub").unwrap();
        scene.say(op::RMDIR, ROOT_ID, Ask::new().text("sub")).unwrap();
        scene.forget(sub, 1);
        // Its target takes a block, which nobody counted.
        let mut ask = Ask::new();
        ask.text("link").text(&"x".repeat(2000));
        let link = u64_at(&scene.say(op::SYMLINK, ROOT_ID, &ask).unwrap(), 0);
        scene.unlink(ROOT_ID, "link").unwrap();
        scene.forget(link, 1);
        // A file of the host's that is replaced, and one that is not.
        fs::write(scene.at("b"), "").unwrap();
        let mut ask = Ask::new();
        ask.u64(ROOT_ID).text("b").text("a");
        fs::hard_link(scene.at("a"), scene.at("c")).unwrap();
        scene.say(op::RENAME, ROOT_ID, &ask).unwrap();
        fs::rename(scene.at("c"), scene.at("a")).unwrap();
    }
    assert!(used(&scene) >= before - 20 * NAME_BYTES, "{before} {}", used(&scene));
}

#[test]
fn a_name_that_stays_costs_nothing() {
    let scene = scene();
    let sub = scene.mkdir(ROOT_ID, "sub").unwrap();
    scene.create(sub, "a").unwrap();
    let before = used(&scene);
    for _ in 0..4 * BOUNDS.nameless {
        let full = scene.say(op::RMDIR, ROOT_ID, Ask::new().text("sub"));
        assert_eq!(full.map(drop), Err(Errno::NOTEMPTY));
    }
    assert_eq!((used(&scene), scene.folder.nodes.held().2), (before, 0));
    assert_eq!(scene.lookup(ROOT_ID, "sub"), Ok(sub));
}
