//! Where everything of one Aegis lies: `AEGIS_HOME`, and the programs beside this one.

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use crate::failure::{Failure, Result};

/// Longest path of a unix socket, bytes (`sun_path` holds 108 with its closing zero).
pub const SOCKET_PATH_MAX: usize = 107;
/// Bytes of the longest socket path below a home: `/run/inst-<ULID>/worker.sock`.
const LONGEST_SOCKET_BELOW: usize = "/run/inst-01ARZ3NDEKTSV4RRFFQ69G5FAV/worker.sock".len();
/// Longest home whose sockets have paths that the system takes, bytes.
pub const HOME_PATH_MAX: usize = SOCKET_PATH_MAX - LONGEST_SOCKET_BELOW;

/// A home directory of Aegis; it need not exist yet.
#[derive(Clone, Debug)]
pub struct Home(PathBuf);

impl Home {
    /// From `--home` or `AEGIS_HOME`, else `~/.aegis`; made absolute, so that children agree on it.
    pub fn resolve(asked: Option<&Path>) -> Result<Home> {
        let path = match asked {
            Some(path) => path.to_owned(),
            None => std::env::home_dir()
                .filter(|home| !home.as_os_str().is_empty())
                .ok_or_else(|| {
                    Failure::here("there is no home directory to put .aegis into")
                        .fix("pass --home DIR or set AEGIS_HOME")
                })?
                .join(".aegis"),
        };
        let path = std::path::absolute(&path).map_err(|e| Failure::file("find", &path, e))?;
        Ok(Home(path))
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.0
    }

    /// The daemon's unix socket.
    pub fn socket(&self) -> PathBuf {
        self.0.join("aegisd.sock")
    }

    /// Holds the daemon's process id once its API answers.
    pub fn pid_file(&self) -> PathBuf {
        self.0.join("data/aegisd.pid")
    }

    /// What a daemon in the background says.
    pub fn daemon_log(&self) -> PathBuf {
        self.0.join("data/aegisd.log")
    }

    /// The host token, made by the daemon at its first start.
    pub fn host_token(&self) -> PathBuf {
        self.0.join("host-token")
    }

    /// The guest kernel and its modules.
    pub fn kernel(&self) -> PathBuf {
        self.0.join("kernel")
    }

    /// An image.
    pub fn image(&self, name: &str) -> PathBuf {
        self.0.join("images").join(name)
    }

    /// Says so when the home lies too deep for unix sockets.
    pub fn check_length(&self) -> Result<()> {
        let length = self.0.as_os_str().as_bytes().len();
        if length <= HOME_PATH_MAX {
            return Ok(());
        }
        Err(Failure::here(format!(
            "the home {} is {length} bytes long; sockets in it need a home of at most {HOME_PATH_MAX} \
             (the system takes socket paths of at most {SOCKET_PATH_MAX} bytes)",
            self.0.display()
        ))
        .fix("choose a shorter one with --home DIR or AEGIS_HOME"))
    }
}

/// A program of Aegis, which all lie in one directory.
pub fn sibling(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe()
        .map_err(|e| Failure::because("cannot find out where this program lies", e))?;
    let path = me.with_file_name(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(Failure::here(format!("{name} is not beside this program ({})", path.display()))
        .fix("run `make build` and use dist/bin/aegis, or put all programs into one directory"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deep_home_is_refused_with_the_numbers() {
        let deep = Home(PathBuf::from(format!("/{}", "d".repeat(HOME_PATH_MAX))));
        let failure = deep.check_length().unwrap_err();
        assert!(failure.words().contains("at most 59"), "{}", failure.words());
        assert!(Home(PathBuf::from("/home/me/.aegis")).check_length().is_ok());
    }
}
