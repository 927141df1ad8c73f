//! A real registry on loopback: by tag and digest, with and without credentials, and what breaks on
//! the way.

use std::net::TcpListener;

use aegis_wire::images::{Progress, Task};
use serde_json::json;

use crate::server::{Front, PASSWORD, Registry, Trick, USER, pull, source};
use crate::support::{Home, Image, Layer, gzip};

/// Does not compress: what is cut is cut where it is said to be.
fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(bytes).collect()
}

fn image(layers: u64) -> Image {
    let layer = |n: u64| {
        Layer::new()
            .file(&format!("of/{n}"), &noise(200_000, n + 1))
            .file("newest", n.to_string().as_bytes())
            .done()
    };
    let layers: Vec<Vec<u8>> = (0..layers).map(layer).collect();
    Image::new(&layers, gzip, json!({ "Entrypoint": ["/run"], "Cmd": ["it"] }))
}

#[test]
fn an_image_comes_by_tag_and_by_digest() {
    let registry = Registry::start(false);
    let front = Front::start(registry.address, Trick::None);
    let image = image(30);
    registry.push("acme/bot:1", &image, false);
    let list = registry.push_index("acme/bot:all", &image);
    let home = Home::new();
    let (made, said) = home.run(Task::Registry(pull(front.address, "acme/bot:1", None)), &[]);
    let made = made.unwrap();
    assert_eq!(made.digest, image.digest().to_string());
    assert_eq!(made.config.command(), ["/run", "it"]);
    assert_eq!(front.asked("/blobs/").len(), 31, "each layer once, and the configuration");
    let Some(Progress::Layers { layers }) = said.first() else { panic!("{said:?}") };
    assert_eq!(layers.len(), 30);
    for layer in layers {
        let done = Progress::Layer { digest: layer.digest.clone(), bytes: layer.bytes };
        assert!(said.contains(&done), "{layer:?}");
    }
    let tree = home.look();
    assert_eq!(tree.read("newest"), b"29");
    assert_eq!(tree.read("of/17"), noise(200_000, 18));
    for name in
        ["acme/bot:all", &format!("acme/bot@{list}"), &format!("acme/bot@{}", image.digest())]
    {
        let again = home.pull(pull(front.address, name, None)).unwrap();
        assert_eq!(again.digest, made.digest, "{name}");
        assert_eq!(front.asked("/blobs/").len(), 0, "nothing is fetched twice");
    }
}

#[test]
fn what_a_registry_lacks_is_said() {
    let registry = Registry::start(false);
    registry.push("acme/bot:1", &image(1), false);
    let home = Home::new();
    let nowhere = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let absent = format!("acme/bot@sha256:{}", "0".repeat(64));
    for (address, name, code) in [
        (registry.address, "acme/bot:2", "image_not_found"),
        (registry.address, "acme/none:1", "image_not_found"),
        (registry.address, &absent, "image_not_found"),
        (nowhere, "acme/bot:1", "image_unreachable"),
    ] {
        let (said, message) = home.pull(pull(address, name, None)).unwrap_err();
        assert_eq!(said, code, "{message}");
        assert!(message.contains(&address.to_string()), "{message}");
    }
    assert_eq!(home.parts(), ["work"]);
}

#[test]
fn credentials_are_used_and_needed() {
    let registry = Registry::start(true);
    registry.push("acme/bot:1", &image(2), true);
    let home = Home::new();
    for bad in [None, Some((USER, "wrong"))] {
        let (code, message) = home.pull(pull(registry.address, "acme/bot:1", bad)).unwrap_err();
        assert_eq!(code, "image_denied", "{message}");
        assert!(!message.contains("wrong"), "{message}");
    }
    home.pull(pull(registry.address, "acme/bot:1", Some((USER, PASSWORD)))).unwrap();
}

