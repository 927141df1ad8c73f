//! The machine's own calls on their way to aegisd and back (contracts/aegis.md 5).
//!
//! ```text
//! machine ── guest.* ──▶ relay ──▶ Broker::call ── Brokered line ──▶ aegisd
//!                                       ▲───────── BrokerAnswer ─────────┘  (Request::Broker)
//! machine ◀── StreamHead::Guest ── pour ◀── the bulk of an answer ────────── (Request::GuestStream)
//!         ─── a child's file, as it is written ──▶
//! ```
//! Nothing of a call is believed or understood here. It is bounded: methods, size, number, time. So
//! a machine that floods is told to wait, and costs this process a fixed amount of memory.

mod book;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use aegis_wire::bounds::{
    BROKER_WAIT, GUEST_CALL_DEADLINE, GUEST_PARAMS_HELD_MAX, GUEST_PARAMS_MAX, RPC_DEADLINE,
    RPC_IN_FLIGHT_MAX, RPC_MESSAGE_MAX, TICKET_MAX, WORKER_LINE_MAX,
};
use aegis_wire::channel::StreamHead;
use aegis_wire::channel::guest::method;
use aegis_wire::channel::rpc::{
    CODE_INTERNAL, CODE_METHOD, CODE_PARAMS, CODE_RATE, CODE_UNAVAILABLE, RpcError,
};
use aegis_wire::worker::{BrokerAnswer, Brokered, Reply};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use crate::relay::{self, Session};
use crate::{lines, terminal};
use book::Book;

/// What an answer is wrapped in on its way to the machine, and a call on its way to aegisd, bytes.
const WRAP_MAX: usize = 1024;

type Outcome = Result<Value, RpcError>;

/// The calls of one machine.
pub struct Broker {
    book: Mutex<Book<oneshot::Sender<Outcome>>>,
    line: watch::Sender<Option<Line>>,
    calls: Semaphore,
    held: Semaphore,
}

/// A connection over which aegisd answers calls.
#[derive(Clone)]
struct Line {
    number: u64,
    out: mpsc::Sender<Vec<u8>>,
}

/// A call that is in the book, as long as somebody waits for its answer.
struct Open<'a> {
    broker: &'a Broker,
    id: u64,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.broker.book().close(self.id);
    }
}

impl Broker {
    /// Without a line, and without calls.
    pub fn new() -> Broker {
        Broker {
            book: Mutex::default(),
            line: watch::Sender::new(None),
            calls: Semaphore::new(RPC_IN_FLIGHT_MAX),
            held: Semaphore::new(GUEST_PARAMS_HELD_MAX),
        }
    }

