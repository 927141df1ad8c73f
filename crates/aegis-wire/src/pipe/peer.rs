//! JSON-RPC 2.0 on the control stream, both ways, bounded.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::{read_frame, write_message};
use crate::bounds::RPC_IN_FLIGHT_MAX;
use crate::channel::rpc::{CODE_INTERNAL, CODE_INVALID, CODE_RATE, Message, RpcError};
use crate::json::values;

/// What this side does when the other calls.
pub trait Handler: Send + Sync + 'static {
    /// JSON values of which a message to this side may consist. A byte of JSON can become a hundred
    /// bytes of memory; who does not trust the other side says how many.
    const VALUES_MAX: usize = usize::MAX;

    /// Answers a request.
    fn request(
        &self,
        method: String,
        params: Value,
    ) -> impl Future<Output = Result<Value, RpcError>> + Send;

    /// Takes note of a notification; must not block.
    fn notification(&self, method: String, params: Value);
}

/// Why a call brought no result.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The other side answered with an error.
    #[error("{method} was refused")]
    Refused {
        /// The method that was called.
        method: String,
        /// What the other side said.
        #[source]
        error: RpcError,
    },
    /// No answer in time.
    #[error("{method} was not answered within {}ms", deadline.as_millis())]
    Deadline {
        /// The method that was called.
        method: String,
        /// How long it was waited for.
        deadline: Duration,
    },
    /// The session ended first.
    #[error("the channel ended before {method} was answered")]
    Closed {
        /// The method that was called.
        method: String,
    },
    /// The params could not be written, or the answer is not of the expected shape.
    #[error("{method}: not the expected shape")]
    Shape {
        /// The method that was called.
        method: String,
        /// What was wrong.
        #[source]
        error: serde_json::Error,
    },
}

type Askers = HashMap<u64, oneshot::Sender<Result<Value, RpcError>>>;

/// Who waits for an answer; `None` once none can come any more.
#[derive(Clone)]
struct Pending(Arc<Mutex<Option<Askers>>>);

impl Pending {
    fn new() -> Pending {
        Pending(Arc::new(Mutex::new(Some(HashMap::new()))))
    }

    /// Does nothing, and drops the asker, when no answer can come any more.
    fn insert(&self, id: u64, asker: oneshot::Sender<Result<Value, RpcError>>) {
        if let Some(askers) = &mut *self.lock() {
            askers.insert(id, asker);
        }
    }

    fn remove(&self, id: u64) -> Option<oneshot::Sender<Result<Value, RpcError>>> {
        self.lock().as_mut()?.remove(&id)
    }

