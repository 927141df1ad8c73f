//! Frames taken apart as far as needed to know whose they are.

use std::net::{IpAddr, SocketAddr};

use aegis_wire::link::GUEST;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6Packet,
    TcpPacket, UdpPacket,
};

/// One frame from the guest.
#[derive(Debug)]
pub(crate) struct Frame<'a> {
    /// Whose card sent it.
    pub card: EthernetAddress,
    pub content: Content<'a>,
}

#[derive(Debug)]
pub(crate) enum Content<'a> {
    Arp(&'a [u8]),
    Ip(Ip<'a>),
}

/// An IP packet that is whole, and carries one of the three protocols that are spoken here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ip<'a> {
    /// From its first header on, without padding of the link.
    pub bytes: &'a [u8],
    pub from: IpAddr,
    pub to: IpAddr,
    pub payload: Payload<'a>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Payload<'a> {
    Tcp(Tcp),
    Udp(Udp<'a>),
    Icmp(&'a [u8]),
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Tcp {
    pub from_port: u16,
    pub to_port: u16,
    /// The first segment of a connection.
    pub opens: bool,
    pub resets: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Udp<'a> {
    pub from_port: u16,
    pub to_port: u16,
    pub data: &'a [u8],
}

/// Both ends of a flow as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Ends {
    pub guest: SocketAddr,
    pub to: SocketAddr,
}

impl Ip<'_> {
    pub fn ends(&self, from_port: u16, to_port: u16) -> Ends {
        Ends { guest: SocketAddr::new(self.from, from_port), to: SocketAddr::new(self.to, to_port) }
    }

    /// Whether the guest's own address stands in it as the sender.
    pub fn is_from_guest(&self) -> bool {
        self.from == IpAddr::V4(GUEST.0) || self.from == IpAddr::V6(GUEST.1)
    }
}

/// Takes a frame apart; `None` for what is not understood here: fragments, options of IPv6, other
/// protocols, garbage.
pub(crate) fn parse(frame: &[u8]) -> Option<Frame<'_>> {
    let ethernet = EthernetFrame::new_checked(frame).ok()?;
    let content = match ethernet.ethertype() {
        EthernetProtocol::Arp => Content::Arp(ethernet.payload()),
        EthernetProtocol::Ipv4 => Content::Ip(parse_v4(ethernet.payload())?),
        EthernetProtocol::Ipv6 => Content::Ip(parse_v6(ethernet.payload())?),
        EthernetProtocol::Unknown(_) => return None,
    };
    Some(Frame { card: ethernet.src_addr(), content })
}

fn parse_v4(bytes: &[u8]) -> Option<Ip<'_>> {
    let packet = Ipv4Packet::new_checked(bytes).ok()?;
    if packet.version() != 4 || packet.more_frags() || packet.frag_offset() != 0 {
        return None;
    }
    let bytes = bytes.get(..usize::from(packet.total_len()))?;
    let inside = bytes.get(usize::from(packet.header_len())..)?;
    Some(Ip {
        bytes,
        from: IpAddr::V4(packet.src_addr()),
        to: IpAddr::V4(packet.dst_addr()),
        payload: parse_payload(packet.next_header(), IpProtocol::Icmp, inside)?,
    })
}

fn parse_v6(bytes: &[u8]) -> Option<Ip<'_>> {
    const HEADER: usize = 40;
    let packet = Ipv6Packet::new_checked(bytes).ok()?;
    if packet.version() != 6 {
        return None;
    }
    let bytes = bytes.get(..HEADER + usize::from(packet.payload_len()))?;
    Some(Ip {
        bytes,
        from: IpAddr::V6(packet.src_addr()),
        to: IpAddr::V6(packet.dst_addr()),
        payload: parse_payload(packet.next_header(), IpProtocol::Icmpv6, &bytes[HEADER..])?,
    })
}

fn parse_payload(kind: IpProtocol, icmp: IpProtocol, inside: &[u8]) -> Option<Payload<'_>> {
    match kind {
        IpProtocol::Tcp => {
            let tcp = TcpPacket::new_checked(inside).ok()?;
            Some(Payload::Tcp(Tcp {
                from_port: tcp.src_port(),
                to_port: tcp.dst_port(),
                opens: tcp.syn() && !tcp.ack() && !tcp.rst() && !tcp.fin(),
                resets: tcp.rst(),
            }))
        }
        IpProtocol::Udp => {
            let udp = UdpPacket::new_checked(inside).ok()?;
            let data = inside.get(8..usize::from(udp.len()))?;
            Some(Payload::Udp(Udp { from_port: udp.src_port(), to_port: udp.dst_port(), data }))
        }
        _ if kind == icmp => Some(Payload::Icmp(inside)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v4(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([8, 0]);
        frame.extend([0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0, 172, 16, 0, 2, 1, 2, 3, 4]);
        frame.extend([0x10, 0, 0, 53, 0, 12, 0, 0, b'd', b'a', b't', b'a']);
        frame.extend([0; 6]);
        change(&mut frame);
        frame
    }

    #[test]
    fn padding_is_left_out() {
        let frame = v4(|_| ());
        let Some(Frame { content: Content::Ip(ip), .. }) = parse(&frame) else { panic!() };
        assert_eq!(ip.bytes.len(), 32);
        assert!(ip.is_from_guest());
        let Payload::Udp(udp) = ip.payload else { panic!() };
        assert_eq!((udp.from_port, udp.to_port, udp.data), (0x1000, 53, &b"data"[..]));
    }

    #[test]
    fn fragments_and_lies_are_dropped() {
        assert!(parse(&v4(|f| f[20] = 0x20)).is_none(), "more fragments");
        assert!(parse(&v4(|f| f[21] = 1)).is_none(), "offset");
        assert!(parse(&v4(|f| f[16] = 0xff)).is_none(), "longer than it is");
        assert!(parse(&v4(|f| f[14] = 0x65)).is_none(), "another version");
        assert!(parse(&v4(|f| f[39] = 200)).is_none(), "datagram longer than its packet");
        assert!(parse(&v4(|f| f[23] = 6)).is_none(), "no whole TCP header");
        assert!(parse(&v4(|f| f.truncate(13))).is_none());
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_dropped(mut bytes in prop::collection::vec(any::<u8>(), 0..200), kind in 0..4) {
            if bytes.len() > 14 {
                let ethertype: [u8; 2] = [[8, 0], [0x86, 0xdd], [8, 6], [0, 0]][kind as usize];
                bytes[12..14].copy_from_slice(&ethertype);
                bytes[14] = [0x45, 0x60, 0, 0x46][kind as usize];
            }
            if let Some(Frame { content: Content::Ip(ip), .. }) = parse(&bytes) {
                prop_assert!(ip.bytes.len() + 14 <= bytes.len());
            }
        }
    }
}