#[test]
fn tokens_are_fetched_where_a_registry_wants_them() {
    let registry = Registry::start(false);
    registry.push("acme/bot:1", &image(2), false);
    let front = Front::start(registry.address, Trick::Tokens);
    let home = Home::new();
    for bad in [None, Some((USER, "wrong"))] {
        let (code, message) = home.pull(pull(front.address, "acme/bot:1", bad)).unwrap_err();
        assert_eq!(code, "image_denied", "{message}");
    }
    home.pull(pull(front.address, "acme/bot:1", Some((USER, PASSWORD)))).unwrap();
    assert!(!front.asked("scope=repository%3Aacme%2Fbot%3Apull").is_empty());
}

#[test]
fn what_breaks_off_is_continued() {
    let registry = Registry::start(false);
    let image = image(3);
    registry.push("acme/bot:1", &image, false);
    let front = Front::start(registry.address, Trick::Cut(70_000));
    let home = Home::new();
    home.pull(pull(front.address, "acme/bot:1", None)).unwrap();
    let ranges = front.asked("range: bytes=");
    assert!(ranges.iter().any(|head| head.contains("bytes=70000-")), "{ranges:?}");
    assert!(ranges.iter().any(|head| head.contains("bytes=140000-")), "{ranges:?}");
    assert_eq!(home.look().read("of/1"), noise(200_000, 2));
}

#[test]
fn what_came_stays_for_the_next_pull() {
    let registry = Registry::start(false);
    registry.push("acme/bot:1", &image(1), false);
    let front = Front::start(registry.address, Trick::Cut(70_000));
    let home = Home::new();
    let layer = &image(1).layers[0];
    let part = home.blobs().join(format!("{}.part", layer.file_name()));
    std::fs::create_dir(home.blobs()).unwrap();
    std::fs::write(&part, &image(1).blobs[layer][..50_000]).unwrap();
    let whole = std::fs::metadata(home.blobs()).unwrap();
    use std::os::unix::fs::MetadataExt as _;
    if whole.uid() == 0 {
        // As a job before has left it.
        std::os::unix::fs::chown(&part, Some(1_899_999_999), Some(1_899_999_999)).unwrap();
    }
    home.pull(pull(front.address, "acme/bot:1", None)).unwrap();
    assert!(!front.asked("range: bytes=50000-").is_empty());
    assert_eq!(home.parts(), ["work"]);
    // One that holds something else is found out, and fetched anew.
    let home = Home::new();
    std::fs::create_dir(home.blobs()).unwrap();
    let part = home.blobs().join(format!("{}.part", layer.file_name()));
    std::fs::write(&part, [0; 50_000]).unwrap();
    if whole.uid() == 0 {
        std::os::unix::fs::chown(&part, Some(1_899_999_999), Some(1_899_999_999)).unwrap();
    }
    front.now(Trick::None);
    home.pull(pull(front.address, "acme/bot:1", None)).unwrap();
    assert_eq!(home.look().read("of/0"), noise(200_000, 1));
}

#[test]
fn what_is_not_what_its_digest_says_is_refused() {
    let registry = Registry::start(false);
    let image = image(2);
    registry.push("acme/bot:1", &image, false);
    let by_digest = format!("acme/bot@{}", image.digest());
    for (trick, name) in
        [(Trick::Bend, "acme/bot:1"), (Trick::Reword, &by_digest), (Trick::Cut(0), "acme/bot:1")]
    {
        let front = Front::start(registry.address, trick);
        let home = Home::new();
        let (code, message) = home.pull(pull(front.address, name, None)).unwrap_err();
        assert_eq!(code, "image_broken", "{trick:?}: {message}");
        assert!(!home.image().exists());
        let layers = image.layers.iter().filter(|l| home.blobs().join(l.file_name()).exists());
        assert_eq!(layers.count(), 0, "{trick:?}");
    }
}

#[test]
fn a_mirror_is_asked_first_and_the_registry_after_it() {
    let (empty, full) = (Registry::start(false), Registry::start(false));
    let image = image(1);
    full.push("library/python:3.12-alpine", &image, false);
    let mut wanted = pull(full.address, "library/python:3.12-alpine", None);
    wanted.registry = "docker.io".to_owned();
    wanted.sources = vec![source(empty.address, None), source(full.address, None)];
    let home = Home::new();
    let made = home.pull(wanted).unwrap();
    assert_eq!(made.digest, image.digest().to_string());
}