    /// Whoever waits, or comes later, learns that no answer comes.
    fn end(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Askers>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One side of the control stream; cheap to clone.
#[derive(Clone)]
pub struct Peer {
    out: mpsc::Sender<Message>,
    pending: Pending,
    next_id: Arc<AtomicU64>,
    slots: Arc<Semaphore>,
}

impl Peer {
    /// Serves a control stream whose [`crate::channel::StreamHead`] is already exchanged. The tasks
    /// end with the stream.
    pub fn start<S, H>(stream: S, handler: H) -> Peer
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
        H: Handler,
    {
        let (read, mut write) = tokio::io::split(stream);
        let (out, mut to_write) = mpsc::channel::<Message>(2 * RPC_IN_FLIGHT_MAX);
        let pending = Pending::new();
        let unsent = pending.clone();
        tokio::spawn(async move {
            while let Some(message) = to_write.recv().await {
                if write_message(&mut write, &message).await.is_err() {
                    break;
                }
            }
            unsent.end();
        });
        let reader = Reader {
            // Weak, so that the writer ends when the last Peer is dropped.
            out: out.downgrade(),
            pending: pending.clone(),
            slots: Arc::new(Semaphore::new(RPC_IN_FLIGHT_MAX)),
            handler: Arc::new(handler),
        };
        tokio::spawn(reader.run(read));
        Peer {
            out,
            pending,
            next_id: Arc::default(),
            slots: Arc::new(Semaphore::new(RPC_IN_FLIGHT_MAX)),
        }
    }

    /// Calls a method and waits for its answer, at most `deadline`.
    pub async fn call<P, R>(
        &self,
        method: &str,
        params: &P,
        deadline: Duration,
    ) -> Result<R, CallError>
    where
        P: Serialize,
        R: DeserializeOwned,
    {
        let shape = |error| CallError::Shape { method: method.to_owned(), error };
        let closed = || CallError::Closed { method: method.to_owned() };
        let params = serde_json::to_value(params).map_err(shape)?;
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let work = async {
            let _slot = self.slots.acquire().await.map_err(|_| closed())?;
            let (answer, answered) = oneshot::channel();
            self.pending.insert(id, answer);
            self.out.send(Message::request(id, method, params)).await.map_err(|_| closed())?;
            answered
                .await
                .map_err(|_| closed())?
                .map_err(|error| CallError::Refused { method: method.to_owned(), error })
        };
        let outcome = tokio::time::timeout(deadline, work).await;
        self.pending.remove(id);
        let value =
            outcome.map_err(|_| CallError::Deadline { method: method.to_owned(), deadline })??;
        serde_json::from_value(value).map_err(shape)
    }

    /// Sends a notification.
    pub async fn notify<P: Serialize>(&self, method: &str, params: &P) -> Result<(), CallError> {
        let params = serde_json::to_value(params)
            .map_err(|error| CallError::Shape { method: method.to_owned(), error })?;
        self.out
            .send(Message::notification(method, params))
            .await
            .map_err(|_| CallError::Closed { method: method.to_owned() })
    }
}

struct Reader<H> {
    out: mpsc::WeakSender<Message>,
    pending: Pending,
    slots: Arc<Semaphore>,
    handler: Arc<H>,
}

impl<H: Handler> Reader<H> {
    async fn run<R: AsyncRead + Unpin>(self, mut read: R) {
        if let Err(error) = self.read_all(&mut read).await {
            tracing::debug!(%error, "the control stream failed");
        }
        self.pending.end();
    }

    async fn read_all<R: AsyncRead + Unpin>(&self, read: &mut R) -> io::Result<()> {
        while let Some(body) = read_frame(read).await? {
            let message = match values(&body) <= H::VALUES_MAX {
                true => serde_json::from_slice::<Message>(&body).ok(),
                false => None,
            };
            let Some(message) = message else {
                let error = RpcError::new(CODE_INVALID, "not a JSON-RPC 2.0 message");
                self.send(Message { id: None, ..Message::answer(0, Err(error)) });
                continue;
            };
            match message {
                Message { method: Some(method), id: None, params, .. } => {
                    self.handler.notification(method, params);
                }
                Message { method: Some(method), id: Some(id), params, .. } => {
                    self.serve(id, method, params);
                }
                Message { id: Some(id), result, error, .. } => {
                    if let Some(asker) = self.pending.remove(id) {
                        let outcome = match error {
                            Some(error) => Err(error),
                            None => Ok(result.unwrap_or(Value::Null)),
                        };
                        let _ = asker.send(outcome);
                    }
                }
                Message { id: None, .. } => {}
            }
        }
        Ok(())
    }

    fn serve(&self, id: u64, method: String, params: Value) {
        let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
            let error = RpcError::new(
                CODE_RATE,
                format!("{RPC_IN_FLIGHT_MAX} requests are in flight; wait for an answer"),
            );
            self.send(Message::answer(id, Err(error)));
            return;
        };
        let (handler, out) = (Arc::clone(&self.handler), self.out.clone());
        tokio::spawn(async move {
            let outcome = handler.request(method, params).await;
            if let Some(out) = out.upgrade() {
                let _ = out.send(Message::answer(id, outcome)).await;
            }
            drop(slot);
        });
    }

    /// Best effort: an answer that says "too many" must not itself wait for room.
    fn send(&self, message: Message) {
        if let Some(out) = self.out.upgrade() {
            let _ = out.try_send(message);
        }
    }
}

/// A handler for a side that is never called.
pub struct NoCalls;

impl Handler for NoCalls {
    async fn request(&self, method: String, _: Value) -> Result<Value, RpcError> {
        Err(RpcError::new(CODE_INTERNAL, format!("{method} is not served here")))
    }

    fn notification(&self, _: String, _: Value) {}
}
