//! Layers that turn against their host: each is refused or means nothing, and nothing is left.

use std::fs;

use serde_json::json;
use tar::EntryType;

use crate::support::{Home, Image, Layer, Outcome, gzip, zstd};

fn import(home: &Home, layers: &[Vec<u8>]) -> Outcome {
    home.import(&Image::new(layers, gzip, json!({})).layout())
}

#[test]
fn names_that_lead_out_are_refused() {
    for layer in [
        Layer::new().file("../../outside", b"x"),
        Layer::new().file("a/../../outside", b"x"),
        Layer::new().hard("passwd", "../../../etc/passwd"),
        Layer::new().hard("passwd", "/etc/passwd"),
        Layer::new().file("../.wh.etc", b""),
        Layer::new().link("loop", "loop").file("loop/x", b"x"),
        Layer::new().directory("..", 0o777),
    ] {
        let home = Home::new();
        let (code, message) = import(&home, &[layer.done()]).unwrap_err();
        assert_eq!(code, "image_refused", "{message}");
        assert!(!home.image().exists());
        let left: Vec<_> = fs::read_dir(home.blobs()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
        let outside = home.dir.path().join("outside");
        assert!(!outside.exists() && !home.dir.path().parent().unwrap().join("outside").exists());
    }
}

#[test]
fn links_lead_nowhere_but_inside() {
    let home = Home::new();
    let secret = home.dir.path().join("secret");
    fs::write(&secret, "of the host").unwrap();
    let out = home.dir.path().to_str().unwrap();
    let layer = Layer::new()
        .link("out", out)
        .file("out/secret", b"of the image")
        .link("up", "../../../../../../..")
        .file("up/etc/shadow", b"of the image")
        .file("/absolute", b"of the image");
    import(&home, &[layer.done()]).unwrap();
    assert_eq!(fs::read_to_string(&secret).unwrap(), "of the host");
    let tree = home.look();
    for path in ["etc/shadow", "absolute", &format!("{}/secret", &out[1..])] {
        assert_eq!(tree.read(path), b"of the image", "{path}");
    }
}

#[test]
fn devices_stay_outside() {
    let home = Home::new();
    let layer = Layer::new()
        .raw(EntryType::Block, "dev/sda", "", 0o666, b"")
        .raw(EntryType::Char, "mem", "", 0o666, b"")
        .raw(EntryType::Fifo, "pipe", "", 0o600, b"")
        .file("plain", b"x");
    // Extracted by another program, a pipe would need nothing more than a device does.
    import(&home, &[layer.done()]).unwrap();
    let tree = home.look();
    assert!(!tree.has("dev/sda") && !tree.has("mem"));
    assert!(tree.has("plain"));
}

#[test]
fn bombs_do_not_go_off() {
    let zeros = vec![0u8; 64 << 20];
    let bomb = Layer::new().file("zeros", &zeros).done();
    for pack in [gzip, zstd] {
        let mut home = Home::new();
        home.bytes_max = 32 << 20;
        let image = Image::new(std::slice::from_ref(&bomb), pack, json!({}));
        let (code, message) = home.import(&image.layout()).unwrap_err();
        assert_eq!(code, "image_refused", "{message}");
    }
    // One that is allowed takes no room on the disk.
    use std::os::unix::fs::MetadataExt as _;
    let home = Home::new();
    import(&home, &[bomb]).unwrap();
    let meta = fs::metadata(home.image()).unwrap();
    assert!(meta.len() > 64 << 20 && meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
}

#[test]
fn a_layer_must_be_the_one_that_the_configuration_names() {
    let home = Home::new();
    let mut image = Image::new(&[Layer::new().file("a", b"x").done()], gzip, json!({}));
    let other = Image::new(&[Layer::new().file("a", b"y").done()], gzip, json!({}));
    // The manifest names another layer than the configuration: each is what its digest says.
    let text = String::from_utf8(image.manifest.clone()).unwrap();
    let (ours, theirs) = (&image.layers[0], &other.layers[0]);
    let size = |bytes: &[u8]| format!("\"size\":{}", bytes.len());
    let text = text
        .replace(ours.as_str(), theirs.as_str())
        .replace(&size(&image.blobs[ours]), &size(&other.blobs[theirs]));
    image.manifest = text.into_bytes();
    image.blobs.extend(other.blobs);
    let (code, message) = home.import(&image.layout()).unwrap_err();
    assert_eq!(code, "image_broken", "{message}");
    assert!(message.contains("configuration says"), "{message}");
}

#[test]
fn broken_and_cut_layers_are_refused() {
    let whole = Layer::new().file("a", &vec![7; 100_000]).done();
    let cut = |b: &[u8]| gzip(b)[..200].to_vec();
    let bent = |b: &[u8]| {
        let mut bytes = gzip(b);
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x55;
        bytes
    };
    let noise = |_: &[u8]| b"\x1f\x8bthis is no gzip".to_vec();
    for pack in [cut as fn(&[u8]) -> Vec<u8>, bent, noise] {
        let home = Home::new();
        let image = Image::new(std::slice::from_ref(&whole), pack, json!({}));
        assert_eq!(home.import(&image.layout()).unwrap_err().0, "image_broken");
    }
}

#[test]
fn no_strangers_word_reaches_the_terminal_raw() {
    let home = Home::new();
    let layer = Layer::new().file("../\x1b[2J", b"x").done();
    let (_, message) = import(&home, &[layer]).unwrap_err();
    assert!(!message.contains('\x1b'), "{message:?}");
}
