//! The machine's only link: `eth0` towards the gateway of its worker (contracts/aegis.md 9).
//!
//! Every machine is alone on its link, so that all have the same addresses; one that is a copy of another
//! changes only that of its card. What it may reach is decided behind the gateway, never here.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;

use aegis_wire::link::{GATEWAY, GUEST, PREFIX};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::sys;

/// The card's name: the kernel's own, there is nobody inside who gives others.
const NAME: &str = "eth0";

/// From linux/rtnetlink.h, linux/if_addr.h and linux/netlink.h.
mod kernel {
    pub const NEW_LINK: u16 = 16;
    pub const NEW_ADDRESS: u16 = 20;
    pub const NEW_ROUTE: u16 = 24;
    pub const ERROR: u16 = 2;
    pub const REQUEST_AND_ACK: u16 = 0x1 | 0x4;
    pub const CREATE_OR_REPLACE: u16 = 0x400 | 0x100;
    pub const UP: u32 = 1;
    pub const ADDRESS: u16 = 1;
    pub const LOCAL: u16 = 2;
    pub const DESTINATION_LINK: u16 = 4;
    pub const GATEWAY: u16 = 5;
    pub const INET: u8 = 2;
    pub const INET6: u8 = 10;
    /// Nobody else is there whose address it could be.
    pub const NO_DUPLICATES: u8 = 0x02;
    pub const TABLE_MAIN: u8 = 254;
    pub const PROTOCOL_BOOT: u8 = 3;
    pub const UNICAST: u8 = 1;
}

/// The machine's card.
pub struct Card {
    // To the kernel.
    socket: OwnedFd,
}

impl Card {
    /// Gives the card its addresses and the way to the gateway.
    pub fn up() -> io::Result<Card> {
        let index = index()?;
        // What the gateway would have to say about addresses is known, and nobody else has them.
        for (name, value) in [("accept_ra", "0"), ("accept_dad", "0")] {
            let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{NAME}/{name}"), value);
        }
        let socket = socket()?;
        ask(&socket, kernel::NEW_LINK, 0, &link(index, kernel::UP))?;
        let (guest4, guest6) = GUEST;
        let (gateway4, gateway6) = GATEWAY;
        for (own, gateway) in
            [(IpAddr::V4(guest4), IpAddr::V4(gateway4)), (IpAddr::V6(guest6), IpAddr::V6(gateway6))]
        {
            ask(&socket, kernel::NEW_ADDRESS, kernel::CREATE_OR_REPLACE, &address(index, own))?;
            ask(&socket, kernel::NEW_ROUTE, kernel::CREATE_OR_REPLACE, &route(index, gateway))?;
        }
        Ok(Card { socket })
    }

    /// Gives it an address of its own.
    pub fn set_address(&self, mac: [u8; 6]) -> io::Result<()> {
        sys::set_hardware_address(&self.socket, NAME, mac)
    }
}

fn index() -> io::Result<u32> {
    let text = std::fs::read_to_string(format!("/sys/class/net/{NAME}/ifindex"))?;
    text.trim().parse().map_err(io::Error::other)
}

fn socket() -> io::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
    Ok(rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None)?)
}

/// What `/etc/resolv.conf` says.
pub fn resolv_conf() -> String {
    format!("nameserver {}\n", GATEWAY.0)
}

/// `struct ifinfomsg`: the flags that are to be set.
fn link(index: u32, flags: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    body.extend(index.to_ne_bytes());
    body.extend(flags.to_ne_bytes());
    body.extend(flags.to_ne_bytes());
    body
}

/// `struct ifaddrmsg`, and the address.
fn address(index: u32, own: IpAddr) -> Vec<u8> {
    let (family, prefix, flags) = match own {
        IpAddr::V4(_) => (kernel::INET, PREFIX.0, 0),
        IpAddr::V6(_) => (kernel::INET6, PREFIX.1, kernel::NO_DUPLICATES),
    };
    let mut body = vec![family, prefix, flags, 0];
    body.extend(index.to_ne_bytes());
    attribute(&mut body, kernel::LOCAL, &octets(own));
    attribute(&mut body, kernel::ADDRESS, &octets(own));
    body
}

/// `struct rtmsg` of the default route.
fn route(index: u32, gateway: IpAddr) -> Vec<u8> {
    let family = if gateway.is_ipv4() { kernel::INET } else { kernel::INET6 };
    let mut body = vec![family, 0, 0, 0, kernel::TABLE_MAIN, kernel::PROTOCOL_BOOT, 0];
    body.push(kernel::UNICAST);
    body.extend(0_u32.to_ne_bytes());
    attribute(&mut body, kernel::GATEWAY, &octets(gateway));
    attribute(&mut body, kernel::DESTINATION_LINK, &index.to_ne_bytes());
    body
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => Ipv4Addr::octets(&a).to_vec(),
        IpAddr::V6(a) => Ipv6Addr::octets(&a).to_vec(),
    }
}

/// Appends one, padded to four bytes.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend((value.len() as u16 + 4).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// Asks the kernel for one thing, and waits for its answer.
fn ask(socket: &OwnedFd, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
    let mut message = Vec::with_capacity(16 + body.len());
    message.extend((16 + body.len() as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((kernel::REQUEST_AND_ACK | flags).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    let to = SocketAddrNetlink::new(0, 0);
    rustix::net::sendto(socket, &message, SendFlags::empty(), &to)?;
    let mut answer = [0; 1024];
    let (bytes, _) = rustix::net::recv(socket, &mut answer[..], RecvFlags::empty())?;
    parse_answer(&answer[..bytes])
}

/// An error message with number 0 is an acknowledgement.
fn parse_answer(answer: &[u8]) -> io::Result<()> {
    let number = |at: usize| answer.get(at..at + 4).and_then(|b| b.try_into().ok());
    let kind = answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes);
    match (kind, number(16).map(i32::from_ne_bytes)) {
        (Some(kernel::ERROR), Some(0)) => Ok(()),
        (Some(kernel::ERROR), Some(errno)) => Err(io::Error::from_raw_os_error(-errno)),
        _ => Err(io::Error::other("the kernel gave no answer")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_kernels_shape() {
        let v4 = address(2, "172.16.0.2".parse().unwrap());
        assert_eq!(v4.len(), 8 + 8 + 8);
        assert_eq!(&v4[..4], [2, 24, 0, 0]);
        assert_eq!(&v4[12..16], [172, 16, 0, 2]);
        let v6 = route(2, "fd61::1".parse().unwrap());
        assert_eq!(v6.len(), 12 + 20 + 8);
        assert!(v6.len().is_multiple_of(4));
    }

    #[test]
    fn refusals_are_heard() {
        let answer = |errno: i32| {
            let mut bytes = vec![0; 20];
            bytes[4] = 2;
            bytes[16..].copy_from_slice(&errno.to_ne_bytes());
            bytes
        };
        assert!(parse_answer(&answer(0)).is_ok());
        assert_eq!(parse_answer(&answer(-17)).unwrap_err().raw_os_error(), Some(17));
        assert!(parse_answer(&[]).is_err());
    }
}
