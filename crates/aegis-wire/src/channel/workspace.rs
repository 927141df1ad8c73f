//! A workspace's messages: those of the machine's kernel (FUSE), carried as they are.
//!
//! Sessions of the channel come and go, with a machine that sleeps too; the kernel's requests must
//! not be lost nor done twice. So each side numbers its messages, keeps each until the other has said
//! that it came, and begins a stream with how many came to it: [`Resume`] in the host's stream head,
//! [`HELLO_LEN`] bytes of the machine. What did not come is sent again. [`Link`] does that, for both.
//!
//! ```text
//! message   len u32 │ heard u64 │ len bytes         little-endian; len 0: no message, only a word
//! ```
//! `heard` counts the messages that came to the sender.
//!
//! Messages have a port of their own beside the channel's: each is made of frames ([`frame`]) of the
//! epoch that the stream's head named, and what is of another epoch is none. The stream itself says
//! that they go on: it ends with them.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::frame::{self, Decoder, Epoch, Kind};
use crate::bounds::{
    FRAME_PAYLOAD_MAX, WORKSPACE_MESSAGE_MAX, WORKSPACE_UNHEARD_BYTES_MAX, WORKSPACE_UNHEARD_MAX,
};

/// Name of the port that messages have.
pub const PORT: &str = "workspace";
/// Where a machine sees its workspace.
pub const MOUNT: &str = "/workspace";
/// Bytes in front of each message.
pub const HEAD_LEN: usize = 12;
/// Bytes that the machine says first on a stream: how many messages came to it.
pub const HELLO_LEN: usize = 8;
/// A message of the harness's own, in the kernel's form: user and group whose all files are inside.
/// It has no answer.
pub const OWNER_OPCODE: u32 = 0x4145_0001;
/// Payload of a frame: a whole one is what a port takes at once.
const FRAME_MAX: usize = FRAME_PAYLOAD_MAX - frame::HEADER_LEN;
/// Messages that come before a side says so unasked.
const WORD_EVERY: u64 = 8;

/// What a machine mounts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Nothing can be changed in it.
    #[serde(default)]
    pub read_only: bool,
}

/// How the host goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// Names the server. Another one than before knows nothing of what was open: the folder is
    /// mounted anew.
    pub server: String,
    /// Messages that came to it.
    pub heard: u64,
    /// Of the frames that carry messages while this stream lives.
    pub epoch: Epoch,
}

/// The other side breaks the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// It heard what was never said, or forgot what it heard.
    #[error("it says that {said} messages came to it, of {first} to {last}")]
    Heard {
        /// What it said.
        said: u64,
        /// What it said before.
        first: u64,
        /// Messages that were sent.
        last: u64,
    },
    /// A message that is too long.
    #[error("a message of {0} bytes; at most {WORKSPACE_MESSAGE_MAX} pass")]
    TooLong(usize),
}

/// Head of a message, or a word alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Bytes that follow.
    pub len: usize,
    /// Messages that came to the sender.
    pub heard: u64,
}

impl Head {
    /// From bytes.
    ///
    /// # Errors
    /// When the message is too long.
    pub fn read(bytes: [u8; HEAD_LEN]) -> Result<Head, LinkError> {
        let [a, b, c, d, heard @ ..] = bytes;
        let len = u32::from_le_bytes([a, b, c, d]) as usize;
        if len > WORKSPACE_MESSAGE_MAX {
            return Err(LinkError::TooLong(len));
        }
        Ok(Head { len, heard: u64::from_le_bytes(heard) })
    }

    /// As bytes.
    pub fn bytes(self) -> [u8; HEAD_LEN] {
        let mut bytes = [0; HEAD_LEN];
        bytes[..4].copy_from_slice(&(self.len as u32).to_le_bytes());
        bytes[4..].copy_from_slice(&self.heard.to_le_bytes());
        bytes
    }
}

/// What goes out: a message with its head, or a word alone.
pub type Out = (Head, Option<Arc<[u8]>>);

/// Puts what goes out behind what is to be written, as frames.
pub fn put(to: &mut Vec<u8>, epoch: Epoch, out: &Out) {
    let (head, message) = out;
    let (mut first, mut rest) = (Some(head.bytes()), message.as_deref().unwrap_or_default());
    while first.is_some() || !rest.is_empty() {
        let first = first.take();
        let before = first.map_or(0, |first| first.len());
        let (now, later) = rest.split_at(rest.len().min(FRAME_MAX - before));
        to.extend_from_slice(&frame::header(Kind::Data, epoch, before + now.len()));
        to.extend(first.into_iter().flatten());
        to.extend_from_slice(now);
        rest = later;
    }
}

/// Finds messages in what comes.
#[derive(Debug, Default)]
pub struct Inbox {
    decoder: Decoder,
    epoch: Epoch,
    // Of messages, in this epoch.
    bytes: Vec<u8>,
}

