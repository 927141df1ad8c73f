//! Folders of this host that machines get as their workspaces.
//!
//! ```text
//! HOME/workspaces/NAME    made on first use, for whoever names it
//! any other directory     that the host names, or lets a machine give to its children
//! ```
//! A path is judged after all links, and kept so; whatever it leads to at a machine's start over a
//! link made since then is refused there. The home itself is nobody's workspace.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use aegis_rules::given::Folder;
use aegis_rules::refusal::Refusal;
use aegis_wire::words::Handle;

/// Directory of the named ones.
const DIRECTORY: &str = "workspaces";
/// Files that are counted in one of them.
const FILES_MAX: u64 = 100_000;
/// Blocks are counted in these.
const BLOCK: u64 = 512;

/// The workspaces of a home.
pub struct Workspaces {
    home: PathBuf,
}

/// What lies in a workspace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Bytes of its files' blocks.
    pub bytes: u64,
    /// Files and directories.
    pub files: u64,
    /// There are more than were counted.
    pub more: bool,
}

impl Workspaces {
    /// Of this home.
    pub fn of(home: &Path) -> Workspaces {
        // A home that is not there any more has none.
        Workspaces { home: fs::canonicalize(home).unwrap_or_else(|_| home.to_owned()) }
    }

    /// Where a name or a path of the host leads.
    ///
    /// # Errors
    /// A refusal of the field `workspace`.
    pub fn find(&self, place: &str) -> Result<String, Refusal> {
        if !place.contains('/') {
            return self.named(place);
        }
        if !Path::new(place).is_absolute() {
            let allowed = "a name without a slash, or an absolute path";
            return Err(asked(Refusal::field("workspace", allowed), place));
        }
        let real = fs::canonicalize(place).ok().filter(|real| real.is_dir());
        let missing = || asked(Refusal::field("workspace", "an existing directory"), place);
        let real = real.and_then(|real| real.into_os_string().into_string().ok());
        self.check(real.ok_or_else(missing)?)
    }

    fn named(&self, name: &str) -> Result<String, Refusal> {
        let bad = |e: aegis_wire::words::BadWord| {
            let allowed = format!("an absolute path, or a name: {}", e.expected);
            asked(Refusal::field("workspace", allowed), name)
        };
        let name: Handle = name.to_owned().try_into().map_err(bad)?;
        let path = self.directory().join(name.as_str());
        path.into_os_string().into_string().map_err(|_| {
            Refusal::field("workspace", "an absolute path: this home's own is no text")
        })
    }

    /// Passes a directory, after all links, that may be lent: it neither holds the home nor lies in
    /// what the home has besides workspaces.
    ///
    /// # Errors
    /// A refusal of the field `workspace`.
    pub fn check(&self, path: String) -> Result<String, Refusal> {
        let at = Path::new(&path);
        let named = at.strip_prefix(self.directory()).is_ok_and(|rest| rest.iter().count() > 0);
        let holds_home = self.home.starts_with(at);
        if at == Path::new("/") || holds_home || (at.starts_with(&self.home) && !named) {
            let allowed = "a directory that neither is, holds, nor lies in the home of Aegis";
            return Err(asked(Refusal::field("workspace", allowed), &path));
        }
        Ok(path)
    }

    /// A part of another workspace, for a child: a directory that lies in it after all links.
    ///
    /// # Errors
    /// A refusal of the field `workspace`.
    pub fn part(&self, whole: &Folder, below: &str) -> Result<String, Refusal> {
        let real = fs::canonicalize(Path::new(&whole.path).join(below)).ok();
        let real = real.filter(|real| real.starts_with(&whole.path) && real.is_dir());
        let missing = || {
            let given = format!("/workspace/{below}");
            asked(
                Refusal::field("workspace", "an existing directory of your own /workspace"),
                &given,
            )
        };
        let real = real.and_then(|real| real.into_os_string().into_string().ok());
        self.check(real.ok_or_else(missing)?)
    }

