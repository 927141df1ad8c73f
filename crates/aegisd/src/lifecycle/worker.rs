//! Speaking to `aegis-worker`: starting one, its socket, and its one-shot programs. Everything that
//! comes back is read with bounds.

use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use aegis_wire::bounds::{GOLDEN_DEADLINE, RPC_DEADLINE, WORKER_LINE_MAX};
use aegis_wire::channel::ExecStart;
use aegis_wire::channel::files::FileAsk;
use aegis_wire::channel::rpc::RpcError;
use aegis_wire::words::InstanceId;
use aegis_wire::worker::{Golden, GoldenReady, Probe, Reap, Reaped, Reply, Request, run_dir};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{
    AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader,
};
use tokio::net::UnixStream;

use crate::ctx::Ctx;
use crate::programs;

/// Largest output of a one-shot program.
const REPORT_MAX: u64 = 1024 * 1024;
/// A snapshot is made within this: a worker may wait for another one's, and try twice.
const GOLDEN_WAIT: Duration = Duration::from_secs(2 * GOLDEN_DEADLINE.as_secs() + 30);
/// What a reap may take beyond the deadline that it was given.
const REAP_MARGIN: Duration = Duration::from_secs(5);

/// Why a worker did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// No worker, or it went away.
    #[error("the machine's worker does not answer")]
    Gone(#[source] io::Error),
    /// It said no.
    #[error("{0}")]
    Refused(RpcError),
    /// It did not answer in time.
    #[error("the machine's worker did not answer within {}s", .0.as_secs_f32())]
    Deadline(Duration),
    /// It could not be started, or ended without a report.
    #[error("aegis-worker failed: {0}")]
    Program(String),
}

/// A connection to a worker.
pub type Connection = BufReader<UnixStream>;

/// Connects to a machine's worker and says one request.
pub(super) async fn say(
    ctx: &Ctx,
    id: &InstanceId,
    request: &Request,
) -> Result<Connection, WorkerError> {
    let socket = ctx.run_dir(id).join(run_dir::SOCKET);
    let stream = UnixStream::connect(&socket).await.map_err(WorkerError::Gone)?;
    let mut connection = BufReader::new(stream);
    say_more(&mut connection, request).await?;
    Ok(connection)
}

/// Says one more line on a connection.
pub(super) async fn say_more<T: Serialize>(
    connection: &mut Connection,
    what: &T,
) -> Result<(), WorkerError> {
    let mut line = serde_json::to_vec(what).map_err(|e| WorkerError::Gone(io::Error::other(e)))?;
    line.push(b'\n');
    connection.get_mut().write_all(&line).await.map_err(WorkerError::Gone)
}

/// Reads one line of at most [`WORKER_LINE_MAX`] bytes; `None` at the end.
pub async fn read_line<R, T>(from: &mut R) -> io::Result<Option<T>>
where
    R: AsyncBufRead + Unpin,
    T: DeserializeOwned,
{
    let Some(line) = read_raw(from).await? else { return Ok(None) };
    serde_json::from_slice(&line)
        .map(Some)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// The same line as it came, newline included.
pub async fn read_raw<R: AsyncBufRead + Unpin>(from: &mut R) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    from.take(WORKER_LINE_MAX as u64).read_until(b'\n', &mut line).await?;
    Ok((line.last() == Some(&b'\n')).then_some(line))
}

/// Says a request that is answered by one [`Reply`].
pub(super) async fn ask(
    ctx: &Ctx,
    id: &InstanceId,
    request: &Request,
    deadline: Duration,
) -> Result<Connection, WorkerError> {
    let work = async {
        let mut connection = say(ctx, id, request).await?;
        let reply: Option<Reply> = read_line(&mut connection).await.map_err(WorkerError::Gone)?;
        match reply {
            Some(Reply { ok: true, .. }) => Ok(connection),
            Some(Reply { error: Some(error), .. }) => Err(WorkerError::Refused(error)),
            _ => Err(WorkerError::Gone(io::ErrorKind::UnexpectedEof.into())),
        }
    };
    tokio::time::timeout(deadline, work).await.map_err(|_| WorkerError::Deadline(deadline))?
}

/// Runs a command in a machine, with all that it reads as base64; what follows on the connection is its NDJSON.
pub async fn exec(
    ctx: &Ctx,
    id: &InstanceId,
    exec_id: String,
    start: ExecStart,
    stdin: String,
) -> Result<Connection, WorkerError> {
    say(ctx, id, &Request::Exec { exec_id, start, stdin }).await
}

