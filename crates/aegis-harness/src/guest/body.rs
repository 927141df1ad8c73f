//! Bodies: what comes in, within its bounds; what goes out, whole or as it comes.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use aegis_wire::bounds::GUEST_BODY_MAX;
use aegis_wire::pipe::mux::Stream;
use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper::body::{Frame, Incoming, SizeHint};
use tokio::io::{AsyncRead as _, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::answer::Refusal;

/// Streamed at a time, bytes.
const CHUNK: usize = 16 * 1024;
/// More of a body that is too large is thrown away before it is refused, bytes.
const OVERFLOW_MAX: usize = 4 * GUEST_BODY_MAX;

/// A request's body, and its part of the room for all of them.
pub struct Read {
    /// As it came.
    pub bytes: Vec<u8>,
    /// `None` when it is empty.
    pub held: Option<OwnedSemaphorePermit>,
}

/// Reads a body of at most [`GUEST_BODY_MAX`] bytes within the deadline.
pub async fn read(
    body: Incoming,
    deadline: Duration,
    room: &Arc<Semaphore>,
) -> Result<Read, Refusal> {
    let all = collect(body, room);
    tokio::time::timeout(deadline, all).await.unwrap_or_else(|_| Err(Refusal::too_slow()))
}

async fn collect(mut body: Incoming, room: &Arc<Semaphore>) -> Result<Read, Refusal> {
    let mut read = Read { bytes: Vec::new(), held: None };
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Refusal::malformed("the request body broke off"))?;
        let Ok(data) = frame.into_data() else { continue };
        if read.bytes.len() + data.len() > GUEST_BODY_MAX {
            drop(read);
            throw_away(body, data.len()).await;
            return Err(Refusal::too_large());
        }
        // What was promised in a header takes no room; only what arrives does.
        let bytes = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let more = Arc::clone(room).try_acquire_many_owned(bytes);
        let more = more.map_err(|_| Refusal::no_room())?;
        match &mut read.held {
            Some(held) => held.merge(more),
            none => *none = Some(more),
        }
        read.bytes.extend_from_slice(&data);
    }
    Ok(read)
}

/// Takes some of a body that nobody wants: a client that sends before it reads would never see why.
pub async fn throw_away(mut body: Incoming, mut thrown: usize) {
    while thrown < OVERFLOW_MAX
        && let Some(Ok(frame)) = body.frame().await
    {
        thrown += frame.data_ref().map_or(0, Bytes::len);
    }
}

/// An answer's body.
pub enum Body {
    /// Known.
    Whole(Option<Bytes>),
    /// Bytes of the host, until it closes the stream.
    Stream(Stream),
}

impl Body {
    /// A known body.
    pub fn whole(bytes: Vec<u8>) -> Body {
        Body::Whole(Some(bytes.into()))
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let stream = match &mut *self {
            Body::Whole(bytes) => return Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Body::Stream(stream) => stream,
        };
        let mut chunk = vec![0; CHUNK];
        let mut buffer = ReadBuf::new(&mut chunk);
        ready!(Pin::new(stream).poll_read(cx, &mut buffer))?;
        let filled = buffer.filled().len();
        if filled == 0 {
            *self = Body::Whole(None);
            return Poll::Ready(None);
        }
        chunk.truncate(filled);
        chunk.shrink_to_fit();
        Poll::Ready(Some(Ok(Frame::data(chunk.into()))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Body::Whole(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Whole(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Body::Stream(_) => SizeHint::new(),
        }
    }
}
