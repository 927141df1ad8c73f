//! The host's changes, as the machine is told of them.

use super::*;
use crate::abi::set;
use crate::news::{FILE, LONG};
use crate::watch::{CHUNK, Changes, Watch};

/// What a piece of news is about.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum News {
    /// A name in a directory.
    Name(u64, String),
    /// A file or directory, and its contents too.
    Node(u64, bool),
}

fn scene() -> Scene {
    watched(WATCHES)
}

/// Of the host's: a hundred are this machine's.
const WATCHES: usize = 6400;

fn watched(limit: usize) -> Scene {
    let mut scene = Scene::new();
    watch(&mut scene, limit);
    scene
}

/// Has a machine told of the host's changes.
pub fn watch(scene: &mut Scene, limit: usize) {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(scene.at(""), flags, Mode::empty()).unwrap();
    scene.folder.watch = Watch::new(&root, "/proc/self/fd/", limit);
    assert!(scene.folder.watch.is_some(), "the host's temporary files are on no local file system");
    takes_news(scene, 1);
}

fn takes_news(scene: &Scene, flag: u32) {
    let mut owner = Ask::new();
    owner.u32(0).u32(0).u32(flag);
    let request = owner.request(aegis_wire::channel::workspace::OWNER_OPCODE, 0);
    assert!(scene.folder.answer(&request).is_none());
}

fn told(scene: &Scene, changes: &Changes) -> Vec<News> {
    let mut all = Vec::new();
    let mut send = |news: &[u8]| {
        assert_eq!(u64_at(news, 8), 0, "it answers nothing");
        let body = &news[OUT_HEADER..];
        all.push(match news[4] {
            2 => News::Node(u64_at(body, 0), u64_at(body, 8) == 0),
            3 => {
                let name = body[16..].strip_suffix(&[0]).unwrap();
                News::Name(u64_at(body, 0), String::from_utf8(name.to_vec()).unwrap())
            }
            code => panic!("{code}"),
        });
        true
    };
    assert!(scene.folder.tell(scene.folder.watch.as_ref().unwrap(), changes, &mut send));
    all.sort();
    all
}

/// All that is told of what happened until now.
pub fn news(scene: &Scene) -> Vec<News> {
    let watch = scene.folder.watch.as_ref().unwrap();
    let mut all = Changes::default();
    let mut buffer = vec![std::mem::MaybeUninit::uninit(); CHUNK];
    while watch.pending() {
        let more = watch.next(&mut buffer).unwrap();
        all.names.extend(more.names);
        all.directories.extend(more.directories);
        all.lost |= more.lost;
    }
    told(scene, &all)
}

/// For how many seconds a name, and what it names, are believed.
fn believed(scene: &Scene, parent: u64, name: &str) -> (u64, u64) {
    let told = scene.say(op::LOOKUP, parent, Ask::new().text(name)).unwrap();
    (u64_at(&told, 16), u64_at(&told, 24))
}

/// Waits until what happens to a file next has another time.
fn settle(scene: &Scene, name: &str) {
    let file = fs::File::open(scene.at(name)).unwrap();
    while crate::nodes::Stamp::of(&crate::nodes::stat(&file).unwrap()).is_young() {
        std::thread::yield_now();
    }
}

fn attributes(scene: &Scene, node: u64) -> u64 {
    u64_at(&scene.say(op::GETATTR, node, Ask::new().u64(0).u64(0)).unwrap(), 0)
}

/// The machine changes a mode; the time of its file's last change as it was told then, and for how long
/// it believes that.
fn change_mode(scene: &Scene, node: u64, mode: u32) -> (u64, u32) {
    let mut ask = Ask::new();
    ask.u32(set::MODE).0.resize(88, 0);
    ask.0[68..72].copy_from_slice(&mode.to_le_bytes());
    let answer = scene.say(op::SETATTR, node, &ask).unwrap();
    (u64_at(&answer, 0), u32::from_le_bytes(answer[68..72].try_into().unwrap()))
}

