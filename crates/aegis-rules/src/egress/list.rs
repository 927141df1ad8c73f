//! Allow-lists: the entries of `egressAllow`.

use core::net::{IpAddr, SocketAddr};
use std::fmt;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::address::plain;
use super::name::HostName;
use crate::refusal::Refusal;

/// Entries that one list may have.
pub const ENTRIES_MAX: usize = 256;
/// What an entry can be, for people.
const EXPECTED: &str = "example.com, *.example.com, 203.0.113.0/24, 2001:db8::/32 or *, each with \
                        an optional :port ([2001:db8::/32]:443 for IPv6)";

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Target {
    /// Everything public.
    Any,
    /// This name.
    Name(HostName),
    /// Every name below this one, at any depth.
    Below(HostName),
    /// These addresses.
    Net(IpNet),
}

/// One entry: what, and at which port; no port is every port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Entry {
    target: Target,
    port: Option<u16>,
}

/// Names with globs, CIDRs, ports: what an allow-list admits. Parsed from the texts of
/// `egressAllow`. An empty one admits nothing; networks alone admit no names, as a question for a
/// name carries data to whoever answers for it.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct AllowList(Vec<Entry>);

impl AllowList {
    /// Parses the texts of `field`.
    ///
    /// # Errors
    /// A refusal that names `field` and the first entry that is none, or says that there are more
    /// than [`ENTRIES_MAX`].
    pub fn parse(texts: &[String], field: &str) -> Result<AllowList, Refusal> {
        if texts.len() > ENTRIES_MAX {
            return Err(too_many(field, texts.len()));
        }
        let mut entries = Vec::with_capacity(texts.len());
        for text in texts {
            let entry = Entry::parse(text).ok_or_else(|| {
                let brief = text.chars().take(80).collect();
                Refusal::out_of_range(field.to_owned(), brief, format!("a list of {EXPECTED}"))
            })?;
            if !entries.contains(&entry) {
                entries.push(entry);
            }
        }
        Ok(AllowList(entries))
    }

    /// The entries as texts, in their one spelling.
    pub fn texts(&self) -> Vec<String> {
        self.0.iter().map(Entry::to_string).collect()
    }

    /// The list that admits what either does.
    ///
    /// # Errors
    /// A refusal if that is more than [`ENTRIES_MAX`] entries.
    pub fn with(&self, more: &AllowList) -> Result<AllowList, Refusal> {
        let mut entries = self.0.clone();
        entries.extend(more.0.iter().filter(|entry| !self.0.contains(entry)).cloned());
        if entries.len() > ENTRIES_MAX {
            return Err(too_many("egressAllow", entries.len()));
        }
        Ok(AllowList(entries))
    }

    /// Whether some port of this name is admitted.
    pub fn admits_name(&self, name: &HostName) -> bool {
        self.0.iter().any(|entry| entry.is_name(name))
    }

    /// Whether this name at this port is admitted.
    pub fn admits_name_at(&self, name: &HostName, port: u16) -> bool {
        self.0.iter().any(|entry| entry.is_port(port) && entry.is_name(name))
    }

    /// Whether this address is admitted by itself, whatever its name.
    pub fn admits_address(&self, to: SocketAddr) -> bool {
        let address = plain(to.ip());
        self.0.iter().any(|entry| {
            entry.is_port(to.port())
                && match &entry.target {
                    Target::Any => true,
                    Target::Net(net) => net.contains(&address),
                    Target::Name(_) | Target::Below(_) => false,
                }
        })
    }
}

impl TryFrom<Vec<String>> for AllowList {
    type Error = Refusal;

    fn try_from(texts: Vec<String>) -> Result<AllowList, Refusal> {
        AllowList::parse(&texts, "egressAllow")
    }
}

impl From<AllowList> for Vec<String> {
    fn from(list: AllowList) -> Vec<String> {
        list.texts()
    }
}

impl fmt::Display for AllowList {
    /// A line for people, of bounded length.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        if self.0.is_empty() {
            return f.write_str("nothing");
        }
        for (at, entry) in self.0.iter().take(SHOWN).enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            write!(f, "{comma}{entry}")?;
        }
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

fn too_many(field: &str, entries: usize) -> Refusal {
    let allowed = format!("a list of at most {ENTRIES_MAX} entries");
    Refusal::out_of_range(field.to_owned(), format!("{entries} entries"), allowed)
}

impl Entry {
    fn parse(text: &str) -> Option<Entry> {
        let text = text.trim();
        if let Some(rest) = text.strip_prefix('[') {
            let (inside, after) = rest.split_once(']')?;
            let port = match after {
                "" => None,
                after => Some(parse_port(after.strip_prefix(':')?)?),
            };
            let net @ IpNet::V6(_) = parse_net(inside)? else { return None };
            return Some(Entry { target: Target::Net(net), port });
        }
        if let Some(net) = parse_net(text) {
            return Some(Entry { target: Target::Net(net), port: None });
        }
        // Two colons are IPv6, which takes its port behind brackets only.
        let (text, port) = match text.split_once(':') {
            Some((text, port)) => (text, Some(parse_port(port)?)),
            None => (text, None),
        };
        let target = match (text, text.strip_prefix("*.")) {
            ("*", _) => Target::Any,
            (_, Some(apex)) => Target::Below(parse_name(apex)?),
            _ => match parse_net(text) {
                Some(net) => Target::Net(net),
                None => Target::Name(parse_name(text)?),
            },
        };
        Some(Entry { target, port })
    }

    fn is_port(&self, port: u16) -> bool {
        self.port.is_none_or(|mine| mine == port)
    }

    fn is_name(&self, name: &HostName) -> bool {
        match &self.target {
            Target::Any => true,
            Target::Name(mine) => mine == name,
            Target::Below(apex) => name.is_below(apex.as_str()),
            Target::Net(_) => false,
        }
    }
}

/// A name as people write it in a list: the trailing dot is for resolvers.
fn parse_name(text: &str) -> Option<HostName> {
    if text.ends_with('.') { None } else { text.parse().ok() }
}

fn parse_port(text: &str) -> Option<u16> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    if plain { text.parse().ok() } else { None }
}

/// An address or a network. Refused are bits behind the prefix, which are a slip of somebody, and
/// IPv4 in the clothes of IPv6, which would never match as such.
fn parse_net(text: &str) -> Option<IpNet> {
    let net = match text.split_once('/') {
        Some((address, prefix)) => {
            let prefix = if prefix == "0" { 0 } else { parse_port(prefix)?.try_into().ok()? };
            IpNet::new(address.parse().ok()?, prefix).ok()?
        }
        None => IpNet::from(text.parse::<IpAddr>().ok()?),
    };
    let hidden = net.addr() != plain(net.addr());
    (net == net.trunc() && !hidden).then_some(net)
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bracketed = self.port.is_some() && matches!(self.target, Target::Net(IpNet::V6(_)));
        let (open, close) = if bracketed { ("[", "]") } else { ("", "") };
        f.write_str(open)?;
        match &self.target {
            Target::Any => f.write_str("*")?,
            Target::Name(name) => write!(f, "{name}")?,
            Target::Below(apex) => write!(f, "*.{apex}")?,
            Target::Net(net) if net.prefix_len() == net.max_prefix_len() => {
                write!(f, "{}", net.addr())?;
            }
            Target::Net(net) => write!(f, "{net}")?,
        }
        f.write_str(close)?;
        match self.port {
            Some(port) => write!(f, ":{port}"),
            None => Ok(()),
        }
    }
}
