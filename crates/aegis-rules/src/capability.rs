//! What an instance may do besides computing (contracts/aegis.md 3): what is *permitted*. What is
//! *left* is said by [`crate::envelope`].
//!
//! Every value fails closed: what is not given is nothing, an empty list allows nothing, 0 is none.

pub(crate) mod glob;
mod image;
mod workspace;

pub use workspace::{Workspace, WorkspaceAsk};

use crate::refusal::Refusal;
use crate::words::{CpuMillis, ImageRef, MemoryMb};

/// Patterns or names in one list.
pub const LIST_MAX: usize = 32;
/// Bytes of one pattern or name.
pub const PATTERN_MAX: usize = 255;
/// Bytes of one list together: comparing two lists takes the product of their lengths.
pub const LIST_BYTES_MAX: usize = 2048;

/// What an instance may do. The default is nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Whether it may have children.
    pub spawn: bool,
    /// Levels below it: 1 means children without children of their own.
    pub spawn_depth: u32,
    /// Live children at a time.
    pub max_children: u32,
    /// Images of its children, as patterns; `*` is any.
    pub allowed_images: Vec<String>,
    /// Memory of each child.
    pub max_memory: MemoryMb,
    /// Virtual CPUs of each child.
    pub max_vcpus: u32,
    /// Names of secrets that it may give to children; `*` is any.
    pub allowed_secrets: Vec<String>,
    /// Directories of the host that it may give to children, as patterns.
    pub allowed_workspaces: Vec<String>,
    /// Exposed ports of each child, and of itself.
    pub max_expose_ports: u32,
}

/// Capabilities as they are asked for, by a host or for a child.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "as in Capabilities")]
pub struct CapabilityAsk {
    pub spawn: Option<bool>,
    pub spawn_depth: Option<u32>,
    pub max_children: Option<u32>,
    pub allowed_images: Option<Vec<String>>,
    pub max_memory: Option<MemoryMb>,
    pub max_vcpus: Option<u32>,
    pub allowed_secrets: Option<Vec<String>>,
    pub allowed_workspaces: Option<Vec<String>>,
    pub max_expose_ports: Option<u32>,
}

impl CapabilityAsk {
    /// What a host gives with this: exactly what it named, and nothing else.
    pub fn granted(&self) -> Result<Capabilities, Refusal> {
        self.check()?;
        let ask = self.clone();
        Ok(Capabilities {
            spawn: ask.spawn.unwrap_or_default(),
            spawn_depth: ask.spawn_depth.unwrap_or_default(),
            max_children: ask.max_children.unwrap_or_default(),
            allowed_images: ask.allowed_images.unwrap_or_default(),
            max_memory: ask.max_memory.unwrap_or_default(),
            max_vcpus: ask.max_vcpus.unwrap_or_default(),
            allowed_secrets: ask.allowed_secrets.unwrap_or_default(),
            allowed_workspaces: ask.allowed_workspaces.unwrap_or_default(),
            max_expose_ports: ask.max_expose_ports.unwrap_or_default(),
        })
    }

