//! Packets that the gateway makes itself: ARP, neighbours, echoes, what can't be reached, datagrams.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aegis_wire::link::{GATEWAY, GUEST};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetProtocol, Icmpv4DstUnreachable, Icmpv4Packet,
    Icmpv4Repr, Icmpv6DstUnreachable, Icmpv6Packet, Icmpv6Repr, IpProtocol, Ipv4Packet, Ipv4Repr,
    Ipv6Packet, Ipv6Repr, NdiscNeighborFlags, NdiscRepr, UdpPacket, UdpRepr,
};

use crate::link::{CARD, Outgoing};
use crate::packet::{Ends, Ip};

const HOPS: u8 = 64;
/// Neighbour advertisements that came over a router are not believed (RFC 4861, 7.1.2).
const HOPS_ON_LINK: u8 = 255;
/// Of a packet that can't be delivered, at most this much goes back, bytes.
const QUOTED_MAX: usize = 512;

/// What the answer to a packet that can't be delivered says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unreachable {
    /// Nobody is there, or it may not be reached.
    Port,
    /// It may not be reached at all, in any protocol.
    Prohibited,
}

/// Answers who has an address on the link: the gateway has all but the guest's.
pub(crate) fn arp(packet: &[u8], outgoing: &mut Outgoing) {
    let Ok(packet) = ArpPacket::new_checked(packet) else { return };
    let Ok(ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr,
        source_protocol_addr,
        target_protocol_addr,
        ..
    }) = ArpRepr::parse(&packet)
    else {
        return;
    };
    let on_link = target_protocol_addr.octets()[..3] == GATEWAY.0.octets()[..3];
    // Who asks without an address, or for its own, looks for another one that has it.
    if !on_link || target_protocol_addr == GUEST.0 || source_protocol_addr.is_unspecified() {
        return;
    }
    let answer = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: CARD,
        source_protocol_addr: target_protocol_addr,
        target_hardware_addr: source_hardware_addr,
        target_protocol_addr: source_protocol_addr,
    };
    if let Some(bytes) = outgoing.append(EthernetProtocol::Arp, answer.buffer_len()) {
        answer.emit(&mut ArpPacket::new_unchecked(bytes));
    }
}

/// Answers an ICMP packet that is for the gateway itself; true if it was one that has an answer.
/// `is_here` says which addresses echo.
pub(crate) fn icmp(
    ip: &Ip<'_>,
    packet: &[u8],
    outgoing: &mut Outgoing,
    is_here: impl Fn(IpAddr) -> bool,
) -> bool {
    let sums = ChecksumCapabilities::default();
    match (ip.from, ip.to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let Ok(packet) = Icmpv4Packet::new_checked(packet) else { return true };
            match Icmpv4Repr::parse(&packet, &sums) {
                Ok(Icmpv4Repr::EchoRequest { ident, seq_no, data }) if is_here(ip.to) => {
                    let answer = Icmpv4Repr::EchoReply { ident, seq_no, data };
                    send_icmp4(outgoing, to, from, &answer);
                    true
                }
                Ok(Icmpv4Repr::EchoRequest { .. }) => false,
                _ => true,
            }
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let Ok(packet) = Icmpv6Packet::new_checked(packet) else { return true };
            match Icmpv6Repr::parse(&from, &to, &packet, &sums) {
                Ok(Icmpv6Repr::EchoRequest { ident, seq_no, data }) if is_here(ip.to) => {
                    let answer = Icmpv6Repr::EchoReply { ident, seq_no, data };
                    send_icmp6(outgoing, to, from, HOPS, &answer);
                    true
                }
                Ok(Icmpv6Repr::EchoRequest { .. }) => false,
                Ok(Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit { target_addr, .. })) => {
                    if target_addr == GATEWAY.1 && !from.is_unspecified() {
                        advertise(from, outgoing);
                    }
                    true
                }
                _ => true,
            }
        }
        _ => true,
    }
}

fn advertise(to: Ipv6Addr, outgoing: &mut Outgoing) {
    let answer = Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert {
        flags: NdiscNeighborFlags::ROUTER
            | NdiscNeighborFlags::SOLICITED
            | NdiscNeighborFlags::OVERRIDE,
        target_addr: GATEWAY.1,
        lladdr: Some(CARD.into()),
    });
    send_icmp6(outgoing, GATEWAY.1, to, HOPS_ON_LINK, &answer);
}

/// The start of a packet from the guest, as it is quoted when it could not be delivered.
#[derive(Clone, Debug)]
pub(crate) struct Quote(Box<[u8]>);

impl Quote {
    pub fn of(ip: &Ip<'_>) -> Quote {
        Quote(ip.bytes[..ip.bytes.len().min(64)].into())
    }

    pub fn unreachable(&self, why: Unreachable, outgoing: &mut Outgoing) {
        unreachable(&self.0, why, outgoing);
    }
}

