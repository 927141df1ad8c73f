//! Addresses that are nobody's to give, and the addresses that hide in others.

// Addresses as values: `core::net` has nothing that could open a socket.
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

const fn v4(a: u8, b: u8, c: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, 0), prefix)
}

/// IPv4 that is never reachable, with the word for why.
const NEVER_V4: [(Ipv4Net, &str); 13] = [
    (v4(0, 0, 0, 8), "this network"),
    (v4(10, 0, 0, 8), "private"),
    (v4(100, 64, 0, 10), "carrier-grade NAT"),
    (v4(127, 0, 0, 8), "loopback"),
    (v4(169, 254, 0, 16), "link-local and metadata"),
    // Public by its looks, and the host's agent in one cloud.
    (Ipv4Net::new_assert(Ipv4Addr::new(168, 63, 129, 16), 32), "metadata"),
    (v4(172, 16, 0, 12), "private"),
    (v4(192, 0, 0, 24), "protocol assignments"),
    (v4(192, 88, 99, 24), "6to4 relays"),
    (v4(192, 168, 0, 16), "private"),
    (v4(198, 18, 0, 15), "benchmarking"),
    (v4(224, 0, 0, 4), "multicast"),
    // Broadcast is in it.
    (v4(240, 0, 0, 4), "reserved"),
];

/// All of IPv6 that is routed in public. The rest (loopback, link-local, site-local, unique local,
/// multicast, discard-only, local NAT64, …) is refused without being named.
const PUBLIC_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);
const NAT64: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96);
const SIX_TO_FOUR: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16);
const TEREDO: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 32);

/// The address that is really meant: IPv4 out of `::ffff:0:0/96` and `64:ff9b::/96`. Everything is
/// compared in this form.
pub fn plain(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(inner) => IpAddr::V4(inner),
            None if NAT64.contains(&v6) => IpAddr::V4(embedded(v6, 12)),
            None => address,
        },
    }
}

/// Why an address is never reachable, whatever a list says; `None` for a public one. `own` are the
/// addresses of the host itself.
pub fn never(address: IpAddr, own: &[IpAddr]) -> Option<&'static str> {
    let address = plain(address);
    if own.iter().any(|mine| plain(*mine) == address) {
        return Some("the host's own");
    }
    match address {
        IpAddr::V4(v4) => NEVER_V4.iter().find(|(net, _)| net.contains(&v4)).map(|(_, why)| *why),
        IpAddr::V6(v6) if !PUBLIC_V6.contains(&v6) => Some("not public"),
        IpAddr::V6(v6) => tunnelled(v6)
            .into_iter()
            .flatten()
            .any(|inner| never(IpAddr::V4(inner), own).is_some())
            .then_some("a tunnel to an address that is never reachable"),
    }
}

/// The IPv4 addresses where a tunnel to this address would end.
fn tunnelled(v6: Ipv6Addr) -> [Option<Ipv4Addr>; 2] {
    if SIX_TO_FOUR.contains(&v6) {
        [Some(embedded(v6, 2)), None]
    } else if TEREDO.contains(&v6) {
        // The server as it is, the client with its bits turned (RFC 4380, 4).
        let client = Ipv4Addr::from(!u32::from(embedded(v6, 12)));
        [Some(embedded(v6, 4)), Some(client)]
    } else {
        [None, None]
    }
}

fn embedded(v6: Ipv6Addr, at: usize) -> Ipv4Addr {
    let octets = v6.octets();
    Ipv4Addr::new(octets[at], octets[at + 1], octets[at + 2], octets[at + 3])
}
