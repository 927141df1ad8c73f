use super::*;

fn digest(letter: char) -> String {
    format!("sha256:{}", letter.to_string().repeat(64))
}

/// Images whose fetcher has just made one.
fn made(images: &Images, letter: char) -> Made {
    let work = images.dir.join(BLOBS).join(blob_dir::WORK);
    fs::create_dir_all(&work).unwrap();
    let mut bytes = vec![0; 8192];
    bytes[1024..1028].copy_from_slice(&EROFS_MAGIC);
    fs::write(work.join(blob_dir::IMAGE), &bytes).unwrap();
    let (blobs, config) = (vec![digest(letter)], RunConfig::default());
    Made { digest: digest(letter), bytes: 8192, names: Vec::new(), blobs, config }
}

fn name(text: &str) -> ImageRef {
    text.parse().unwrap()
}

#[test]
fn names_lead_to_images_until_the_last_is_forgotten() {
    let home = tempfile::tempdir().unwrap();
    let images = Images::of(home.path());
    let names = ["docker.io/library/a:1", "docker.io/library/a:latest"].map(str::to_owned);
    let a = made(&images, 'a');
    images.keep(a, &names, Time(1)).unwrap();
    for known in ["a", "a:1", "docker.io/a:latest", &digest('a'), &format!("x/y@{}", digest('a'))] {
        assert_eq!(images.find(&name(known)).unwrap().digest, Some(digest('a')), "{known}");
    }
    assert!(images.find(&name("a:2")).is_none() && images.find(&name("b/a")).is_none());
    // A name moves on, and what it left has none.
    let b = made(&images, 'b');
    images.keep(b, &names[1..], Time(2)).unwrap();
    assert_eq!(images.find(&name("a")).unwrap().digest, Some(digest('b')));
    assert!(!images.forget(&names[0], &digest('b')).unwrap(), "another name holds it");
    assert_eq!(images.names()[0], (None, digest('a')));
    assert!(images.forget(&digest('a'), &digest('a')).unwrap());
    assert!(images.digest_of(&name(&digest('a'))).is_none());
    assert_eq!(images.names(), [(Some(names[1].clone()), digest('b'))]);
}

#[test]
fn what_is_made_here_goes_first() {
    let home = tempfile::tempdir().unwrap();
    let images = Images::of(home.path());
    let a = made(&images, 'a');
    let names = ["made", "base"].map(|name| format!("docker.io/library/{name}:latest"));
    images.keep(a, &names, Time(1)).unwrap();
    assert!(images.find(&name("made")).unwrap().digest.is_some());
    fs::create_dir(images.dir.join("made")).unwrap();
    fs::write(images.dir.join("made").join(BASE), b"x").unwrap();
    assert!(images.find(&name("made")).unwrap().digest.is_none());
    fs::write(images.dir.join(BLOBS).join(BASE), b"x").unwrap();
    assert!(images.local(BLOBS).is_none());
    assert_eq!(images.local_names(), ["made"]);
    images.forget_local("made").unwrap();
    assert!(images.find(&name("made")).unwrap().digest.is_some());
    // Where setup was not run, a stranger's image is none of ours.
    assert!(images.find(&name("base")).is_none());
    assert!(images.find(&name("docker.io/library/base")).is_some());
}

#[test]
fn only_the_file_that_was_looked_at_is_taken_over() {
    let home = tempfile::tempdir().unwrap();
    let images = Images::of(home.path());
    let secret = home.path().join("secret");
    fs::write(&secret, vec![0; 8192]).unwrap();
    let image = images.dir.join(BLOBS).join(blob_dir::WORK).join(blob_dir::IMAGE);
    let tricks: [fn(&Path, &Path); 4] = [
        |image, secret| std::os::unix::fs::symlink(secret, image).unwrap(),
        |image, secret| fs::hard_link(secret, image).unwrap(),
        |image, _| fs::create_dir(image).unwrap(),
        |image, _| fs::write(image, vec![0; 8192]).unwrap(),
    ];
    for trick in tricks {
        let a = made(&images, 'a');
        fs::remove_file(&image).unwrap();
        trick(&image, &secret);
        assert!(images.keep(a, &[], Time(1)).is_err());
        assert!(images.fetched(&digest('a')).is_none());
        assert_eq!(fs::read(&secret).unwrap(), vec![0; 8192]);
        remove(&image).unwrap();
    }
    let mut a = made(&images, 'a');
    a.digest = "sha256:../../x".to_owned();
    assert!(images.keep(a, &[], Time(1)).is_err());
    let mut a = made(&images, 'a');
    a.config.cwd = Some("relative".to_owned());
    assert!(images.keep(a, &[], Time(1)).is_err());
}

#[test]
fn blobs_that_no_image_needs_are_pruned() {
    let home = tempfile::tempdir().unwrap();
    let images = Images::of(home.path());
    let a = made(&images, 'a');
    images.keep(a, &[], Time(1)).unwrap();
    let blob = |letter: char| images.dir.join(BLOBS).join(digest(letter).replace(':', "-"));
    for letter in ['a', 'b'] {
        fs::write(blob(letter), b"four").unwrap();
    }
    fs::write(blob('c').with_extension("part"), b"part").unwrap();
    assert_eq!(images.prune_blobs().unwrap(), 8);
    assert!(blob('a').exists() && !blob('b').exists());
}
