//! Epoch frames: sessions over a byte pipe that has none.
//!
//! The virtio-serial port is one endless pipe: a restored clone may hold half a frame of a session
//! that its golden ancestor had, and a host that comes back finds the rest of the last one. So each
//! session has a random epoch. On connect the host sends [`PADDING`] bytes of `0xFF` (which complete
//! any half frame), then HELLO with a new epoch, and discards input until the ACK of that epoch.
//! The machine drops its old session when a HELLO arrives. Frames of another epoch are discarded.
//! Before a machine is saved to be cloned, the host ends its session with BYE: else every clone had to
//! clear it away. The machine answers with another ACK when it has.
//!
//! Header, 20 bytes: magic (4), kind (1), generation (1), zero (2), epoch (8), payload length (4,
//! little-endian, at most [`FRAME_PAYLOAD_MAX`]).

use crate::bounds::{CHANNEL_GENERATION, FRAME_PAYLOAD_MAX};

/// Length of a frame's header.
pub const HEADER_LEN: usize = 20;
/// How much 0xFF the host sends before HELLO.
pub const PADDING: usize = FRAME_PAYLOAD_MAX + HEADER_LEN;
const MAGIC: [u8; 4] = *b"AEG\x01";

/// Names one session.
pub type Epoch = [u8; 8];

/// What a frame is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Host → machine: a new session begins.
    Hello,
    /// Machine → host: the session of this epoch is open; or, after BYE, it is cleared away.
    Ack,
    /// Bytes of the session.
    Data,
    /// Host → machine: the session of this epoch is over, and no other one begins yet.
    Bye,
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is for.
    pub kind: Kind,
    /// The generation that the sender speaks.
    pub generation: u8,
    /// Its session.
    pub epoch: Epoch,
    /// Bytes of the session; only DATA has any.
    pub payload: Vec<u8>,
}

/// Header of a frame with a payload of `len` bytes (at most [`FRAME_PAYLOAD_MAX`]).
pub fn header(kind: Kind, epoch: Epoch, len: usize) -> [u8; HEADER_LEN] {
    assert!(len <= FRAME_PAYLOAD_MAX, "frames are cut before they are written");
    let mut out = [0; HEADER_LEN];
    out[..4].copy_from_slice(&MAGIC);
    out[4] = match kind {
        Kind::Hello => 1,
        Kind::Ack => 2,
        Kind::Data => 3,
        Kind::Bye => 4,
    };
    out[5] = CHANNEL_GENERATION as u8;
    out[8..16].copy_from_slice(&epoch);
    out[16..].copy_from_slice(&(len as u32).to_le_bytes());
    out
}

/// Finds frames in a byte pipe. It never holds more than one frame and what was fed last, and any
/// garbage is skipped up to the next valid header.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    start: usize,
}

impl Decoder {
    /// A decoder at the beginning of a pipe.
    pub fn new() -> Decoder {
        Decoder::default()
    }

    /// Takes bytes as they came.
    pub fn feed(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, or `None` until more is fed.
    pub fn next_frame(&mut self) -> Option<Frame> {
        loop {
            let rest = &self.buffer[self.start..];
            if rest.len() < HEADER_LEN {
                return None;
            }
            let Some((kind, generation, epoch, len)) = parse_header(rest) else {
                // Not a header: look for the next byte that may begin one.
                let skip =
                    rest[1..].iter().position(|b| *b == MAGIC[0]).map_or(rest.len(), |i| i + 1);
                self.start += skip;
                continue;
            };
            let whole = HEADER_LEN + len;
            if rest.len() < whole {
                return None;
            }
            let payload = rest[HEADER_LEN..whole].to_vec();
            self.start += whole;
            return Some(Frame { kind, generation, epoch, payload });
        }
    }

    /// Bytes held back until more is fed.
    pub fn pending(&self) -> usize {
        self.buffer.len() - self.start
    }
}

fn parse_header(bytes: &[u8]) -> Option<(Kind, u8, Epoch, usize)> {
    if bytes[..4] != MAGIC || bytes[6..8] != [0, 0] || bytes[5] == 0 {
        return None;
    }
    let kind = match bytes[4] {
        1 => Kind::Hello,
        2 => Kind::Ack,
        3 => Kind::Data,
        4 => Kind::Bye,
        _ => return None,
    };
    let epoch: Epoch = bytes[8..16].try_into().ok()?;
    let len = u32::from_le_bytes(bytes[16..20].try_into().ok()?) as usize;
    let fits = if kind == Kind::Data { len <= FRAME_PAYLOAD_MAX } else { len == 0 };
    fits.then_some((kind, bytes[5], epoch, len))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame_bytes(kind: Kind, epoch: Epoch, payload: &[u8]) -> Vec<u8> {
        let mut out = header(kind, epoch, payload.len()).to_vec();
        out.extend_from_slice(payload);
        out
    }

    proptest! {
        /// A half frame of an old session, then padding, then HELLO: the HELLO is found, and
        /// whatever was cut off swallows at most the padding.
        #[test]
        fn hello_is_found_after_any_half_frame(
            old in prop::collection::vec(any::<u8>(), 0..2000),
            cut in 0usize..2020,
            piece in 1usize..5000,
        ) {
            let mut bytes = frame_bytes(Kind::Data, [1; 8], &old);
            bytes.truncate(cut);
            bytes.extend(std::iter::repeat_n(0xFF, PADDING));
            bytes.extend(frame_bytes(Kind::Hello, [2; 8], &[]));
            bytes.extend(frame_bytes(Kind::Data, [2; 8], b"first words"));
            let mut decoder = Decoder::new();
            let mut seen = Vec::new();
            for chunk in bytes.chunks(piece) {
                decoder.feed(chunk);
                while let Some(frame) = decoder.next_frame() {
                    if frame.epoch == [2; 8] { seen.push(frame); }
                }
            }
            prop_assert_eq!(seen.len(), 2);
            prop_assert_eq!(seen[0].kind, Kind::Hello);
            prop_assert_eq!(&seen[1].payload[..], b"first words");
        }

        /// Garbage never panics and never grows what is held beyond one frame and the last feed.
        #[test]
        fn garbage_is_bounded(garbage in prop::collection::vec(any::<u8>(), 0..100_000)) {
            let mut decoder = Decoder::new();
            for chunk in garbage.chunks(4096) {
                decoder.feed(chunk);
                while decoder.next_frame().is_some() {}
                prop_assert!(decoder.pending() <= PADDING + 4096);
            }
        }
    }
}
