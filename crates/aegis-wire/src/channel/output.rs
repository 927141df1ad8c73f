//! Frames on exec, log and file streams: kind (1 byte), length (4, big-endian), payload.
//!
//! Machine → host: [`Kind::Stdout`], [`Kind::Stderr`], then one [`Kind::Exit`] or [`Kind::Failed`].
//! Host → machine (exec only): [`Kind::Stdin`], [`Kind::StdinEnd`]; at a terminal [`Kind::Stdin`],
//! [`Kind::Resize`]. What a terminal shows is one stream, [`Kind::Stdout`].
//! Of an attached exec ([`super::ExecStart::attached`]) the machine tells by [`Kind::Taken`] how much
//! of its input was taken, and the host sends no more than [`super::Window`] has room for.
//! What [`super::files`] has in frames is said there.

use crate::bounds::OUTPUT_CHUNK_MAX;

/// Length of a frame's header.
pub const HEADER_LEN: usize = 5;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Bytes of standard output.
    Stdout = 1,
    /// Bytes of standard error.
    Stderr = 2,
    /// JSON of [`super::ProcessExit`]; the last frame.
    Exit = 3,
    /// JSON of [`super::rpc::RpcError`]: the process could not be started; the last frame.
    Failed = 4,
    /// Bytes for standard input.
    Stdin = 5,
    /// Standard input ends.
    StdinEnd = 6,
    /// [`super::WindowSize::bytes`] of a terminal.
    Resize = 7,
    /// JSON of [`super::files::FileAnswer`].
    Answer = 8,
    /// Bytes of a file; or JSON of one entry, of one event.
    Data = 9,
    /// There is no more of it, and it was all.
    DataEnd = 10,
    /// [`super::Window::bytes`]: how much of standard input the command has taken.
    Taken = 11,
}

impl Kind {
    fn parse(byte: u8) -> Option<Kind> {
        use Kind::{
            Answer, Data, DataEnd, Exit, Failed, Resize, Stderr, Stdin, StdinEnd, Stdout, Taken,
        };
        let all =
            [Stdout, Stderr, Exit, Failed, Stdin, StdinEnd, Resize, Answer, Data, DataEnd, Taken];
        all.into_iter().find(|k| *k as u8 == byte)
    }
}

/// The other side did not send an output frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an output frame (kind {kind}, {len} bytes; at most {OUTPUT_CHUNK_MAX})")]
pub struct BadFrame {
    /// The kind byte.
    pub kind: u8,
    /// The length that it claimed.
    pub len: usize,
}

/// Header of a frame whose payload has `len` bytes (at most [`OUTPUT_CHUNK_MAX`]).
pub fn header(kind: Kind, len: usize) -> [u8; HEADER_LEN] {
    assert!(len <= OUTPUT_CHUNK_MAX, "output is cut before it is written");
    let mut out = [kind as u8, 0, 0, 0, 0];
    out[1..].copy_from_slice(&(len as u32).to_be_bytes());
    out
}

/// Kind and payload length from a header.
pub fn parse_header(header: [u8; HEADER_LEN]) -> Result<(Kind, usize), BadFrame> {
    let len = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
    match Kind::parse(header[0]) {
        Some(kind) if len <= OUTPUT_CHUNK_MAX => Ok((kind, len)),
        _ => Err(BadFrame { kind: header[0], len }),
    }
}
