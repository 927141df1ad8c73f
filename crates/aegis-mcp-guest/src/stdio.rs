//! Answers what came before the end of input, however long that takes: the end is told on only
//! when nothing is open.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rmcp::model::{ClientNotification, JsonRpcMessage, RequestId};
use rmcp::service::{RoleServer, RxJsonRpcMessage, TxJsonRpcMessage};
use rmcp::transport::Transport;
use tokio::sync::Notify;

#[derive(Default)]
struct Open {
    requests: Mutex<HashSet<RequestId>>,
    closed_one: Notify,
}

impl Open {
    fn requests(&self) -> MutexGuard<'_, HashSet<RequestId>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, id: &RequestId) {
        self.requests().remove(id);
        self.closed_one.notify_one();
    }
}

/// A transport whose end waits for the answers.
pub struct Answering<T> {
    inner: T,
    open: Arc<Open>,
    ended: bool,
}

impl<T> Answering<T> {
    /// Around another.
    pub fn new(inner: T) -> Answering<T> {
        Answering { inner, open: Arc::default(), ended: false }
    }
}

impl<T: Transport<RoleServer>> Transport<RoleServer> for Answering<T> {
    type Error = T::Error;

    fn send(
        &mut self,
        message: TxJsonRpcMessage<RoleServer>,
    ) -> impl Future<Output = Result<(), T::Error>> + Send + 'static {
        let answered = match &message {
            JsonRpcMessage::Response(response) => Some(response.id.clone()),
            JsonRpcMessage::Error(error) => error.id.clone(),
            _ => None,
        };
        let (sending, open) = (self.inner.send(message), self.open.clone());
        async move {
            let sent = sending.await;
            if let Some(id) = answered {
                open.close(&id);
            }
            sent
        }
    }

    // May be dropped while it waits, as the inner one's.
    async fn receive(&mut self) -> Option<RxJsonRpcMessage<RoleServer>> {
        if !self.ended {
            let message = self.inner.receive().await;
            match &message {
                Some(JsonRpcMessage::Request(request)) => {
                    self.open.requests().insert(request.id.clone());
                }
                Some(JsonRpcMessage::Notification(told)) => {
                    // A cancelled request gets no answer.
                    if let ClientNotification::CancelledNotification(cancelled) = &told.notification
                        && let Some(id) = &cancelled.params.request_id
                    {
                        self.open.close(id);
                    }
                }
                _ => {}
            }
            if message.is_some() {
                return message;
            }
            self.ended = true;
        }
        while !self.open.requests().is_empty() {
            self.open.closed_one.notified().await;
        }
        None
    }

    async fn close(&mut self) -> Result<(), T::Error> {
        self.inner.close().await
    }
}