impl Inbox {
    /// From here on messages of that epoch count, and what came of others is none.
    pub fn begin(&mut self, epoch: Epoch) {
        if self.epoch != epoch {
            self.epoch = epoch;
            self.bytes.clear();
        }
    }

    /// Takes bytes as they came.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.decoder.feed(bytes);
    }

    /// The next whole message, or a word; `None` until more is fed.
    ///
    /// # Errors
    /// When a message is too long.
    pub fn next_message(&mut self) -> Result<Option<(Head, Vec<u8>)>, LinkError> {
        loop {
            if let Some(head) = self.bytes.first_chunk::<HEAD_LEN>() {
                let head = Head::read(*head)?;
                let whole = HEAD_LEN + head.len;
                if self.bytes.len() >= whole {
                    let message = self.bytes[HEAD_LEN..whole].to_vec();
                    self.bytes.drain(..whole);
                    return Ok(Some((head, message)));
                }
            }
            let Some(frame) = self.decoder.next_frame() else { return Ok(None) };
            if frame.kind == Kind::Data && frame.epoch == self.epoch {
                self.bytes.extend_from_slice(&frame.payload);
            }
        }
    }
}

/// One side's account of what was said and heard. It outlives streams.
#[derive(Default)]
pub struct Link {
    // Not heard yet, the oldest first.
    unheard: VecDeque<Arc<[u8]>>,
    unheard_bytes: usize,
    // Messages before those.
    heard_by_other: u64,
    // How many of them went out on this stream.
    sent: usize,
    heard: u64,
    told: u64,
}

impl Link {
    /// Messages that came to this side.
    pub fn heard(&self) -> u64 {
        self.heard
    }

    /// Whether another message may be said.
    pub fn has_room(&self) -> bool {
        self.unheard.len() < WORKSPACE_UNHEARD_MAX
            && self.unheard_bytes < WORKSPACE_UNHEARD_BYTES_MAX
    }

    /// Bytes of messages that the other side has not heard yet.
    pub fn unheard_bytes(&self) -> usize {
        self.unheard_bytes
    }

    /// Says a message; it goes out when its turn comes.
    pub fn say(&mut self, message: Arc<[u8]>) {
        self.unheard_bytes += message.len();
        self.unheard.push_back(message);
    }

    /// What goes out next on this stream: a message, or a word that many came.
    pub fn next_out(&mut self) -> Option<Out> {
        let message = self.unheard.get(self.sent).cloned();
        if message.is_none() && self.heard - self.told < WORD_EVERY {
            return None;
        }
        self.sent += usize::from(message.is_some());
        self.told = self.heard;
        let len = message.as_ref().map_or(0, |m| m.len());
        Some((Head { len, heard: self.heard }, message))
    }

    /// Whether all that was said went out on this stream.
    pub fn all_out(&self) -> bool {
        self.sent == self.unheard.len()
    }

    /// Takes in what the other side says it heard.
    ///
    /// # Errors
    /// When it can't have.
    pub fn other_heard(&mut self, said: u64) -> Result<(), LinkError> {
        let (first, last) = (self.heard_by_other, self.heard_by_other + self.sent as u64);
        if said < first || said > last {
            return Err(LinkError::Heard { said, first, last });
        }
        self.drop_heard(said);
        Ok(())
    }

    fn drop_heard(&mut self, said: u64) {
        while self.heard_by_other < said {
            let Some(message) = self.unheard.pop_front() else { return };
            self.unheard_bytes -= message.len();
            self.sent = self.sent.saturating_sub(1);
            self.heard_by_other += 1;
        }
    }

    /// A whole message came.
    pub fn came(&mut self) {
        self.heard += 1;
    }