    /// Asks aegisd in the machine's name.
    pub async fn call(&self, name: String, params: Value) -> Outcome {
        if !method::ALL.contains(&name.as_str()) {
            return Err(RpcError::new(CODE_METHOD, format!("{name:.40} is not served")));
        }
        let Ok(_slot) = self.calls.try_acquire() else {
            let text = format!("{RPC_IN_FLIGHT_MAX} calls of this machine are in flight");
            return Err(RpcError::new(CODE_RATE, text));
        };
        let id = self.book().draw();
        // As text it takes as much as it took to send; as values a multiple of that.
        let call = lines::line(&Brokered { id, method: name, params }).map_err(|e| fault(&e))?;
        if call.len() > GUEST_PARAMS_MAX + WRAP_MAX {
            let text = format!("a call's params have at most {GUEST_PARAMS_MAX} bytes");
            return Err(RpcError::new(CODE_PARAMS, text));
        }
        let bytes = u32::try_from(call.len()).unwrap_or(u32::MAX);
        let Ok(_held) = self.held.try_acquire_many(bytes) else {
            let text = "calls of this machine with large params are in flight";
            return Err(RpcError::new(CODE_RATE, text));
        };
        let handed = tokio::time::timeout(BROKER_WAIT, self.hand_over(id, call)).await;
        let Ok((answered, _open)) = handed else {
            let seconds = BROKER_WAIT.as_secs();
            return Err(unavailable(format!(
                "the host's daemon took no calls for {seconds}s; nothing was done: try again"
            )));
        };
        let unknown = |why: &str| {
            unavailable(format!(
                "{why}; what was asked for may have been done: look before you try again"
            ))
        };
        match tokio::time::timeout(GUEST_CALL_DEADLINE, answered).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(unknown("the host's daemon left before it answered")),
            Err(_) => {
                let seconds = GUEST_CALL_DEADLINE.as_secs();
                Err(unknown(&format!("the host's daemon did not answer within {seconds}s")))
            }
        }
    }

    /// Hands a call to the line of now, or to the next one. Dropped before it completes, the call
    /// was handed to nobody.
    async fn hand_over(&self, id: u64, call: Vec<u8>) -> (oneshot::Receiver<Outcome>, Open<'_>) {
        let mut lines = self.line.subscribe();
        let mut call = call;
        loop {
            // Never an error: the sender is ours.
            let line = lines.wait_for(Option::is_some).await.ok().and_then(|line| line.clone());
            let Some(Line { number, out }) = line else { continue };
            let (answer, answered) = oneshot::channel();
            let open = Open { broker: self, id };
            self.book().open(id, number, answer);
            match out.send(call).await {
                Ok(()) => return (answered, open),
                // That line has ended; who ended it takes it down.
                Err(mpsc::error::SendError(back)) => call = back,
            }
            drop(open);
            let _ = lines.changed().await;
        }
    }

    /// Lets `stream` answer calls, in the place of whoever did so before, until either side leaves,
    /// a later one comes, or `end` does.
    pub async fn serve<S>(&self, stream: S, end: impl Future<Output = ()>) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite,
    {
        let (mut read, mut write) = tokio::io::split(stream);
        lines::write(&mut write, &Reply::ok()).await?;
        let (out, queue) = mpsc::channel(RPC_IN_FLIGHT_MAX);
        let number = self.book().draw();
        let mut later = self.line.subscribe();
        self.line.send_replace(Some(Line { number, out }));
        let over = later.wait_for(|now| now.as_ref().is_none_or(|line| line.number != number));
        // All of these are gone before the calls are given up: what is in the queue then was
        // handed over, and what is not finds the queue closed.
        let ended = tokio::select! {
            sent = send(queue, &mut write) => sent,
            heard = self.hear(number, &mut read) => heard,
            _ = over => Ok(()),
            () = end => Ok(()),
        };
        self.line.send_if_modified(|now| {
            let mine = now.as_ref().is_some_and(|line| line.number == number);
            if mine {
                *now = None;
            }
            mine
        });
        self.book().lose(number);
        ended
    }

    /// Passes answers on, until aegisd leaves or says what is none.
    async fn hear<R: AsyncRead + Unpin>(&self, line: u64, read: &mut R) -> io::Result<()> {
        let mut read = BufReader::new(read);
        while let Some(text) = lines::read(&mut read, WORKER_LINE_MAX).await? {
            let BrokerAnswer { id, result, error } = serde_json::from_slice(&text)?;
            // Who asked may have left.
            let Some(asker) = self.book().answered(line, id) else { continue };
            let outcome = match error {
                // A message that is too long would cost the machine its channel.
                _ if text.len() > RPC_MESSAGE_MAX - WRAP_MAX => {
                    Err(RpcError::new(CODE_INTERNAL, "the answer is too long for the channel"))
                }
                Some(error) => Err(error),
                None => Ok(result.unwrap_or(Value::Null)),
            };
            let _ = asker.send(outcome);
        }
        Ok(())
    }

    fn book(&self) -> MutexGuard<'_, Book<oneshot::Sender<Outcome>>> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes calls, as fast as aegisd takes them.
async fn send<W>(mut queue: mpsc::Receiver<Vec<u8>>, write: &mut W) -> io::Result<()>
where
    W: AsyncWrite + Unpin,
{
    while let Some(call) = queue.recv().await {
        let written = async {
            write.write_all(&call).await?;
            write.flush().await
        };
        tokio::time::timeout(RPC_DEADLINE, written)
            .await
            .map_err(|_| io::ErrorKind::TimedOut)??;
    }
    Ok(())
}

/// Opens the stream of a ticket and connects it with the asker. `Err` when nothing was said to the
/// asker yet.
pub async fn pour<S>(session: &Session, asker: &mut S, ticket: String) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if ticket.len() > TICKET_MAX {
        let text = format!("a ticket has at most {TICKET_MAX} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let head = StreamHead::Guest { ticket };
    let opening = relay::open_stream(&session.mux, &head, &[]);
    let inside = tokio::time::timeout(RPC_DEADLINE, opening)
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "nothing inside answered"))??;
    lines::write(asker, &Reply::ok()).await?;
    terminal::carry(inside, asker, None).await;
    Ok(())
}

fn unavailable(text: String) -> RpcError {
    RpcError::new(CODE_UNAVAILABLE, text)
}

fn fault(error: &io::Error) -> RpcError {
    RpcError::new(CODE_INTERNAL, error.to_string())
}
