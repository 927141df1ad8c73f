//! Commands in a machine: waiting until it runs, and the NDJSON that comes back.

use std::time::Duration;

use aegis_rules::instance::{InstanceState, Wanted};
use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::bounds::GUEST_CALL_DEADLINE;
use aegis_wire::channel::rpc::CODE_CONFLICT;
use aegis_wire::host::Exec;
use aegis_wire::logs::ExecDone;
use aegis_wire::words::InstanceId;
use aegis_wire::worker::Reply;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::UnixStream;

use super::{App, Error, frames, instance_not_found};
use crate::ctx::InUse;
use crate::keys;
use crate::ledger;
use crate::lifecycle;

/// A host's exec waits this long for a machine that is still starting.
pub(super) const HOST_WAIT: Duration = Duration::from_secs(120);
/// A machine's exec in its child waits this long: it is answered before it gives up.
pub(super) const CHILD_WAIT: Duration = Duration::from_secs(GUEST_CALL_DEADLINE.as_secs() - 10);

/// A command that was started; its NDJSON is read line by line.
pub struct Running {
    lines: BufReader<UnixStream>,
    first: Option<Vec<u8>>,
    exec_id: String,
    done: bool,
    /// A machine in which a command runs is no idle one.
    _in_use: InUse,
}

/// Runs a command in an instance that was asked to run; waits for a starting machine and for one
/// that wakes.
pub(super) async fn run(
    app: &App,
    id: &InstanceId,
    ask: Exec,
    wait: Duration,
) -> Result<Running, Error> {
    once_running(app, id, wait, || attempt(app, id, ask.clone())).await
}

/// `None` where the machine does not run at this instant.
async fn attempt(app: &App, id: &InstanceId, ask: Exec) -> Result<Option<Running>, Error> {
    let exec_id = keys::uuid()?;
    let mut lines = lifecycle::exec(&app.ctx, id, exec_id.clone(), ask.start, ask.stdin).await?;
    if still_frozen(&mut lines).await? {
        return Ok(None);
    }
    Running::new(InUse::begin(&app.ctx, id), id, exec_id, lines).await.map(Some)
}

/// Attempts something once the machine of an instance that was asked to run runs, and again while
/// the attempt finds that it does not.
pub(super) async fn once_running<T, F: Future<Output = Result<Option<T>, Error>>>(
    app: &App,
    id: &InstanceId,
    wait: Duration,
    mut attempt: impl FnMut() -> F,
) -> Result<T, Error> {
    let mut commits = app.ctx.ledger.commits();
    let started = async {
        loop {
            let now = app.ctx.ledger.read(|f| f.instance(id))?.ok_or_else(instance_not_found)?;
            if now.wanted != Wanted::Running {
                let ended =
                    now.exit.map(|e| e.message).unwrap_or_else(|| "it was stopped".to_owned());
                let message = format!("the machine ended before the command ran: {ended}");
                return Err(Error::Refused(Refusal::new(Code::InstanceState, message)));
            }
            // Asked while it was about to be frozen and then thawed: that is recorded soon.
            if now.state == InstanceState::Running
                && let Some(done) = attempt().await?
            {
                return Ok(done);
            }
            if commits.changed().await.is_err() {
                return Err(ledger::Error::Closed.into());
            }
        }
    };
    tokio::time::timeout(wait, started).await.map_err(|_| {
        let message = format!("the machine did not run within {}s", wait.as_secs());
        Error::Refused(Refusal::new(Code::InstanceState, message))
    })?
}

impl Running {
    /// Reads the first line: a worker that refuses says so there.
    async fn new(
        in_use: InUse,
        id: &InstanceId,
        exec_id: String,
        mut lines: BufReader<UnixStream>,
    ) -> Result<Running, Error> {
        let Some(first) = lifecycle::read_raw(&mut lines).await.ok().flatten() else {
            let message = format!("the machine of {id} ended");
            return Err(Refusal::new(Code::InstanceState, message).into());
        };
        if let Ok(Reply { error: Some(error), .. }) = serde_json::from_slice::<Reply>(&first) {
            return Err(frames::refused(error));
        }
        Ok(Running { lines, first: Some(first), exec_id, done: false, _in_use: in_use })
    }

    /// The next line, newline included; `None` after the last. A stream that breaks off ends with a
    /// last line that says so, so that no client waits for an exit code that never comes.
    pub async fn next_line(&mut self) -> Option<Vec<u8>> {
        if self.done {
            return None;
        }
        let line = match self.first.take() {
            Some(first) => Some(first),
            None => lifecycle::read_raw(&mut self.lines).await.ok().flatten(),
        };
        let line = line.unwrap_or_else(|| {
            let done = ExecDone {
                exec_id: self.exec_id.clone(),
                exit_code: None,
                done: true,
                error: Some("the machine ended before the command did".to_owned()),
            };
            let mut line = serde_json::to_vec(&done).unwrap_or_default();
            line.push(b'\n');
            line
        });
        self.done = is_done(&line);
        Some(line)
    }
}

fn is_done(line: &[u8]) -> bool {
    // Entries are many and long: only a line that begins as the last one is parsed.
    line.len() < 4096 && serde_json::from_slice::<ExecDone>(line).is_ok_and(|d| d.done)
}

/// Whether the worker refuses because its machine does not run at this instant. Nothing is taken
/// out of the stream.
async fn still_frozen(lines: &mut BufReader<UnixStream>) -> Result<bool, Error> {
    let begin = lines.fill_buf().await?;
    let reply = serde_json::from_slice::<Reply>(begin.trim_ascii_end());
    Ok(matches!(reply, Ok(Reply { error: Some(error), .. }) if error.code == CODE_CONFLICT))
}
