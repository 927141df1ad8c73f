//! What is done at once, on a real file system.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use aegis_wire::channel::files::{FileKind, Make, Mode};

use super::*;

fn path(directory: &Path, rest: &str) -> FilePath {
    let path = directory.join(rest).into_os_string();
    path.as_encoded_bytes().to_vec().try_into().unwrap()
}

fn make(mode: &str, create_dirs: bool) -> Make {
    Make { mode: Some(Mode::parse(mode).unwrap()), create_dirs, ..Make::default() }
}

#[test]
fn directories_and_links_are_made_and_taken_away() {
    let home = tempfile::tempdir().unwrap();
    let at = |rest: &str| path(home.path(), rest);
    let mkdir = |rest: &str, make| place::change(&FileAsk::Mkdir { path: at(rest), make });
    assert_eq!(mkdir("a/b", make("700", false)), Err(Fault::NotFound));
    let made = mkdir("a/b", make("1750", true)).unwrap().unwrap();
    assert_eq!((made.kind, made.mode.to_string()), (FileKind::Dir, "1750".to_owned()));
    assert_eq!(mkdir("a/b", make("700", false)), Err(Fault::Exists));
    mkdir("a/b", make("700", true)).unwrap();
    let link = |rest: &str, to: &str| {
        let target = to.as_bytes().to_vec().try_into().unwrap();
        place::change(&FileAsk::Symlink { path: at(rest), target, make: Make::default() })
    };
    link("l", "nowhere").unwrap();
    let again = link("l", "../else").unwrap().unwrap();
    assert_eq!(again.target.unwrap().lossy(), "../else");
    assert!(matches!(link("a", "x"), Err(Fault::IsADirectory | Fault::Exists)));
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 2, "no draft stays");
    let remove = |rest: &str, recursive| {
        place::change(&FileAsk::Remove { path: at(rest), recursive }).map(drop)
    };
    assert_eq!(remove("a", false), Err(Fault::NotEmpty));
    assert_eq!(remove("a/..", true), Err(Fault::Denied));
    remove("a", true).unwrap();
    remove("l", true).unwrap();
    assert_eq!(remove("l", false), Err(Fault::NotFound));
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    let root: FilePath = b"/".to_vec().try_into().unwrap();
    let all = FileAsk::Remove { path: root, recursive: true };
    assert_eq!(place::change(&all), Err(Fault::Denied));
}

#[test]
fn what_is_replaced_keeps_its_owner_and_mode() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("run.sh");
    fs::write(&file, "old").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o750)).unwrap();
    let before = fs::metadata(&file).unwrap();
    let to = path(home.path(), "run.sh");
    let renamed = path(home.path(), "other.sh");
    let moved = FileAsk::Rename { path: to.clone(), to: renamed };
    assert_eq!(place::change(&moved).unwrap().unwrap().mode.bits(), 0o750);
    assert_eq!(place::change(&moved), Err(Fault::NotFound));
    assert_eq!(fs::metadata(home.path().join("other.sh")).unwrap().ino(), before.ino());
    assert_eq!(as_entry(&to).unwrap().1, file);
}