#[test]
fn what_would_be_told_is_believed_for_long() {
    let scene = scene();
    fs::create_dir(scene.at("sub")).unwrap();
    fs::write(scene.at("a"), "x").unwrap();
    fs::write(scene.at("two"), "x").unwrap();
    fs::hard_link(scene.at("two"), scene.at("names")).unwrap();
    let long = LONG.as_secs();
    assert_eq!(believed(&scene, ROOT_ID, "a"), (long, FILE.as_secs()));
    assert_eq!(believed(&scene, ROOT_ID, "nothing").0, long);
    assert_eq!(attributes(&scene, ROOT_ID), long);
    // What changes in it is heard of once it was looked into.
    assert_eq!(believed(&scene, ROOT_ID, "sub"), (long, 1));
    let sub = scene.lookup(ROOT_ID, "sub").unwrap();
    assert!(scene.lookup(sub, "b").is_err());
    assert_eq!(believed(&scene, ROOT_ID, "sub"), (long, long));
    // Who writes to it by its other name need not be heard of.
    assert_eq!(believed(&scene, ROOT_ID, "two"), (1, 1));
    // A harness that takes no news is told what is soon looked at again.
    let other = watched(WATCHES);
    takes_news(&other, 0);
    fs::write(other.at("a"), "x").unwrap();
    assert_eq!(believed(&other, ROOT_ID, "a"), (1, 1));
    // So is one for which no directory more can be watched.
    let full = watched(0);
    fs::write(full.at("a"), "x").unwrap();
    assert_eq!(believed(&full, ROOT_ID, "a"), (1, 1));
    assert_eq!(believed(&full, ROOT_ID, "nothing").0, 1);
}

#[test]
fn a_change_of_the_hosts_is_told() {
    let scene = scene();
    fs::write(scene.at("a"), "1").unwrap();
    fs::write(scene.at("b"), "1").unwrap();
    let a = scene.lookup(ROOT_ID, "a").unwrap();
    let b = scene.lookup(ROOT_ID, "b").unwrap();
    assert!(scene.lookup(ROOT_ID, "new").is_err());
    assert_eq!(news(&scene), []);

    fs::write(scene.at("a"), "longer").unwrap();
    assert_eq!(news(&scene), [News::Node(a, true)]);
    fs::write(scene.at("a"), "longer still").unwrap();
    assert_eq!(news(&scene), [], "it believes nothing of it any more");
    settle(&scene, "a");
    attributes(&scene, a);
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    fs::set_permissions(scene.at("a"), mode).unwrap();
    assert_eq!(news(&scene), [News::Node(a, true)], "who knows what else was done");

    let name = |name: &str| News::Name(ROOT_ID, name.to_owned());
    attributes(&scene, ROOT_ID);
    fs::write(scene.at("new"), "").unwrap();
    fs::write(scene.at("nobody asked"), "").unwrap();
    assert_eq!(news(&scene), [name("new"), News::Node(ROOT_ID, false)]);
    fs::remove_file(scene.at("b")).unwrap();
    assert_eq!(news(&scene), [name("b"), News::Node(b, false)]);
    // Another file in its place.
    scene.lookup(ROOT_ID, "a").unwrap();
    fs::rename(scene.at("new"), scene.at("a")).unwrap();
    assert_eq!(news(&scene), [name("a"), News::Node(a, false)]);
    let other = scene.lookup(ROOT_ID, "a").unwrap();
    assert_ne!(other, a);
    assert_eq!(attributes(&scene, a), 1, "it is anywhere now");
}

#[test]
fn two_changes_of_one_moment_are_two() {
    let scene = scene();
    fs::write(scene.at("a"), "1").unwrap();
    let a = scene.lookup(ROOT_ID, "a").unwrap();
    // It may bear the time of the first one.
    fs::write(scene.at("a"), "2").unwrap();
    assert_eq!(news(&scene), [News::Node(a, true)]);
}

#[test]
fn its_own_changes_are_no_news_to_a_machine() {
    let scene = scene();
    let sub = scene.mkdir(ROOT_ID, "sub").unwrap();
    let node = scene.create(sub, "a").unwrap();
    attributes(&scene, sub);
    for i in 0..20 {
        scene.write(node, i, b"x").unwrap();
        attributes(&scene, node);
    }
    let rename = |from: &str, to: &str| {
        let mut ask = Ask::new();
        ask.u64(sub).text(from).text(to);
        scene.say(op::RENAME, sub, &ask).unwrap();
    };
    rename("a", "b");
    assert_eq!(scene.lookup(sub, "b"), Ok(node));
    change_mode(&scene, node, 0o600);
    scene.create(sub, "c").unwrap();
    rename("c", "b");
    scene.unlink(sub, "b").unwrap();
    assert!(scene.lookup(sub, "b").is_err());
    scene.say(op::RMDIR, ROOT_ID, Ask::new().text("sub")).unwrap();
    assert_eq!(news(&scene), []);
    // Its own and the host's, at once.
    let both = scene.create(ROOT_ID, "both").unwrap();
    scene.write(both, 0, b"mine").unwrap();
    attributes(&scene, both);
    fs::write(scene.at("both"), "the host's").unwrap();
    assert_eq!(news(&scene), [News::Node(both, true)]);
}

