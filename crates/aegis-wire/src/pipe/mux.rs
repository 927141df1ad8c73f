//! Many streams over one session: yamux, with its poll functions behind one task.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt as _, TokioAsyncReadCompatExt as _};
use yamux::{Connection, Mode};

use crate::bounds::{CHANNEL_SPLIT, CHANNEL_WINDOW, STREAMS_COUNTED_MAX, STREAMS_MAX};

/// One stream of the channel. Dropping it closes it.
pub struct Stream {
    inner: Compat<yamux::Stream>,
    // Counts against STREAMS_MAX while the stream lives.
    _permit: Option<OwnedSemaphorePermit>,
}

/// Opens streams on one session; cheap to clone. All clones fail once the session ended.
#[derive(Clone)]
pub struct Mux {
    open: mpsc::Sender<oneshot::Sender<io::Result<yamux::Stream>>>,
    permits: Arc<Semaphore>,
}

/// Starts yamux over a session's bytes. The host is the client and opens streams; what the other
/// side opens arrives at the receiver. The task ends with the session.
pub fn start(session: DuplexStream, host: bool) -> (Mux, mpsc::Receiver<Stream>) {
    let mut config = yamux::Config::default();
    config.set_max_num_streams(STREAMS_COUNTED_MAX);
    config.set_max_connection_receive_window(Some(CHANNEL_WINDOW));
    config.set_split_send_size(CHANNEL_SPLIT);
    let mode = if host { Mode::Client } else { Mode::Server };
    let connection = Connection::new(session.compat(), config, mode);
    let (open, to_open) = mpsc::channel(STREAMS_MAX);
    let (arrived, inbound) = mpsc::channel(STREAMS_MAX);
    tokio::spawn(drive(connection, to_open, arrived));
    (Mux { open, permits: Arc::new(Semaphore::new(STREAMS_MAX)) }, inbound)
}

impl Mux {
    /// Opens a stream; waits while [`STREAMS_MAX`] are open.
    pub async fn open(&self) -> io::Result<Stream> {
        let gone = || io::Error::new(io::ErrorKind::BrokenPipe, "the channel's session ended");
        let permit = Arc::clone(&self.permits).acquire_owned().await.map_err(|_| gone())?;
        let (answer, opened) = oneshot::channel();
        self.open.send(answer).await.map_err(|_| gone())?;
        let stream = opened.await.map_err(|_| gone())??;
        Ok(Stream { inner: stream.compat(), _permit: Some(permit) })
    }

    /// Completes when the session has ended.
    pub async fn closed(&self) {
        self.open.closed().await;
    }
}

async fn drive(
    mut connection: Connection<Compat<DuplexStream>>,
    mut to_open: mpsc::Receiver<oneshot::Sender<io::Result<yamux::Stream>>>,
    arrived: mpsc::Sender<Stream>,
) {
    let mut waiting: Option<oneshot::Sender<io::Result<yamux::Stream>>> = None;
    let mut asks_ended = false;
    std::future::poll_fn(|cx| {
        loop {
            if waiting.is_none() && !asks_ended {
                match to_open.poll_recv(cx) {
                    Poll::Ready(Some(ask)) => waiting = Some(ask),
                    Poll::Ready(None) => asks_ended = true,
                    Poll::Pending => {}
                }
            }
            if let Some(ask) = waiting.take() {
                match connection.poll_new_outbound(cx) {
                    Poll::Ready(opened) => {
                        let ended = opened.is_err();
                        // The asker may have left; then the stream is dropped and so closed.
                        let _ = ask.send(opened.map_err(io::Error::other));
                        if ended {
                            return Poll::Ready(());
                        }
                        continue;
                    }
                    Poll::Pending => waiting = Some(ask),
                }
            }
            match connection.poll_next_inbound(cx) {
                Poll::Ready(Some(Ok(stream))) => {
                    // Full means that the other side opens faster than this one serves: the
                    // stream is dropped, which resets it.
                    let _ = arrived.try_send(Stream { inner: stream.compat(), _permit: None });
                }
                Poll::Ready(Some(Err(error))) => {
                    tracing::debug!(%error, "the channel's session failed");
                    return Poll::Ready(());
                }
                Poll::Ready(None) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await;
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
