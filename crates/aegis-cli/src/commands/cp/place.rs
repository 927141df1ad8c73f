//! Where something is copied from and to: `NAME:/PATH`, a path here, or a pipe.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use aegis_wire::channel::files::{FileName, FilePath};
use aegis_wire::path::escape;

/// A place in a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InMachine {
    /// Id or handle.
    pub name: String,
    /// Where in it.
    pub path: FilePath,
}

impl InMachine {
    /// The request for it.
    pub fn asked(&self, more: &str) -> String {
        let path = escape(self.path.as_bytes());
        format!("/v1/instances/{}/files?path={path}{more}", escape(&self.name))
    }

    /// The request for its news.
    pub fn watched(&self, recursive: bool) -> String {
        let path = escape(self.path.as_bytes());
        format!(
            "/v1/instances/{}/files/watch?path={path}&recursive={recursive}",
            escape(&self.name)
        )
    }

    /// The place of an entry; `None` where its path is too long.
    pub fn join(&self, name: &FileName) -> Option<InMachine> {
        Some(InMachine { name: self.name.clone(), path: self.path.join(name)? })
    }
}

impl fmt::Display for InMachine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, self.path.lossy())
    }
}

impl FromStr for InMachine {
    type Err = String;

    fn from_str(text: &str) -> Result<InMachine, String> {
        match text.parse()? {
            End::Machine(place) => Ok(place),
            _ => Err("must be NAME:/PATH, an absolute path in a machine".to_owned()),
        }
    }
}

/// One end of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// In a machine.
    Machine(InMachine),
    /// Here.
    Here(PathBuf),
    /// Standard input or output.
    Pipe,
}

impl FromStr for End {
    type Err = String;

    fn from_str(text: &str) -> Result<End, String> {
        if text == "-" {
            return Ok(End::Pipe);
        }
        match text.split_once(':') {
            // A path here with a colon in it is written with a slash before that: ./a:b
            Some((name, path)) if !name.is_empty() && !name.contains('/') => {
                let path = FilePath::try_from(path.as_bytes().to_vec()).map_err(|_| {
                    format!("the path in {name} must be absolute, as in {name}:/root/file")
                })?;
                Ok(End::Machine(InMachine { name: name.to_owned(), path }))
            }
            _ if text.is_empty() => Err("must be NAME:/PATH, a path here, or -".to_owned()),
            _ => Ok(End::Here(text.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_apart() {
        let machine = "web:/a b".parse().unwrap();
        let End::Machine(place) = machine else { panic!() };
        assert_eq!(place.asked("&stat=true"), "/v1/instances/web/files?path=%2Fa%20b&stat=true");
        assert_eq!("-".parse(), Ok(End::Pipe));
        for here in ["a", "./web:/a", "/tmp/x:y", ":x", "../-"] {
            assert_eq!(here.parse(), Ok(End::Here(here.into())), "{here}");
        }
        for bad in ["", "web:a", "web:"] {
            assert!(bad.parse::<End>().is_err(), "{bad}");
        }
        assert!("/tmp/x".parse::<InMachine>().is_err());
    }
}