#[test]
fn when_news_were_lost_everything_is_looked_at() {
    let scene = scene();
    let sub = scene.mkdir(ROOT_ID, "sub").unwrap();
    let names: Vec<String> = (0..100).map(|i| format!("f{i}")).collect();
    for name in &names {
        scene.create(sub, name).unwrap();
        assert!(scene.lookup(sub, &format!("no-{name}")).is_err());
    }
    let [same, other, gone] = ["f0", "f1", "f2"].map(|name| scene.lookup(sub, name).unwrap());
    assert_eq!(news(&scene), []);
    attributes(&scene, sub);
    // Nobody hears of these.
    scene.folder.watch.as_ref().unwrap().set_heard(true);
    fs::write(scene.at("sub/f1"), "changed").unwrap();
    fs::remove_file(scene.at("sub/f2")).unwrap();
    fs::write(scene.at("sub/no-f3"), "").unwrap();
    let lost = Changes { lost: true, ..Changes::default() };
    let all = told(&scene, &lost);
    let name = |name: &str| News::Name(sub, name.to_owned());
    assert_eq!(
        all,
        [
            name("f2"),
            name("no-f3"),
            News::Node(sub, false),
            News::Node(other, true),
            News::Node(gone, false)
        ]
    );
    assert!(!all.contains(&News::Node(same, false)));
}

#[test]
fn what_is_forgotten_is_not_watched() {
    let scene = scene();
    for i in 0..2 * WATCHES / 64 {
        let sub = scene.mkdir(ROOT_ID, &format!("d{i}")).unwrap();
        assert!(scene.lookup(sub, "x").is_err());
        scene.forget(sub, 1);
    }
    let sub = scene.mkdir(ROOT_ID, "last").unwrap();
    scene.create(sub, "x").unwrap();
    assert_eq!(believed(&scene, sub, "x"), (LONG.as_secs(), FILE.as_secs()));
    let watch = scene.folder.watch.as_ref().unwrap();
    assert_eq!(watch.directories().len(), 2);
}

#[test]
fn a_change_of_the_machines_hides_none_of_the_hosts() {
    use std::os::unix::fs::MetadataExt as _;
    let scene = scene();
    let nanos = || fs::metadata(scene.at("a")).unwrap().mtime_nsec() as u32;
    fs::write(scene.at("a"), "old").unwrap();
    settle(&scene, "a");
    let a = scene.lookup(ROOT_ID, "a").unwrap();
    fs::write(scene.at("a"), "new").unwrap();
    let (long, time) = change_mode(&scene, a, 0o600);
    assert_eq!(long, 0, "it looks again");
    assert_ne!(time, nanos(), "and finds a change");
    assert_eq!(news(&scene), [News::Node(a, true)]);
    // What nobody but the machine changed is believed.
    settle(&scene, "a");
    attributes(&scene, a);
    assert_eq!(change_mode(&scene, a, 0o640), (FILE.as_secs(), nanos()));
    scene.write(a, 0, b"own").unwrap();
    assert_eq!(change_mode(&scene, a, 0o600), (FILE.as_secs(), nanos()));
    assert_eq!(news(&scene), []);
    // After the machine's own, with no word in between.
    scene.write(a, 0, b"own").unwrap();
    settle(&scene, "a");
    fs::write(scene.at("a"), "new").unwrap();
    assert_eq!(news(&scene), [], "it asks anyhow");
    assert_eq!(change_mode(&scene, a, 0o640).0, 0);
}

#[test]
fn a_change_with_its_time_set_back_is_told() {
    let scene = scene();
    fs::write(scene.at("a"), "old").unwrap();
    settle(&scene, "a");
    let a = scene.lookup(ROOT_ID, "a").unwrap();
    let before = fs::metadata(scene.at("a")).unwrap().modified().unwrap();
    fs::write(scene.at("a"), "new").unwrap();
    fs::File::options().write(true).open(scene.at("a")).unwrap().set_modified(before).unwrap();
    assert_eq!(fs::metadata(scene.at("a")).unwrap().modified().unwrap(), before);
    assert_eq!(news(&scene), [News::Node(a, true)]);
}

#[test]
fn names_are_noted_within_bounds() {
    let scene = scene();
    let noted = || scene.folder.watch.as_ref().unwrap().noted();
    let pass = |from: usize, to: usize| {
        for i in from..to {
            fs::write(scene.at("f"), "").unwrap();
            fs::rename(scene.at("f"), scene.at(&format!("f{i}"))).unwrap();
            let node = scene.lookup(ROOT_ID, &format!("f{i}")).unwrap();
            // Told again by another name: the first one is never taken back.
            fs::rename(scene.at(&format!("f{i}")), scene.at("g")).unwrap();
            scene.lookup(ROOT_ID, "g").unwrap();
            scene.forget(node, 2);
        }
    };
    pass(0, 3000);
    assert!(noted() < 1100, "{}", noted());
    let deaf = watched(0);
    for i in 0..100 {
        deaf.create(ROOT_ID, &format!("f{i}")).unwrap();
    }
    assert_eq!(deaf.folder.watch.as_ref().unwrap().noted(), 0);
}