    fn check(&self) -> Result<(), Refusal> {
        type Valid = fn(&str) -> bool;
        let lists: [(&str, &Option<Vec<String>>, &str, Valid); 3] = [
            (
                "allowed_images",
                &self.allowed_images,
                "image references, in which * stands for any text without / and ** for any text",
                |s| {
                    s.trim_matches('*').is_empty()
                        || s.replace('*', "x").parse::<ImageRef>().is_ok()
                },
            ),
            ("allowed_secrets", &self.allowed_secrets, "names of secrets, or \"*\"", |s| {
                s == "*" || s.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
            }),
            (
                "allowed_workspaces",
                &self.allowed_workspaces,
                "absolute paths of the host without .., in which * stands for any text without / \
                 and ** for any text",
                |s| workspace::clean(s).is_some(),
            ),
        ];
        for (name, list, expected, valid) in lists {
            let fine = |s: &String| !s.is_empty() && s.len() <= PATTERN_MAX && valid(s);
            let bad = |l: &Vec<String>| {
                l.len() > LIST_MAX || bytes(l) > LIST_BYTES_MAX || !l.iter().all(fine)
            };
            if list.as_ref().is_some_and(bad) {
                return Err(Refusal::field(
                    format!("capabilities.{name}"),
                    format!(
                        "a list of at most {LIST_MAX} {expected}; each of at most {PATTERN_MAX} \
                         bytes, all of at most {LIST_BYTES_MAX}"
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// A child's capabilities: those of its parent, one level less, cut down to what was asked for.
/// Whatever is asked, no field gets wider; only what is malformed is refused.
pub fn narrow(parent: &Capabilities, ask: &CapabilityAsk) -> Result<Capabilities, Refusal> {
    ask.check()?;
    let below =
        Capabilities { spawn_depth: parent.spawn_depth.saturating_sub(1), ..parent.clone() };
    let or = |asked: &Option<Vec<String>>, own: &Vec<String>| asked.as_ref().unwrap_or(own).clone();
    let asked = Capabilities {
        spawn: ask.spawn.unwrap_or(below.spawn),
        spawn_depth: ask.spawn_depth.unwrap_or(below.spawn_depth),
        max_children: ask.max_children.unwrap_or(below.max_children),
        allowed_images: or(&ask.allowed_images, &below.allowed_images),
        max_memory: ask.max_memory.unwrap_or(below.max_memory),
        max_vcpus: ask.max_vcpus.unwrap_or(below.max_vcpus),
        allowed_secrets: or(&ask.allowed_secrets, &below.allowed_secrets),
        allowed_workspaces: or(&ask.allowed_workspaces, &below.allowed_workspaces),
        max_expose_ports: ask.max_expose_ports.unwrap_or(below.max_expose_ports),
    };
    let mut child = below.meet(&asked);
    child.spawn = child.spawn && child.spawn_depth > 0;
    Ok(child)
}

impl Capabilities {
    /// What both allow, field by field.
    pub fn meet(&self, other: &Capabilities) -> Capabilities {
        Capabilities {
            spawn: self.spawn && other.spawn,
            spawn_depth: self.spawn_depth.min(other.spawn_depth),
            max_children: self.max_children.min(other.max_children),
            allowed_images: both(&self.allowed_images, &other.allowed_images, image::covers),
            max_memory: self.max_memory.min(other.max_memory),
            max_vcpus: self.max_vcpus.min(other.max_vcpus),
            allowed_secrets: both(&self.allowed_secrets, &other.allowed_secrets, |wide, narrow| {
                wide == "*" || wide == narrow
            }),
            allowed_workspaces: both(
                &self.allowed_workspaces,
                &other.allowed_workspaces,
                workspace::covers,
            ),
            max_expose_ports: self.max_expose_ports.min(other.max_expose_ports),
        }
    }

    /// Refuses what goes beyond a ceiling: the first field that does is named.
    pub fn within(&self, ceiling: &Capabilities) -> Result<(), Refusal> {
        let both = self.meet(ceiling);
        let number = |rule, asked: u32, most: u32| {
            (rule, asked <= most, asked.to_string(), most.to_string())
        };
        let list = |rule, asked: &[String], both: &[String], most: &[String]| {
            let fits = asked.iter().all(|pattern| both.contains(pattern));
            (rule, fits, format!("[{}]", asked.join(", ")), format!("[{}]", most.join(", ")))
        };
        let fields = [
            (
                "spawn",
                self.spawn <= ceiling.spawn,
                self.spawn.to_string(),
                ceiling.spawn.to_string(),
            ),
            number("spawn_depth", self.spawn_depth, ceiling.spawn_depth),
            number("max_children", self.max_children, ceiling.max_children),
            number("max_memory_mb", self.max_memory.0, ceiling.max_memory.0),
            number("max_vcpus", self.max_vcpus, ceiling.max_vcpus),
            number("max_expose_ports", self.max_expose_ports, ceiling.max_expose_ports),
            list(
                "allowed_images",
                &self.allowed_images,
                &both.allowed_images,
                &ceiling.allowed_images,
            ),
            list(
                "allowed_secrets",
                &self.allowed_secrets,
                &both.allowed_secrets,
                &ceiling.allowed_secrets,
            ),
            list(
                "allowed_workspaces",
                &self.allowed_workspaces,
                &both.allowed_workspaces,
                &ceiling.allowed_workspaces,
            ),
        ];
        let Some((rule, _, asked, most)) = fields.into_iter().find(|(_, fits, ..)| !fits) else {
            return Ok(());
        };
        let mut refusal = Refusal::denied(rule, format!("{rule} of {asked} is beyond {most}"));
        (refusal.requested, refusal.allowed) = (Some(asked), Some(most));
        Err(refusal)
    }

    /// Whether children may have this image.
    pub fn allows_image(&self, image: &ImageRef) -> bool {
        self.allowed_images.iter().any(|pattern| image::allows(pattern, image.as_str()))
    }

    /// Whether children may have a machine with this CPU quota.
    pub fn allows_cpu(&self, cpu: CpuMillis) -> bool {
        u64::from(cpu.0) <= u64::from(self.max_vcpus) * 1000
    }

    /// The first of these secrets that may not be given to children.
    pub fn forbidden_secret<'a>(&self, secrets: &'a [String]) -> Option<&'a str> {
        let allowed = |name: &String| self.allowed_secrets.iter().any(|a| a == "*" || a == name);
        secrets.iter().find(|name| !allowed(name)).map(String::as_str)
    }

    /// The workspace that may be given to a child, if that is allowed.
    pub fn workspace(&self, ask: &WorkspaceAsk) -> Option<Workspace> {
        workspace::judge(&self.allowed_workspaces, ask)
    }
}

fn bytes(list: &[String]) -> usize {
    list.iter().map(String::len).sum()
}

/// Patterns of either list that lie within one of the other: never more than both allow.
fn both(a: &[String], b: &[String], covers: fn(&str, &str) -> bool) -> Vec<String> {
    if a == b {
        return a.to_vec();
    }
    let within = |list: &[String], what: &str| list.iter().any(|wide| covers(wide, what));
    let of_a = a.iter().filter(|pattern| within(b, pattern));
    let of_b = b.iter().filter(|pattern| within(a, pattern));
    let mut out: Vec<String> = Vec::new();
    for pattern in of_b.chain(of_a) {
        let room = out.len() < LIST_MAX && bytes(&out) + pattern.len() <= LIST_BYTES_MAX;
        if room && !out.contains(pattern) {
            out.push(pattern.clone());
        }
    }
    out
}

#[cfg(test)]
mod tests;