    /// Begins a stream: what the other side did not hear goes out again.
    ///
    /// # Errors
    /// When it can't have heard what it says.
    pub fn resume(&mut self, said: u64) -> Result<(), LinkError> {
        let (first, last) = (self.heard_by_other, self.heard_by_other + self.unheard.len() as u64);
        if said < first || said > last {
            return Err(LinkError::Heard { said, first, last });
        }
        self.drop_heard(said);
        self.sent = 0;
        // This stream's first words told it.
        self.told = self.heard;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn heads_are_bounded() {
        let head = Head { len: 7, heard: 1 << 40 };
        assert_eq!(Head::read(head.bytes()), Ok(head));
        let long = Head { len: WORKSPACE_MESSAGE_MAX + 1, heard: 0 };
        assert_eq!(Head::read(long.bytes()), Err(LinkError::TooLong(WORKSPACE_MESSAGE_MAX + 1)));
    }

    #[test]
    fn messages_come_out_of_frames_as_they_went_in() {
        let (old, now) = ([1; 8], [2; 8]);
        let long: Arc<[u8]> = (0..WORKSPACE_MESSAGE_MAX).map(|i| i as u8).collect();
        let outs = [
            (Head { len: 3, heard: 1 }, Some(Arc::from(*b"abc"))),
            (Head { len: 0, heard: 2 }, None),
            (Head { len: long.len(), heard: 3 }, Some(long)),
        ];
        // The end of a frame of which the rest was lost, and a message of an earlier stream.
        let mut bytes = b"half".to_vec();
        put(&mut bytes, old, &outs[0]);
        for out in &outs {
            put(&mut bytes, now, out);
        }
        let mut inbox = Inbox::default();
        inbox.begin(now);
        let mut came = Vec::new();
        for part in bytes.chunks(1000) {
            inbox.feed(part);
            while let Some(one) = inbox.next_message().unwrap() {
                came.push(one);
            }
        }
        let all = outs.map(|(head, message)| (head, message.as_deref().unwrap_or(&[]).to_vec()));
        assert_eq!(came, all);
        let long = Head { len: WORKSPACE_MESSAGE_MAX + 1, heard: 0 };
        put(&mut bytes, now, &(long, None));
        inbox.feed(&bytes[bytes.len() - HEAD_LEN - frame::HEADER_LEN..]);
        assert_eq!(inbox.next_message(), Err(LinkError::TooLong(WORKSPACE_MESSAGE_MAX + 1)));
    }

    #[test]
    fn nobody_hears_what_was_not_said() {
        let mut link = Link::default();
        link.say(Arc::from([1]));
        assert!(link.other_heard(1).is_err(), "it did not go out");
        assert!(link.next_out().is_some() && link.next_out().is_none());
        assert_eq!(link.other_heard(1), Ok(()));
        assert!(link.other_heard(0).is_err() && link.other_heard(2).is_err());
        assert!(link.resume(0).is_err() && link.resume(2).is_err());
        assert_eq!(link.resume(1), Ok(()));
    }

    #[test]
    fn who_only_listens_says_so_at_times() {
        let mut link = Link::default();
        for _ in 1..WORD_EVERY {
            link.came();
            assert!(link.next_out().is_none());
        }
        link.came();
        assert_eq!(link.next_out(), Some((Head { len: 0, heard: WORD_EVERY }, None)));
        assert!(link.next_out().is_none());
    }

    #[test]
    fn what_is_not_heard_is_bounded() {
        let mut link = Link::default();
        let message: Arc<[u8]> = vec![0; WORKSPACE_MESSAGE_MAX].into();
        while link.has_room() {
            link.say(Arc::clone(&message));
        }
        assert!(link.unheard_bytes() < WORKSPACE_UNHEARD_BYTES_MAX + WORKSPACE_MESSAGE_MAX);
    }

    /// What happens to two sides.
    #[derive(Clone, Debug)]
    enum Happens {
        Says(usize),
        Passes(usize),
        Breaks,
    }

    fn happens() -> impl Strategy<Value = Happens> {
        prop_oneof![
            4 => (0..2usize).prop_map(Happens::Says),
            6 => (0..2usize).prop_map(Happens::Passes),
            1 => Just(Happens::Breaks),
        ]
    }

    proptest! {
        /// Whatever streams break, each message comes once and in order.
        #[test]
        fn nothing_is_lost_and_nothing_comes_twice(
            all in proptest::collection::vec(happens(), 0..200)
        ) {
            let mut links = [Link::default(), Link::default()];
            let mut wires: [VecDeque<Out>; 2] = Default::default();
            let (mut said, mut came) = ([0u8; 2], [Vec::new(), Vec::new()]);
            let end = (0..2000).map(|i| Happens::Passes(i % 2));
            let broken = std::iter::once(Happens::Breaks);
            for what in all.into_iter().chain(broken).chain(end) {
                match what {
                    Happens::Says(side) if links[side].has_room() => {
                        links[side].say(Arc::from([said[side]]));
                        said[side] = said[side].wrapping_add(1);
                    }
                    Happens::Says(_) => {}
                    Happens::Passes(side) => {
                        while let Some(out) = links[side].next_out() {
                            wires[side].push_back(out);
                        }
                        if let Some((head, message)) = wires[side].pop_front() {
                            links[1 - side].other_heard(head.heard).unwrap();
                            if let Some(message) = message {
                                links[1 - side].came();
                                came[1 - side].push(message[0]);
                            }
                        }
                    }
                    Happens::Breaks => {
                        wires = Default::default();
                        let heard = [links[0].heard(), links[1].heard()];
                        links[0].resume(heard[1]).unwrap();
                        links[1].resume(heard[0]).unwrap();
                    }
                }
            }
            for side in 0..2 {
                let whole: Vec<u8> = (0..said[side]).collect();
                prop_assert_eq!(&came[1 - side], &whole);
            }
        }
    }
}
