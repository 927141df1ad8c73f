//! The link: frames behind their length, over a stream socket to the machine's network card.

use std::io;
use std::os::fd::OwnedFd;

use aegis_wire::link::MTU;
use smoltcp::phy::{self, Checksum, Device, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, EthernetProtocol};

/// Largest frame that a card may send, bytes: its MTU, Ethernet's header, a VLAN tag or padding.
pub(crate) const FRAME_MAX: usize = 65_550;
/// The gateway's card.
pub(crate) const CARD: EthernetAddress = EthernetAddress([0x52, 0x54, 0x00, 0xae, 0x91, 0x01]);

const LENGTH: usize = 4;
const ETHERNET: usize = 14;
/// What is read at once, bytes: a few of the largest frames.
const INCOMING: usize = 8 * (LENGTH + FRAME_MAX);
/// What waits for a card that does not read, bytes; behind it TCP waits, and all else is dropped.
const OUTGOING: usize = 8 * (LENGTH + FRAME_MAX);
/// Kept free of bulk for short answers: resets, ARP, echoes.
const RESERVE: usize = 8 * 1024;

/// The other side broke the rules of framing.
#[derive(Debug, thiserror::Error)]
#[error("a frame of {0} bytes")]
pub(crate) struct TooLong(usize);

/// Bytes that came, and the frames in them.
pub(crate) struct Incoming {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

/// What one read brought.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Read {
    /// Bytes, and there may be more.
    More,
    /// All that there was.
    All,
    Nothing,
    End,
}

impl Incoming {
    pub fn new() -> Incoming {
        Incoming { buffer: vec![0; INCOMING].into_boxed_slice(), start: 0, end: 0 }
    }

    /// Nothing, and room for nothing.
    pub fn none() -> Incoming {
        Incoming { buffer: Box::default(), start: 0, end: 0 }
    }

    /// Forgets what came from an earlier link.
    pub fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// Reads once. What is left of the last read is less than a frame.
    pub fn read(&mut self, link: &OwnedFd) -> io::Result<Read> {
        let rest = self.end - self.start;
        if rest == 0 || self.buffer.len() - self.end < LENGTH + FRAME_MAX {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, rest);
        }
        loop {
            return match rustix::io::read(link, &mut self.buffer[self.end..]) {
                Ok(0) => Ok(Read::End),
                Ok(bytes) => {
                    self.end += bytes;
                    // The kernel stops short only where nothing is left.
                    let all = self.end < self.buffer.len();
                    Ok(if all { Read::All } else { Read::More })
                }
                Err(rustix::io::Errno::AGAIN) => Ok(Read::Nothing),
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => Err(errno.into()),
            };
        }
    }

    /// The next whole frame.
    pub fn frame(&mut self) -> Result<Option<&[u8]>, TooLong> {
        let waiting = &self.buffer[self.start..self.end];
        let Some((length, rest)) = waiting.split_first_chunk::<LENGTH>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        if length > FRAME_MAX {
            return Err(TooLong(length));
        }
        if rest.len() < length {
            return Ok(None);
        }
        let frame = self.start + LENGTH..self.start + LENGTH + length;
        self.start = frame.end;
        Ok(Some(&self.buffer[frame]))
    }
}

/// Frames that go: a bounded buffer, written at once.
pub(crate) struct Outgoing {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// The guest's card, as its last frame said.
    pub card: EthernetAddress,
    /// Takes what finds no room.
    void: Vec<u8>,
}

impl Outgoing {
    pub fn new() -> Outgoing {
        Outgoing {
            buffer: vec![0; OUTGOING].into_boxed_slice(),
            start: 0,
            end: 0,
            card: EthernetAddress::BROADCAST,
            void: Vec::new(),
        }
    }

