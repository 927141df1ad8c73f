//! Output of a process as frames, until nothing more can come.

use std::io;
use std::time::Duration;

use aegis_wire::channel::ProcessExit;
use aegis_wire::channel::output::{self, HEADER_LEN, Kind};
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;

use crate::exec::Exit;
use crate::process::Pipes;

/// Bytes of output in one frame. Smaller than a frame may be: many processes share the memory.
pub const CHUNK: usize = 16 * 1024;
/// After a process ended, others may still hold its output open: what was started in the
/// background is not waited for, what ends together with it is.
pub const LINGER: Duration = Duration::from_millis(250);
/// What a pipe holds at most by default limits of the kernel, bytes.
const PIPE_MAX: usize = 1 << 20;

/// An end of which nobody knows more.
pub const UNKNOWN: ProcessExit = ProcessExit { code: -1, signal: None, timed_out: false };

/// Where frames go.
pub trait Sink {
    /// Takes a whole frame; waits as long as the other side wants.
    fn send(&mut self, frame: &[u8]) -> impl Future<Output = ()> + Send;
}

/// Where the output of a process comes from.
pub trait Source {
    /// What may lie there when the process has ended, bytes.
    const REST_MAX: usize;

    /// The next piece; `None` when nothing more can come.
    fn read(&mut self, buffer: &mut [u8]) -> impl Future<Output = Option<(Kind, usize)>> + Send;

    /// A piece that is there now.
    fn read_now(&mut self, buffer: &mut [u8]) -> Option<(Kind, usize)>;
}

/// Sends all output of a process to `sink`, and returns how it ended, after its output; `None` when
/// nobody knows.
pub async fn pump<S: Source>(
    mut source: S,
    exit: &mut Exit,
    sink: &mut impl Sink,
) -> Option<ProcessExit> {
    let mut frame = vec![0; HEADER_LEN + CHUNK];
    {
        let over = async {
            exit.ended().await;
            tokio::time::sleep(LINGER).await;
        };
        tokio::pin!(over);
        loop {
            let piece = tokio::select! {
                // Somebody who floods for ever must not keep it from ending.
                biased;
                () = &mut over => break,
                piece = source.read(&mut frame[HEADER_LEN..]) => piece,
            };
            let Some((kind, n)) = piece else { break };
            frame[..HEADER_LEN].copy_from_slice(&output::header(kind, n));
            sink.send(&frame[..HEADER_LEN + n]).await;
        }
    }
    // What lay there at the end, while the other side was slow.
    let mut left = S::REST_MAX;
    while left > 0
        && let Some((kind, n)) = source.read_now(&mut frame[HEADER_LEN..])
    {
        left = left.saturating_sub(n);
        frame[..HEADER_LEN].copy_from_slice(&output::header(kind, n));
        sink.send(&frame[..HEADER_LEN + n]).await;
    }
    exit.ended().await
}

/// Takes a process's input apart from its outputs.
pub fn split(pipes: Pipes) -> (Option<pipe::Sender>, Sources) {
    (pipes.input, Sources { output: Some(pipes.output), errors: Some(pipes.errors) })
}

/// Output and errors of a process at pipes.
pub struct Sources {
    output: Option<pipe::Receiver>,
    errors: Option<pipe::Receiver>,
}

impl Source for Sources {
    const REST_MAX: usize = 2 * PIPE_MAX;

    async fn read(&mut self, buffer: &mut [u8]) -> Option<(Kind, usize)> {
        loop {
            // Two buffers would double the memory; so first wait, then read.
            let kind = tokio::select! {
                () = readable(&self.output), if self.output.is_some() => Kind::Stdout,
                () = readable(&self.errors), if self.errors.is_some() => Kind::Stderr,
                else => return None,
            };
            let source = self.source(kind);
            let Some(pipe) = source else { continue };
            match pipe.try_read(buffer) {
                Ok(0) => *source = None,
                Ok(n) => return Some((kind, n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => *source = None,
            }
        }
    }

    fn read_now(&mut self, buffer: &mut [u8]) -> Option<(Kind, usize)> {
        [Kind::Stdout, Kind::Stderr].into_iter().find_map(|kind| {
            let n = self.source(kind).as_ref()?.try_read(buffer).ok().filter(|n| *n > 0)?;
            Some((kind, n))
        })
    }
}

impl Sources {
    fn source(&mut self, kind: Kind) -> &mut Option<pipe::Receiver> {
        if kind == Kind::Stdout { &mut self.output } else { &mut self.errors }
    }
}

async fn readable(source: &Option<pipe::Receiver>) {
    match source {
        // An error shows again when it is read.
        Some(pipe) => drop(pipe.readable().await),
        None => std::future::pending().await,
    }
}

/// Reads one frame of the host into `buffer`; `None` at the end of the stream.
pub async fn read_frame<R: tokio::io::AsyncRead + Unpin>(
    from: &mut R,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<Kind>> {
    let mut header = [0; HEADER_LEN];
    match from.read_exact(&mut header).await {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    }
    let (kind, len) = output::parse_header(header).map_err(io::Error::other)?;
    buffer.resize(len, 0);
    from.read_exact(buffer).await?;
    Ok(Some(kind))
}

/// A frame with a JSON payload, which is small.
pub fn last_frame(kind: Kind, payload: &impl serde::Serialize) -> Vec<u8> {
    let json = serde_json::to_vec(payload).unwrap_or_default();
    [&output::header(kind, json.len())[..], &json].concat()
}
