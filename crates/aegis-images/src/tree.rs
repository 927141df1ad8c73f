//! The tree that an image's layers make together, in memory: no name out of a layer ever reaches this
//! host's file system. Links are followed inside of the tree, `..` ends at its root.

use std::collections::{BTreeMap, HashSet};

use crate::erofs::Content;

/// Number of a node.
pub type Id = usize;
/// The root directory.
pub const ROOT: Id = 0;

/// Files, directories and links of all layers together.
const NODES_MAX: usize = 1_000_000;
/// Bytes of all names and link targets together.
const NAMES_MAX: usize = 256 << 20;
/// Bytes of a name.
const NAME_MAX: usize = 255;
/// Bytes of a path.
const PATH_MAX: usize = 4095;
/// Links that lead to one name.
const HOPS_MAX: usize = 40;

/// A name, a link or a number of them that no image needs.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Bad {
    /// The name is none, or would lead out.
    #[error("the name {0:?} is not allowed in a layer")]
    Name(String),
    /// A hard link to what is not there, or to a directory.
    #[error("the hard link {0:?} leads to {1:?}, which is no file of the image")]
    Link(String, String),
    /// Links that lead to each other.
    #[error("the name {0:?} leads through too many links")]
    Hops(String),
    /// More than any image needs.
    #[error("the image has more than {NODES_MAX} files, or its names are too long together")]
    Many,
}

/// Rights, owner, time.
#[derive(Clone, Debug, Default)]
pub struct Meta {
    /// Permission bits, set-id bits with them: they count inside of machines only.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last change, seconds since 1970.
    pub mtime: i64,
    /// Extended attributes.
    pub xattrs: Vec<Attribute>,
}

/// An extended attribute.
#[derive(Clone, Debug)]
pub struct Attribute {
    /// Its name space.
    pub space: Space,
    /// Its name in there.
    pub name: Vec<u8>,
    /// What it says.
    pub value: Vec<u8>,
}

/// Name spaces of attributes that an image may have, numbered as erofs does.
#[derive(Clone, Copy, Debug)]
pub enum Space {
    /// `user.`
    User = 1,
    /// `security.`
    Security = 6,
}

/// What a node is.
#[derive(Debug)]
pub enum Kind {
    /// Names and what they stand for.
    Directory(BTreeMap<Vec<u8>, Entry>),
    /// Contents and their bytes.
    File {
        /// Where they are.
        content: Content,
        /// How many.
        size: u64,
    },
    /// A symbolic link.
    Link(Vec<u8>),
    /// A named pipe.
    Fifo,
}

/// What a name stands for.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The node.
    pub id: Id,
    /// The last layer that spoke of it: a whiteout hides only what came before its own.
    layer: u32,
}

/// A file, directory or link.
#[derive(Debug)]
pub struct Node {
    /// Rights, owner, time.
    pub meta: Meta,
    /// What it is.
    pub kind: Kind,
}

/// The tree.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    names: usize,
    layer: u32,
}

/// Whether a path is to be made.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Make,
    Leave,
}

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).chars().take(200).collect()
}

/// The parts of a path, seen from the image's root.
fn parts(path: &[u8]) -> Result<Vec<&[u8]>, Bad> {
    let bad = || Bad::Name(shown(path));
    if path.len() > PATH_MAX || path.contains(&0) {
        return Err(bad());
    }
    let parts = path.split(|b| *b == b'/').filter(|part| !part.is_empty() && *part != b".");
    let parts: Vec<&[u8]> = parts.collect();
    if parts.iter().any(|part| *part == b".." || part.len() > NAME_MAX) {
        return Err(bad());
    }
    Ok(parts)
}

impl Default for Tree {
    fn default() -> Tree {
        let root = Node {
            meta: Meta { mode: 0o755, ..Meta::default() },
            kind: Kind::Directory(BTreeMap::new()),
        };
        Tree { nodes: vec![root], names: 0, layer: 0 }
    }
}

impl Tree {
    /// What comes now lies over all that came before.
    pub fn begin_layer(&mut self) {
        self.layer += 1;
    }