    /// Makes a named one that is not there yet.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn provide(&self, path: &Path) -> io::Result<()> {
        let directory = self.directory();
        if path.parent() != Some(&directory) {
            return Ok(());
        }
        let make = |at: &Path| match fs::DirBuilder::new().mode(0o700).create(at) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            done => done,
        };
        make(&directory)?;
        make(path)
    }

    /// The named ones that are there, by name.
    ///
    /// # Errors
    /// When their directory can't be read.
    pub fn names(&self) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(self.directory()) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let name = |entry: fs::DirEntry| {
            let there = entry.file_type().ok()?.is_dir();
            let name = entry.file_name().into_string().ok()?;
            (there && Handle::try_from(name.clone()).is_ok()).then_some(name)
        };
        let mut names: Vec<String> = entries.flatten().filter_map(name).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Where a named one is.
    pub fn path(&self, name: &Handle) -> PathBuf {
        self.directory().join(name.as_str())
    }

    /// Removes a named one; false when there was none.
    ///
    /// # Errors
    /// When something of it can't be removed.
    pub fn remove(&self, name: &Handle) -> io::Result<bool> {
        match fs::remove_dir_all(self.path(name)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            done => done.map(|()| true),
        }
    }

    fn directory(&self) -> PathBuf {
        self.home.join(DIRECTORY)
    }
}

/// Counts what lies in a directory, without following a link.
pub fn size(directory: &Path) -> Size {
    let mut size = Size::default();
    let mut todo = vec![directory.to_owned()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if size.files == FILES_MAX {
                return Size { more: true, ..size };
            }
            let Ok(meta) = entry.metadata() else { continue };
            size.files += 1;
            size.bytes += meta.blocks() * BLOCK;
            if meta.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    size
}

fn asked(mut refusal: Refusal, place: &str) -> Refusal {
    refusal.requested = Some(place.to_owned());
    refusal
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    struct Scene {
        dir: tempfile::TempDir,
        all: Workspaces,
    }

    fn scene() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        for name in ["home/data", "home/workspaces", "project/sub", "outside"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        let all = Workspaces::of(&dir.path().join("home"));
        Scene { dir, all }
    }

    impl Scene {
        fn path(&self, name: &str) -> String {
            fs::canonicalize(self.dir.path()).unwrap().join(name).to_str().unwrap().to_owned()
        }
    }

    #[test]
    fn names_lie_in_the_home_and_are_made_when_they_are_needed() {
        let scene = scene();
        let path = scene.all.find("notes").unwrap();
        assert_eq!(path, scene.path("home/workspaces/notes"));
        assert!(scene.all.names().unwrap().is_empty());
        scene.all.provide(Path::new(&path)).unwrap();
        scene.all.provide(Path::new(&path)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(scene.all.names().unwrap(), ["notes"]);
        fs::write(Path::new(&path).join("a"), [1; 5000]).unwrap();
        symlink("/", Path::new(&path).join("b")).unwrap();
        let size = size(Path::new(&path));
        assert_eq!((size.files, size.more, size.bytes >= 5000), (2, false, true));
        assert!(scene.all.remove(&"notes".to_owned().try_into().unwrap()).unwrap());
        assert!(!scene.all.remove(&"notes".to_owned().try_into().unwrap()).unwrap());
        for bad in ["..", ".", "-x", "a b"] {
            assert!(scene.all.find(bad).is_err(), "{bad}");
        }
        // Others' directories are nobody's to make.
        scene.all.provide(Path::new(&scene.path("new"))).unwrap();
        assert!(!Path::new(&scene.path("new")).exists());
    }

    #[test]
    fn the_home_is_nobodys() {
        let scene = scene();
        symlink(scene.path("home"), scene.path("project/link")).unwrap();
        for path in ["home", "home/data", "home/workspaces", "", "project/link", "project/../home"]
        {
            let refusal = scene.all.find(&scene.path(path)).unwrap_err();
            assert_eq!(refusal.field.as_deref(), Some("workspace"), "{path}");
        }
        for path in ["/", "project", "/nowhere/at/all", "./project"] {
            assert!(scene.all.find(path).is_err() || path == "project", "{path}");
        }
        assert_eq!(scene.all.find(&scene.path("project")), Ok(scene.path("project")));
        fs::write(scene.path("file"), "x").unwrap();
        assert!(scene.all.find(&scene.path("file")).is_err());
    }

    #[test]
    fn parts_lie_in_the_whole() {
        let scene = scene();
        let whole = Folder { path: scene.path("project"), read_only: false };
        symlink(scene.path("outside"), scene.path("project/out")).unwrap();
        symlink("sub", scene.path("project/in")).unwrap();
        assert_eq!(scene.all.part(&whole, ""), Ok(scene.path("project")));
        assert_eq!(scene.all.part(&whole, "sub"), Ok(scene.path("project/sub")));
        assert_eq!(scene.all.part(&whole, "in"), Ok(scene.path("project/sub")));
        for below in ["out", "no", "../outside"] {
            assert!(scene.all.part(&whole, below).is_err(), "{below}");
        }
    }
}