    pub fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
        self.card = EthernetAddress::BROADCAST;
    }

    /// Whether a frame of any size finds room beside the reserve.
    pub fn has_room(&self) -> bool {
        self.buffer.len() - self.end >= LENGTH + FRAME_MAX + RESERVE
    }

    /// Appends a frame of `length` bytes behind Ethernet's header, to be filled by the caller; `None`
    /// if there is no room.
    pub fn append(&mut self, kind: EthernetProtocol, length: usize) -> Option<&mut [u8]> {
        let end = self.end + LENGTH + ETHERNET + length;
        let frame = self.buffer.get_mut(self.end..end)?;
        let size = (ETHERNET + length) as u32;
        frame[..4].copy_from_slice(&size.to_be_bytes());
        frame[4..10].copy_from_slice(self.card.as_bytes());
        frame[10..16].copy_from_slice(CARD.as_bytes());
        frame[16..18].copy_from_slice(&u16::from(kind).to_be_bytes());
        self.end = end;
        Some(&mut frame[LENGTH + ETHERNET..])
    }

    /// Writes what is there; false if the card takes no more for now.
    pub fn write(&mut self, link: &OwnedFd) -> io::Result<bool> {
        while self.start < self.end {
            match rustix::io::write(link, &self.buffer[self.start..self.end]) {
                Ok(bytes) => self.start += bytes,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    // So that room is found again before all is written.
                    if self.start >= self.buffer.len() / 2 {
                        self.buffer.copy_within(self.start..self.end, 0);
                        (self.start, self.end) = (0, self.end - self.start);
                    }
                    return Ok(false);
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        (self.start, self.end) = (0, 0);
        Ok(true)
    }
}

/// The link as smoltcp sees it: IP packets, at most one of which comes in.
pub(crate) struct Port<'a> {
    pub incoming: Option<&'a [u8]>,
    pub outgoing: &'a mut Outgoing,
}

impl Device for Port<'_> {
    type RxToken<'b>
        = Received<'b>
    where
        Self: 'b;
    type TxToken<'b>
        = Sending<'b>
    where
        Self: 'b;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Sending<'_>)> {
        self.incoming.take().map(|packet| (Received(packet), Sending(self.outgoing)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        if self.outgoing.has_room() { Some(Sending(self.outgoing)) } else { None }
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU as usize;
        // A socket between two processes garbles nothing; what the guest garbles is its own.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

pub(crate) struct Received<'a>(&'a [u8]);

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

pub(crate) struct Sending<'a>(&'a mut Outgoing);

impl phy::TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let Sending(outgoing) = self;
        let end = outgoing.end;
        let Some(packet) = outgoing.append(EthernetProtocol::Ipv4, length) else {
            // No room: it is lost, as on any link.
            outgoing.void.resize(length, 0);
            return f(&mut outgoing.void);
        };
        let result = f(packet);
        // Only now it is known which version was written.
        if packet.first().is_some_and(|byte| byte >> 4 == 6) {
            let kind = end + LENGTH + ETHERNET - 2;
            let v6 = u16::from(EthernetProtocol::Ipv6).to_be_bytes();
            outgoing.buffer[kind..kind + 2].copy_from_slice(&v6);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (OwnedFd, OwnedFd) {
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        a.set_nonblocking(true).unwrap();
        (a.into(), b.into())
    }

    #[test]
    fn frames_are_found_however_they_are_cut() {
        let (ours, theirs) = pair();
        let mut stream = Vec::new();
        let frames: Vec<Vec<u8>> = (0..40_usize).map(|n| vec![n as u8; n * 5]).collect();
        for frame in &frames {
            stream.extend((frame.len() as u32).to_be_bytes());
            stream.extend(frame);
        }
        let mut incoming = Incoming::new();
        let mut found = Vec::new();
        for part in stream.chunks(7) {
            rustix::io::write(&theirs, part).unwrap();
            assert_eq!(incoming.read(&ours).unwrap(), Read::All);
            while let Some(frame) = incoming.frame().unwrap() {
                found.push(frame.to_vec());
            }
        }
        assert_eq!(found, frames);
        assert_eq!(incoming.read(&ours).unwrap(), Read::Nothing);
        drop(theirs);
        assert_eq!(incoming.read(&ours).unwrap(), Read::End);
    }

    #[test]
    fn a_frame_that_is_too_long_is_an_error() {
        let (ours, theirs) = pair();
        rustix::io::write(&theirs, &(FRAME_MAX as u32 + 1).to_be_bytes()).unwrap();
        let mut incoming = Incoming::new();
        incoming.read(&ours).unwrap();
        assert!(incoming.frame().is_err());
    }

    #[test]
    fn a_card_that_does_not_read_fills_a_buffer_and_no_more() {
        let (ours, _theirs) = pair();
        let mut outgoing = Outgoing::new();
        let mut pushed = 0;
        for _ in 0..100 {
            pushed += usize::from(outgoing.append(EthernetProtocol::Ipv4, 60_000).is_some());
            outgoing.write(&ours).unwrap();
        }
        assert!(!outgoing.has_room() && pushed < 20, "{pushed}");
    }
}
