//! What the outside saw: bytes that came in, to the byte, and what was asked for.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// An HTTP request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The port at which it came.
    pub port: u16,
    /// The name that its TLS connection asked for.
    pub sni: Option<String>,
    /// What its header `Host` says.
    pub host: Option<String>,
    /// The method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// All headers.
    pub headers: Vec<(String, String)>,
}

/// A DNS question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The name, in lower case and without a dot at its end.
    pub name: String,
    /// The type, as in `AAAA`.
    pub kind: String,
    /// Whether it came by TCP.
    pub tcp: bool,
}

/// Counts of one port.
#[derive(Debug, Default)]
pub(super) struct Port {
    received: AtomicU64,
    connections: AtomicU64,
}

impl Port {
    /// Payload that came in.
    pub(super) fn count(&self, bytes: usize) {
        self.received.fetch_add(bytes as u64, Ordering::SeqCst);
    }

    /// A connection came in; gives what counts its bytes.
    pub(super) fn connected<S>(self: &Arc<Port>, stream: S) -> Counted<S> {
        self.connections.fetch_add(1, Ordering::SeqCst);
        Counted { stream, port: Arc::clone(self) }
    }
}

/// All that was seen.
#[derive(Debug, Default)]
pub(super) struct Seen {
    ports: Mutex<BTreeMap<u16, Arc<Port>>>,
    requests: Mutex<Vec<Request>>,
    questions: Mutex<Vec<Question>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Seen {
    /// The counts of a port.
    pub(super) fn port(&self, port: u16) -> Arc<Port> {
        Arc::clone(lock(&self.ports).entry(port).or_default())
    }

    pub(super) fn received(&self, port: Option<u16>) -> u64 {
        let ports = lock(&self.ports);
        let of = ports.iter().filter(|(n, _)| port.is_none_or(|p| p == **n));
        of.map(|(_, port)| port.received.load(Ordering::SeqCst)).sum()
    }

    pub(super) fn connections(&self, port: u16) -> u64 {
        lock(&self.ports).get(&port).map_or(0, |port| port.connections.load(Ordering::SeqCst))
    }

    pub(super) fn request(&self, request: Request) {
        lock(&self.requests).push(request);
    }

    pub(super) fn requests(&self) -> Vec<Request> {
        lock(&self.requests).clone()
    }

    pub(super) fn question(&self, question: Question) {
        lock(&self.questions).push(question);
    }

    pub(super) fn questions(&self) -> Vec<Question> {
        lock(&self.questions).clone()
    }
}

/// A stream that counts what is read of it.
pub(super) struct Counted<S> {
    stream: S,
    port: Arc<Port>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let done = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.port.count(buf.filled().len() - before);
        done
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