/// Runs a command to which its client stays attached; what follows on the connection are its frames.
pub async fn attach(
    ctx: &Ctx,
    id: &InstanceId,
    exec_id: String,
    start: ExecStart,
) -> Result<Connection, WorkerError> {
    ask(ctx, id, &Request::Attach { exec_id, start }, 2 * RPC_DEADLINE).await
}

/// Does something with a machine's files; what follows on the connection are its frames.
pub async fn files(ctx: &Ctx, id: &InstanceId, ask: FileAsk) -> Result<Connection, WorkerError> {
    self::ask(ctx, id, &Request::Files { ask }, 2 * RPC_DEADLINE).await
}

/// Opens a TCP port of a machine; what follows on the connection are its bytes.
pub(super) async fn open_port(
    ctx: &Ctx,
    id: &InstanceId,
    port: u16,
) -> Result<Connection, WorkerError> {
    ask(ctx, id, &Request::Port { port }, RPC_DEADLINE).await
}

/// Starts a worker in a fresh run directory, listening; the caller then connects and says launch.
pub(super) fn start(ctx: &Ctx, id: &InstanceId) -> io::Result<()> {
    let dir = ctx.run_dir(id);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
    std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(dir.join(run_dir::LOCK))?;
    let socket = dir.join(run_dir::SOCKET);
    // The listener is made here and inherited: there is no moment in which a started worker does
    // not listen, so nobody has to wait for it.
    let listener = std::os::unix::net::UnixListener::bind(&socket)?;
    let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join(run_dir::LOG))?;
    let mut child = programs::bare(&program(ctx));
    child
        .arg("machine")
        .arg(&dir)
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
        .stdout(Stdio::null())
        .stderr(Stdio::from(log))
        .kill_on_drop(false);
    // Dropped on purpose: the worker outlives this process; the runtime reaps it when it ends.
    drop(child.spawn()?);
    Ok(())
}

/// Removes what a machine had and reports what is proven gone.
pub(super) async fn reap(ctx: &Ctx, ask: &Reap) -> Result<Reaped, WorkerError> {
    let deadline = Duration::from_millis(ask.deadline_ms) + REAP_MARGIN;
    one_shot(&program(ctx), "reap", Some(ask), deadline).await
}

/// Makes sure of a golden snapshot. What was begun is made whole, also when nobody waits any more.
pub(super) async fn golden(ctx: &Ctx, ask: &Golden) -> Result<GoldenReady, WorkerError> {
    one_shot(&program(ctx), "golden", Some(ask), GOLDEN_WAIT).await
}

/// Asks what this host can do for machines.
pub async fn probe(program: &Path) -> Result<Probe, WorkerError> {
    one_shot::<(), Probe>(program, "probe", None, RPC_DEADLINE).await
}

fn program(ctx: &Ctx) -> std::path::PathBuf {
    ctx.config.machines.programs.join("aegis-worker")
}

async fn one_shot<I: Serialize, O: DeserializeOwned>(
    program: &Path,
    verb: &str,
    input: Option<&I>,
    deadline: Duration,
) -> Result<O, WorkerError> {
    let failed = |e: &dyn std::fmt::Display| WorkerError::Program(format!("{verb}: {e}"));
    let mut child = programs::piped(program)
        .arg(verb)
        .spawn()
        .map_err(|e| failed(&format!("{}: {e}", program.display())))?;
    let work = async {
        let stdin = child.stdin.take();
        if let (Some(input), Some(mut stdin)) = (input, stdin) {
            let bytes = serde_json::to_vec(input).map_err(|e| failed(&e))?;
            stdin.write_all(&bytes).await.map_err(|e| failed(&e))?;
        }
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let read = async {
            if let Some(stdout) = stdout {
                stdout.take(REPORT_MAX).read_to_end(&mut out).await?;
            }
            io::Result::Ok(())
        };
        let read_errors = async {
            if let Some(stderr) = stderr {
                stderr.take(REPORT_MAX).read_to_end(&mut err).await?;
            }
            io::Result::Ok(())
        };
        let (a, b) = tokio::join!(read, read_errors);
        a.and(b).map_err(|e| failed(&e))?;
        child.wait().await.map_err(|e| failed(&e))?;
        serde_json::from_slice(&out).map_err(|_| {
            let words = String::from_utf8_lossy(&err);
            failed(&words.lines().last().unwrap_or("it gave no report"))
        })
    };
    tokio::time::timeout(deadline, work).await.map_err(|_| WorkerError::Deadline(deadline))?
}
