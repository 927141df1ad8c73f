//! `[egress]`: what all machines' gateways have in common.

use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;

use super::{BadConfig, bad};

/// Most resolvers that are asked.
const RESOLVERS_MAX: usize = 8;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Section {
    resolvers: Option<Vec<String>>,
}

/// `203.0.113.53`, or with a port.
fn resolver(text: &str) -> Option<SocketAddr> {
    let port_53 = |ip: IpAddr| SocketAddr::new(ip, 53);
    text.parse().ok().or_else(|| text.parse().ok().map(port_53))
}

/// The name servers of a `resolv.conf`.
pub fn name_servers(resolv_conf: &str) -> Vec<SocketAddr> {
    let words = |line: &'_ str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next().and_then(resolver)).flatten()
    };
    resolv_conf.lines().filter_map(words).take(RESOLVERS_MAX).collect()
}

/// Those that are named, else the host's own.
pub(super) fn resolvers(
    section: Section,
    of_host: Vec<SocketAddr>,
) -> Result<Vec<SocketAddr>, BadConfig> {
    let Some(texts) = section.resolvers else { return Ok(of_host) };
    let all: Option<Vec<SocketAddr>> = texts.iter().map(|text| resolver(text)).collect();
    all.filter(|all| (1..=RESOLVERS_MAX).contains(&all.len())).ok_or_else(|| {
        let allowed = format!("must be 1 to {RESOLVERS_MAX} addresses, as in [\"203.0.113.53\"]");
        bad("egress.resolvers", allowed)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_are_the_hosts_own_or_those_that_are_named() {
        let own = vec!["192.0.2.53:53".parse().unwrap()];
        let of = |texts: Option<&[&str]>| {
            let named = texts.map(|t| t.iter().map(ToString::to_string).collect());
            resolvers(Section { resolvers: named }, own.clone())
        };
        assert_eq!(of(None).unwrap(), own);
        let named = of(Some(&["203.0.113.53", "[2001:db8::1]:5353"])).unwrap();
        assert_eq!((named[0].to_string().as_str(), named[1].port()), ("203.0.113.53:53", 5353));
        for bad in [&[][..], &["dns.test"], &["203.0.113.1"; 9]] {
            assert_eq!(of(Some(bad)).unwrap_err().setting, "egress.resolvers");
        }
        let file = "# x\nnameserver 192.0.2.1\nsearch a\nnameserver 2001:db8::2\nnameserver x\n";
        assert_eq!(name_servers(file).len(), 2);
    }
}
