//! One machine's connection: bounded lines in, answers out, in any order.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use aegis_wire::bounds::RPC_IN_FLIGHT_MAX;
use aegis_wire::channel::rpc::RpcError;
use aegis_wire::words::InstanceId;
use aegis_wire::worker::{BrokerAnswer, Brokered};
use serde_json::Value;
use tokio::io::{AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::sync::{Semaphore, mpsc};
use tracing::Instrument as _;

use super::bulk::Bulk;
use super::call;
use super::rates::Rates;
use crate::app::App;
use crate::lifecycle::{self, Connection, WorkerError};

/// Between two tries to reach a worker that is there but does not serve.
const RETRY: Duration = Duration::from_millis(500);
/// A worker takes an answer within this, or its connection is given up.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);
/// Streams of answers that one machine has at a time.
const BULKS_MAX: usize = 16;

/// What a machine has in common over its connections.
pub(super) struct Machine {
    /// Who asks, as its connection says.
    pub(super) id: InstanceId,
    /// How much it asked.
    pub(super) rates: Rates,
    /// Room for streams of answers.
    pub(super) bulks: Arc<Semaphore>,
}

/// What a call brought.
pub(super) struct Outcome {
    /// The answer.
    pub(super) answer: Result<Value, RpcError>,
    /// What follows it on a stream of its own.
    pub(super) bulk: Option<Bulk>,
}

/// Serves a machine until its worker is gone.
pub(super) async fn serve(app: App, id: InstanceId) {
    let machine =
        Arc::new(Machine { id, rates: Rates::new(), bulks: Arc::new(Semaphore::new(BULKS_MAX)) });
    loop {
        match lifecycle::serve_calls(&app.ctx, &machine.id).await {
            Ok(connection) => converse(&app, &machine, connection).await,
            // Nobody listens: the machine's worker has ended. Whatever else fails may pass.
            Err(WorkerError::Gone(e))
                if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) =>
            {
                return;
            }
            Err(error) => {
                tracing::warn!(%error, "the machine's calls are not served");
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn converse(app: &App, machine: &Arc<Machine>, connection: Connection) {
    let (read, write) = tokio::io::split(connection);
    let mut lines = BufReader::new(read);
    let (answers, queue) = mpsc::channel(RPC_IN_FLIGHT_MAX);
    let slots = Arc::new(Semaphore::new(RPC_IN_FLIGHT_MAX));
    let mut writer = tokio::spawn(write_all(write, queue));
    loop {
        // Before the next line is read: a worker that asks too much waits.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { break };
        let call = tokio::select! {
            line = lifecycle::read_line::<_, Brokered>(&mut lines) => match line {
                Ok(Some(call)) => call,
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "a line that is no call");
                    break;
                }
            },
            _ = &mut writer => break,
        };
        let (app, machine, answers) = (app.clone(), Arc::clone(machine), answers.clone());
        // Not ended with the connection: what a call has begun it does whole.
        let span = tracing::error_span!("call", call = call.id, method = call::name(&call.method));
        let answered = async move {
            let id = call.id;
            let outcome = call::answer(&app, &machine, &call.method, call.params).await;
            tracing::debug!(code = outcome.answer.as_ref().err().map(|e| e.code), "answered");
            let (result, error) = match outcome.answer {
                Ok(value) => (Some(value), None),
                Err(error) => (None, Some(error)),
            };
            let sent = answers.send(BrokerAnswer { id, result, error }).await;
            drop(slot);
            if let (Ok(()), Some(bulk)) = (sent, outcome.bulk) {
                bulk.pour().await;
            }
        };
        tokio::spawn(answered.instrument(span));
    }
    writer.abort();
}

async fn write_all<W>(mut to: W, mut queue: mpsc::Receiver<BrokerAnswer>)
where
    W: AsyncWrite + Unpin,
{
    while let Some(answer) = queue.recv().await {
        let Ok(mut line) = serde_json::to_vec(&answer) else { return };
        line.push(b'\n');
        match tokio::time::timeout(WRITE_DEADLINE, to.write_all(&line)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}