/// Says that this packet was not delivered.
pub(crate) fn unreachable(packet: &[u8], why: Unreachable, outgoing: &mut Outgoing) {
    match packet.first().map(|byte| byte >> 4) {
        Some(4) => {
            let quoted = Ipv4Packet::new_unchecked(packet);
            let header = Ipv4Repr {
                src_addr: quoted.src_addr(),
                dst_addr: quoted.dst_addr(),
                next_header: quoted.next_header(),
                payload_len: usize::from(quoted.total_len())
                    .saturating_sub(usize::from(quoted.header_len())),
                hop_limit: quoted.hop_limit(),
            };
            let data = packet.get(usize::from(quoted.header_len())..).unwrap_or_default();
            let reason = match why {
                Unreachable::Port => Icmpv4DstUnreachable::PortUnreachable,
                Unreachable::Prohibited => Icmpv4DstUnreachable::CommProhibited,
            };
            let data = &data[..data.len().min(QUOTED_MAX)];
            let answer = Icmpv4Repr::DstUnreachable { reason, header, data };
            send_icmp4(outgoing, header.dst_addr, header.src_addr, &answer);
        }
        Some(6) => {
            let quoted = Ipv6Packet::new_unchecked(packet);
            let header = Ipv6Repr {
                src_addr: quoted.src_addr(),
                dst_addr: quoted.dst_addr(),
                next_header: quoted.next_header(),
                payload_len: usize::from(quoted.payload_len()),
                hop_limit: quoted.hop_limit(),
            };
            let data = packet.get(quoted.header_len()..).unwrap_or_default();
            let reason = match why {
                Unreachable::Port => Icmpv6DstUnreachable::PortUnreachable,
                Unreachable::Prohibited => Icmpv6DstUnreachable::AdminProhibit,
            };
            let data = &data[..data.len().min(QUOTED_MAX)];
            let answer = Icmpv6Repr::DstUnreachable { reason, header, data };
            send_icmp6(outgoing, header.dst_addr, header.src_addr, HOPS, &answer);
        }
        _ => {}
    }
}

/// A datagram from outside; false if it found no room, or is too large for the link.
pub(crate) fn datagram(ends: Ends, data: &[u8], outgoing: &mut Outgoing) -> bool {
    let sums = ChecksumCapabilities::default();
    let repr = UdpRepr { src_port: ends.to.port(), dst_port: ends.guest.port() };
    let length = repr.header_len() + data.len();
    let Some((from, to, udp)) =
        ip(outgoing, (ends.to.ip(), ends.guest.ip()), IpProtocol::Udp, length, HOPS)
    else {
        return false;
    };
    let mut udp = UdpPacket::new_unchecked(udp);
    let fill = |payload: &mut [u8]| payload.copy_from_slice(data);
    repr.emit(&mut udp, &from.into(), &to.into(), data.len(), fill, &sums);
    true
}

fn send_icmp4(outgoing: &mut Outgoing, from: Ipv4Addr, to: Ipv4Addr, repr: &Icmpv4Repr<'_>) {
    let ends = (from.into(), to.into());
    if let Some((_, _, packet)) = ip(outgoing, ends, IpProtocol::Icmp, repr.buffer_len(), HOPS) {
        let mut packet = Icmpv4Packet::new_unchecked(packet);
        repr.emit(&mut packet, &ChecksumCapabilities::default());
    }
}

fn send_icmp6(
    outgoing: &mut Outgoing,
    from: Ipv6Addr,
    to: Ipv6Addr,
    hops: u8,
    repr: &Icmpv6Repr<'_>,
) {
    let ends = (from.into(), to.into());
    let length = repr.buffer_len();
    if let Some((_, _, packet)) = ip(outgoing, ends, IpProtocol::Icmpv6, length, hops) {
        let mut packet = Icmpv6Packet::new_unchecked(packet);
        repr.emit(&from, &to, &mut packet, &ChecksumCapabilities::default());
    }
}

/// Appends a packet with its IP header, and gives its payload.
fn ip(
    outgoing: &mut Outgoing,
    (from, to): (IpAddr, IpAddr),
    next_header: IpProtocol,
    payload_len: usize,
    hop_limit: u8,
) -> Option<(IpAddr, IpAddr, &mut [u8])> {
    let mtu = aegis_wire::link::MTU as usize;
    let payload = match (from, to) {
        (IpAddr::V4(src_addr), IpAddr::V4(dst_addr)) => {
            let repr = Ipv4Repr { src_addr, dst_addr, next_header, payload_len, hop_limit };
            let length = repr.buffer_len() + payload_len;
            if length > mtu {
                return None;
            }
            let bytes = outgoing.append(EthernetProtocol::Ipv4, length)?;
            let mut packet = Ipv4Packet::new_unchecked(bytes);
            repr.emit(&mut packet, &ChecksumCapabilities::default());
            &mut packet.into_inner()[repr.buffer_len()..]
        }
        (IpAddr::V6(src_addr), IpAddr::V6(dst_addr)) => {
            let repr = Ipv6Repr { src_addr, dst_addr, next_header, payload_len, hop_limit };
            let length = repr.buffer_len() + payload_len;
            if length > mtu {
                return None;
            }
            let bytes = outgoing.append(EthernetProtocol::Ipv6, length)?;
            let mut packet = Ipv6Packet::new_unchecked(bytes);
            repr.emit(&mut packet);
            &mut packet.into_inner()[repr.buffer_len()..]
        }
        _ => return None,
    };
    Some((from, to, payload))
}