    /// A node.
    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[id]
    }

    /// What later layers replaced or hid.
    pub fn dead(&self) -> impl Iterator<Item = &Node> {
        let (mut live, mut open) = (HashSet::from([ROOT]), vec![ROOT]);
        while let Some(id) = open.pop() {
            if let Kind::Directory(entries) = &self.nodes[id].kind {
                open.extend(entries.values().map(|e| e.id).filter(|id| live.insert(*id)));
            }
        }
        self.nodes.iter().enumerate().filter(move |(id, _)| !live.contains(id)).map(|(_, n)| n)
    }

    /// Puts something at a path, in the place of what is there; a directory over a directory keeps
    /// what is in it.
    pub fn put(&mut self, path: &[u8], meta: Meta, kind: Kind) -> Result<(), Bad> {
        let parts = parts(path)?;
        let Some((name, above)) = parts.split_last() else {
            return match kind {
                Kind::Directory(_) => {
                    self.nodes[ROOT].meta = meta;
                    Ok(())
                }
                _ => Err(Bad::Name(shown(path))),
            };
        };
        let Some(parent) = self.enter(above, path, Missing::Make)? else { return Ok(()) };
        let layer = self.layer;
        if let (Kind::Directory(_), Some(entry)) = (&kind, self.entries(parent).get_mut(*name)) {
            let id = entry.id;
            entry.layer = layer;
            if matches!(self.nodes[id].kind, Kind::Directory(_)) {
                self.nodes[id].meta = meta;
                return Ok(());
            }
        }
        let id = self.add(Node { meta, kind })?;
        self.name(parent, name, id)
    }

    /// A directory that every machine needs, where the image has nothing of that name.
    pub fn ensure_directory(&mut self, name: &[u8], mode: u16) -> Result<(), Bad> {
        if self.entries(ROOT).contains_key(name) {
            return Ok(());
        }
        let meta = Meta { mode, ..Meta::default() };
        self.put(name, meta, Kind::Directory(BTreeMap::new()))
    }

    /// Another name for a file that is there.
    pub fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), Bad> {
        let bad = || Bad::Link(shown(path), shown(target));
        let to = parts(target)?;
        let (name, above) = to.split_last().ok_or_else(bad)?;
        let there = self.enter(above, target, Missing::Leave)?.ok_or_else(bad)?;
        let id = self.entries(there).get(*name).ok_or_else(bad)?.id;
        if matches!(self.nodes[id].kind, Kind::Directory(_)) {
            return Err(bad());
        }
        let parts = parts(path)?;
        let (name, above) = parts.split_last().ok_or_else(|| Bad::Name(shown(path)))?;
        match self.enter(above, path, Missing::Make)? {
            Some(parent) => self.name(parent, name, id),
            None => Ok(()),
        }
    }

    /// Hides what earlier layers have at a path.
    pub fn whiteout(&mut self, path: &[u8]) -> Result<(), Bad> {
        let parts = parts(path)?;
        let (name, above) = parts.split_last().ok_or_else(|| Bad::Name(shown(path)))?;
        let Some(parent) = self.enter(above, path, Missing::Leave)? else { return Ok(()) };
        let layer = self.layer;
        let Some(entry) = self.entries(parent).get(*name).copied() else { return Ok(()) };
        if entry.layer < layer {
            self.entries(parent).remove(*name);
        } else if matches!(self.nodes[entry.id].kind, Kind::Directory(_)) {
            self.clear(entry.id);
        }
        Ok(())
    }

    /// Hides all that earlier layers have in a directory.
    pub fn opaque(&mut self, path: &[u8]) -> Result<(), Bad> {
        let parts = parts(path)?;
        if let Some(id) = self.enter(&parts, path, Missing::Leave)? {
            self.clear(id);
        }
        Ok(())
    }

    /// Takes what is of earlier layers out of a directory, and of those of this layer in it.
    fn clear(&mut self, id: Id) {
        let layer = self.layer;
        let mut open = vec![id];
        while let Some(id) = open.pop() {
            let entries = self.entries(id);
            entries.retain(|_, entry| entry.layer >= layer);
            let kept: Vec<Id> = entries.values().map(|e| e.id).collect();
            let is_directory = |id: &Id| matches!(self.nodes[*id].kind, Kind::Directory(_));
            open.extend(kept.into_iter().filter(is_directory));
        }
    }

    fn entries(&mut self, id: Id) -> &mut BTreeMap<Vec<u8>, Entry> {
        match &mut self.nodes[id].kind {
            Kind::Directory(entries) => entries,
            _ => unreachable!("only directories are entered"),
        }
    }

    fn add(&mut self, node: Node) -> Result<Id, Bad> {
        if let Kind::Link(target) = &node.kind {
            self.names += target.len();
        }
        self.names += node.meta.xattrs.iter().map(|a| a.name.len() + a.value.len()).sum::<usize>();
        if self.nodes.len() >= NODES_MAX || self.names > NAMES_MAX {
            return Err(Bad::Many);
        }
        self.nodes.push(node);
        Ok(self.nodes.len() - 1)
    }

    fn name(&mut self, parent: Id, name: &[u8], id: Id) -> Result<(), Bad> {
        self.names += name.len();
        if self.names > NAMES_MAX {
            return Err(Bad::Many);
        }
        let layer = self.layer;
        self.entries(parent).insert(name.to_owned(), Entry { id, layer });
        Ok(())
    }

    /// The directory at a path, through links; what is missing is made, or there is none.
    fn enter(&mut self, path: &[&[u8]], whole: &[u8], missing: Missing) -> Result<Option<Id>, Bad> {
        let mut todo: Vec<Vec<u8>> = path.iter().rev().map(|part| part.to_vec()).collect();
        let (mut stack, mut hops, layer) = (vec![ROOT], 0, self.layer);
        while let Some(name) = todo.pop() {
            let here = *stack.last().unwrap_or(&ROOT);
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    if stack.len() > 1 {
                        stack.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let found = self.entries(here).get(&name).map(|entry| entry.id);
            let next = match found.map(|id| (id, &self.nodes[id].kind)) {
                Some((id, Kind::Directory(_))) => id,
                Some((_, Kind::Link(target))) => {
                    hops += 1;
                    if hops > HOPS_MAX {
                        return Err(Bad::Hops(shown(whole)));
                    }
                    if target.first() == Some(&b'/') {
                        stack.truncate(1);
                    }
                    todo.extend(target.rsplit(|b| *b == b'/').map(<[u8]>::to_vec));
                    continue;
                }
                // Nothing there, or a file in the way.
                _ if missing == Missing::Leave => return Ok(None),
                _ => {
                    let kind = Kind::Directory(BTreeMap::new());
                    let id =
                        self.add(Node { meta: Meta { mode: 0o755, ..Meta::default() }, kind })?;
                    self.name(here, &name, id)?;
                    id
                }
            };
            if missing == Missing::Make
                && let Some(entry) = self.entries(here).get_mut(&name)
            {
                entry.layer = layer;
            }
            stack.push(next);
        }
        Ok(stack.last().copied())
    }
}

#[cfg(test)]
mod tests;
