//! What an honest kernel asks for.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};

use rustix::fs::FileType;

use super::*;
use crate::abi::{WRITE_CACHE, set};

#[test]
fn files_are_made_written_and_read() {
    let scene = Scene::new();
    let node = scene.create(ROOT_ID, "a").unwrap();
    assert_eq!(scene.write(node, 0, b"hello"), Ok(5));
    assert_eq!(scene.write(node, 3, b"p!!"), Ok(3));
    assert_eq!(fs::read(scene.at("a")).unwrap(), b"help!!");
    assert_eq!(scene.read(node, 2, 100).unwrap(), b"lp!!");
    assert_eq!(scene.read(node, 6, 100).unwrap(), b"");
    scene.say(op::FSYNC, node, Ask::new().u64(0).u64(0)).unwrap();
    // The host's changes are there at the next look.
    fs::write(scene.at("a"), "host").unwrap();
    assert_eq!(scene.read(node, 0, 9).unwrap(), b"host");
    for nobody_wants_to_know in [14, 18] {
        let said = scene.say(nobody_wants_to_know, node, Ask::new().u64(0).u64(0));
        assert_eq!(said, Err(Errno::NOSYS));
    }
}

#[test]
fn files_are_open_only_to_be_read() {
    let scene = Scene::new();
    for i in 0..2 * HANDLES {
        fs::write(scene.at(&format!("f{i}")), "old").unwrap();
    }
    let nodes: Vec<u64> =
        (0..2 * HANDLES).map(|i| scene.lookup(ROOT_ID, &format!("f{i}")).unwrap()).collect();
    for node in &nodes {
        assert_eq!(scene.read(*node, 0, 9).unwrap(), b"old");
        assert_eq!(scene.write(*node, 0, b"n"), Ok(1));
        assert_eq!(scene.read(*node, 0, 9).unwrap(), b"nld");
    }
    assert_eq!(scene.folder.opened.count(), HANDLES);
    // What it wrote the host can run at once.
    let script = scene.create(ROOT_ID, "script").unwrap();
    scene.write(script, 0, b"#!/bin/sh\nexit 7\n").unwrap();
    fs::set_permissions(scene.at("script"), fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(std::process::Command::new(scene.at("script")).status().unwrap().code(), Some(7));
    // Made read-only, as Git makes what it keeps.
    let mut ask = Ask::new();
    ask.u32(OFlags::WRONLY.bits()).u32(0o444).u32(0).u32(0).text("object");
    let object = u64_at(&scene.say(op::CREATE, ROOT_ID, &ask).unwrap(), 0);
    assert_eq!(scene.write(object, 0, b"kept"), Ok(4));
    assert_eq!(scene.read(object, 0, 9).unwrap(), b"kept");
}

#[test]
fn a_file_is_emptied_when_it_is_opened_so() {
    let scene = Scene::new();
    fs::write(scene.at("a"), "long before").unwrap();
    let node = scene.lookup(ROOT_ID, "a").unwrap();
    // As this kernel does it: it has no word for both at once.
    let mut ask = Ask::new();
    ask.u32(set::SIZE).0.resize(88, 0);
    scene.say(op::SETATTR, node, &ask).unwrap();
    assert_eq!(fs::read(scene.at("a")).unwrap(), b"");
    // One that came to be between the look and the making.
    fs::write(scene.at("b"), "of the host").unwrap();
    let create = |flags: OFlags| {
        let mut ask = Ask::new();
        ask.u32((flags | OFlags::WRONLY | OFlags::CREATE).bits());
        ask.u32(0o644).u32(0).u32(0).text("b");
        scene.say(op::CREATE, ROOT_ID, &ask)
    };
    assert_eq!(create(OFlags::EXCL), Err(Errno::EXIST));
    create(OFlags::empty()).unwrap();
    assert_eq!(fs::read(scene.at("b")).unwrap(), b"of the host");
    create(OFlags::TRUNC).unwrap();
    assert_eq!(fs::read(scene.at("b")).unwrap(), b"");
}

#[test]
fn appending_goes_to_the_end_that_there_is() {
    let scene = Scene::new();
    fs::write(scene.at("log"), "1").unwrap();
    let node = scene.lookup(ROOT_ID, "log").unwrap();
    let append = OFlags::WRONLY | OFlags::APPEND;
    scene.write_as(node, 1, b"2", 0, append).unwrap();
    fs::write(scene.at("log"), "12345").unwrap();
    scene.write_as(node, 2, b"6", 0, append).unwrap();
    assert_eq!(fs::read(scene.at("log")).unwrap(), b"123456");
    // Pages of a mapping have their place.
    scene.write_as(node, 0, b"0", WRITE_CACHE, append).unwrap();
    assert_eq!(fs::read(scene.at("log")).unwrap(), b"023456");
}

#[test]
fn names_come_and_go() {
    let scene = Scene::new();
    let sub = scene.mkdir(ROOT_ID, "sub").unwrap();
    let a = scene.create(sub, "a").unwrap();
    assert_eq!(scene.lookup(sub, "a"), Ok(a));
    assert_eq!(scene.mkdir(ROOT_ID, "sub"), Err(Errno::EXIST));
    let rename = |from: u64, name: &str, to: u64, new: &str| {
        scene.say(op::RENAME, from, Ask::new().u64(to).text(name).text(new)).map(drop)
    };
    rename(sub, "a", ROOT_ID, "b").unwrap();
    assert_eq!(scene.lookup(ROOT_ID, "b"), Ok(a));
    assert_eq!(scene.lookup(sub, "a"), Err(Errno::NOENT));
    fs::write(scene.at("c"), "over").unwrap();
    let c = scene.lookup(ROOT_ID, "c").unwrap();
    rename(ROOT_ID, "b", ROOT_ID, "c").unwrap();
    assert_eq!(scene.lookup(ROOT_ID, "c"), Ok(a));
    // What was there before has no name, and is there for who has it.
    assert_eq!(scene.read(c, 0, 9).unwrap(), b"over");
    let two = |flags: u32, from: &str, to: &str| {
        let mut ask = Ask::new();
        ask.u64(ROOT_ID).u32(flags).u32(0).text(from).text(to);
        scene.say(op::RENAME2, ROOT_ID, &ask).map(drop)
    };
    assert_eq!(two(1, "c", "sub"), Err(Errno::EXIST));
    two(2, "c", "sub").unwrap();
    assert_eq!((scene.lookup(ROOT_ID, "sub"), scene.lookup(ROOT_ID, "c")), (Ok(a), Ok(sub)));
    assert_eq!(two(4, "c", "d"), Err(Errno::INVAL));
    scene.say(op::RMDIR, ROOT_ID, Ask::new().text("c")).unwrap();
    scene.unlink(ROOT_ID, "sub").unwrap();
    assert_eq!(scene.unlink(ROOT_ID, "sub"), Err(Errno::NOENT));
    assert_eq!(fs::read_dir(scene.at("")).unwrap().count(), 0);
}

#[test]
fn a_file_without_a_name_lives_as_long_as_it_is_known() {
    let scene = Scene::new();
    let node = scene.create(ROOT_ID, "a").unwrap();
    scene.write(node, 0, b"still").unwrap();
    scene.unlink(ROOT_ID, "a").unwrap();
    assert_eq!(scene.read(node, 0, 9).unwrap(), b"still");
    // Also when many others were open meanwhile.
    for i in 0..2 * HANDLES {
        let other = scene.create(ROOT_ID, &format!("f{i}")).unwrap();
        scene.write(other, 0, b"x").unwrap();
    }
    assert_eq!(scene.read(node, 0, 9).unwrap(), b"still");
    assert_eq!(scene.write(node, 0, b"S"), Ok(1));
    let attributes = scene.say(op::GETATTR, node, Ask::new().u64(0).u64(0)).unwrap();
    assert_eq!(u64_at(&attributes, 24), 5, "its size");
    // A new file of that name is another one.
    let other = scene.create(ROOT_ID, "a").unwrap();
    assert_ne!(other, node);
    scene.forget(node, 1);
    assert_eq!(scene.read(node, 0, 9), Err(Errno::STALE));
}

#[test]
fn links_are_shown_and_not_followed() {
    let scene = Scene::new();
    let mut ask = Ask::new();
    ask.text("link").text("/etc/passwd");
    scene.say(op::SYMLINK, ROOT_ID, &ask).unwrap();
    let link = scene.lookup(ROOT_ID, "link").unwrap();
    assert_eq!(scene.say(op::READLINK, link, &Ask::new()).unwrap(), b"/etc/passwd");
    assert_eq!(scene.read(link, 0, 1), Err(Errno::LOOP));
    symlink("..", scene.at("up")).unwrap();
    let up = scene.lookup(ROOT_ID, "up").unwrap();
    assert_eq!(scene.lookup(up, "secret"), Err(Errno::NOTDIR));
    assert!(scene.say(op::OPENDIR, up, Ask::new().u64(0)).is_err());
    // A second name of a file, in here.
    let node = scene.create(ROOT_ID, "a").unwrap();
    scene.say(op::LINK, ROOT_ID, Ask::new().u64(node).text("b")).unwrap();
    assert_eq!(scene.lookup(ROOT_ID, "b"), Ok(node));
    assert_eq!(fs::metadata(scene.at("b")).unwrap().nlink(), 2);
    // One goes, the other stays, and is found though it was known by the first.
    scene.unlink(ROOT_ID, "b").unwrap();
    scene.lookup(ROOT_ID, "a").unwrap();
    assert!(scene.read(node, 0, 1).is_ok());
}

#[test]
fn attributes_are_the_folders_and_the_owner_is_the_machines() {
    let scene = Scene::new();
    let mut owner = Ask::new();
    owner.u32(1000).u32(100);
    let request = owner.request(aegis_wire::channel::workspace::OWNER_OPCODE, 0);
    assert!(scene.folder.answer(&request).is_none());
    let node = scene.create(ROOT_ID, "a").unwrap();
    let change = |valid: u32, size: u64, mtime: u64, mode: u32| {
        let mut ask = Ask::new();
        ask.u32(valid).u32(0).u64(0).u64(size).u64(0).u64(0).u64(mtime).u64(0);
        ask.u32(0).u32(7).u32(0).u32(mode).u32(0).u32(4242).u32(4242).u32(0);
        scene.say(op::SETATTR, node, &ask).unwrap()
    };
    // Everything at once, an owner and setuid too.
    let all = set::MODE | set::SIZE | set::MTIME | 2 | 4;
    let told = change(all, 70_000, 1_000_000, 0o6751);
    let meta = fs::metadata(scene.at("a")).unwrap();
    assert_eq!(meta.permissions().mode() & 0o7777, 0o751);
    assert_eq!((meta.len(), meta.mtime(), meta.mtime_nsec()), (70_000, 1_000_000, 7));
    assert_eq!(meta.uid(), rustix::process::geteuid().as_raw());
    let number = |at: usize| u32::from_le_bytes(told[at..at + 4].try_into().unwrap());
    assert_eq!((number(16 + 68), number(16 + 72)), (1000, 100));
    assert_eq!(number(16 + 60) & 0o7777, 0o751);
    // Setuid bits of the host's own are no rights inside.
    fs::set_permissions(scene.at("a"), fs::Permissions::from_mode(0o4755)).unwrap();
    let told = change(0, 0, 0, 0);
    assert_eq!(u32::from_le_bytes(told[76..80].try_into().unwrap()) & 0o7777, 0o755);
}

#[test]
fn no_devices() {
    let scene = Scene::new();
    let make = |kind: FileType, name: &str| {
        let mode = kind.as_raw_mode() | 0o4640;
        scene.say(op::MKNOD, ROOT_ID, Ask::new().u32(mode).u32(0x0103).u64(0).text(name)).map(drop)
    };
    for kind in [FileType::CharacterDevice, FileType::BlockDevice, FileType::Directory] {
        assert_eq!(make(kind, "x"), Err(Errno::PERM), "{kind:?}");
    }
    for (kind, name) in [(FileType::RegularFile, "file"), (FileType::Fifo, "pipe")] {
        make(kind, name).unwrap();
    }
    assert_eq!(fs::metadata(scene.at("file")).unwrap().permissions().mode() & 0o7777, 0o640);
    assert!(fs::metadata(scene.at("pipe")).unwrap().file_type().is_fifo());
    // It would wait for somebody at the other end.
    let pipe = scene.lookup(ROOT_ID, "pipe").unwrap();
    assert_eq!(scene.read(pipe, 0, 1), Err(Errno::NXIO));
}

#[test]
fn many_files_are_listed_and_found_with_few_descriptors() {
    let scene = Scene::new();
    let sub = scene.mkdir(ROOT_ID, "sub").unwrap();
    for i in 0..100 {
        fs::write(scene.at(&format!("sub/file-{i}")), i.to_string()).unwrap();
    }
    for plus in [false, true] {
        let all = scene.list(sub, plus);
        assert_eq!(all.len(), 102, "{plus}");
        assert_eq!((all["file-7"], all[".."]), (8, 4));
    }
    for i in 0..100 {
        let node = scene.lookup(sub, &format!("file-{i}")).unwrap();
        assert_eq!(scene.read(node, 0, 9).unwrap(), i.to_string().as_bytes());
    }
    let (known, open, _) = scene.folder.nodes.held();
    assert!(known > 100 && open <= BOUNDS.descriptors + 1, "{known} {open}");
    // What stands there now is another file than the one that was known.
    let node = scene.lookup(sub, "file-0").unwrap();
    for i in 1..60 {
        let other = scene.lookup(sub, &format!("file-{i}")).unwrap();
        scene.read(other, 0, 1).unwrap();
    }
    fs::rename(scene.at("sub/file-99"), scene.at("sub/file-0")).unwrap();
    assert_eq!(scene.read(node, 0, 1), Err(Errno::STALE));
    assert_ne!(scene.lookup(sub, "file-0"), Ok(node));
}

#[test]
fn nothing_changes_what_is_lent_to_be_read() {
    let scene = Scene::of(1 << 30, true, BOUNDS);
    fs::write(scene.at("a"), "x").unwrap();
    let node = scene.lookup(ROOT_ID, "a").unwrap();
    assert_eq!(scene.create(ROOT_ID, "b").map(drop), Err(Errno::ROFS));
    assert_eq!(scene.mkdir(ROOT_ID, "b"), Err(Errno::ROFS));
    assert_eq!(scene.unlink(ROOT_ID, "a"), Err(Errno::ROFS));
    let mut ask = Ask::new();
    ask.u32(set::SIZE).0.resize(88, 0);
    assert_eq!(scene.say(op::SETATTR, node, &ask), Err(Errno::ROFS));
    assert_eq!(scene.write(node, 0, b"y"), Err(Errno::ROFS));
    assert_eq!(scene.read(node, 0, 9).unwrap(), b"x");
}
