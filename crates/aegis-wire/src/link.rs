//! Addresses on the link between a machine and its gateway (contracts/aegis.md 9): the same in every
//! machine, as each is alone there.

use std::net::{Ipv4Addr, Ipv6Addr};

/// The machine's addresses.
pub const GUEST: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(172, 16, 0, 2), Ipv6Addr::new(0xfd61, 0x6567, 0x6973, 0, 0, 0, 0, 2));
/// The gateway's, which also answers DNS.
pub const GATEWAY: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(172, 16, 0, 1), Ipv6Addr::new(0xfd61, 0x6567, 0x6973, 0, 0, 0, 0, 1));
/// Length of the prefixes that both are in.
pub const PREFIX: (u8, u8) = (24, 64);
/// Largest packet, bytes.
pub const MTU: u32 = 65_520;
