//! Commands beside the primary process, and the primary process's own output.

use std::io;

use aegis_wire::bounds::OUTPUT_CHUNK_MAX;
use aegis_wire::channel::output::{self, Kind};
use aegis_wire::channel::rpc::RpcError;
use aegis_wire::channel::{ExecStart, ProcessExit, StreamHead};
use aegis_wire::logs::{ExecDone, ExecStarted, Source};
use aegis_wire::pipe::mux::Stream;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::sync::watch;

use crate::lines;
use crate::logs::{self, Log, Output, Recorder};
use crate::relay::{self, Relay, Session};

/// Longest reason of a machine's own that is told, bytes: the last line is a short one, also when
/// every byte of it must be escaped.
const REASON_MAX: usize = 512;

/// Whoever wants to see an exec's output, as long as they want.
pub struct Asker<W>(Option<W>);

impl<W: AsyncWrite + Unpin> Asker<W> {
    /// Somebody who listens.
    pub fn new(to: W) -> Asker<W> {
        Asker(Some(to))
    }

    /// Sends; who is gone is forgotten. Who is slow is waited for: the machine waits too.
    async fn send(&mut self, bytes: &[u8]) {
        if let Some(to) = &mut self.0
            && !bytes.is_empty()
            && (to.write_all(bytes).await.is_err() || to.flush().await.is_err())
        {
            self.0 = None;
        }
    }
}

/// Runs a command to its end, whether or not the asker stays; `stdin` is all that it reads. `Err` when
/// it was not begun: then nothing was sent.
pub async fn run<W: AsyncWrite + Unpin>(
    session: &Session,
    log: &Log,
    mut asker: Asker<W>,
    exec_id: String,
    start: ExecStart,
    stdin: &[u8],
) -> io::Result<()> {
    let stream = relay::open_stream(&session.mux, &StreamHead::Exec(start), &[]).await?;
    let (from_inside, to_inside) = tokio::io::split(stream);
    let started = ExecStarted { exec_id: exec_id.clone(), started_at: logs::now() };
    asker.send(&lines::line(&started)?).await;
    let mut recorder = Recorder::new(log.instance_id(), Source::Exec, Some(exec_id.clone()));
    let mut done = ExecDone { exec_id, exit_code: None, done: true, error: None };
    let fed = async {
        // It needs not read any of it.
        let _ = feed(to_inside, stdin).await;
        std::future::pending().await
    };
    let ended = tokio::select! {
        ended = pass_on(from_inside, &mut recorder, log, &mut asker) => ended,
        ended = fed => ended,
    };
    match ended {
        Ok(Some(Ok(exit))) => {
            done.exit_code = Some(exit.code);
            done.error = exit.timed_out.then(|| "its deadline ended it".to_owned());
        }
        Ok(Some(Err(mut error))) => {
            error.message.truncate(error.message.floor_char_boundary(REASON_MAX));
            done.error = Some(error.message);
        }
        Ok(None) | Err(_) => done.error = Some("its machine ended first".to_owned()),
    }
    asker.send(&lines::line(&done)?).await;
    Ok(())
}

/// All that a command reads, and the end of it.
async fn feed<W: AsyncWrite + Unpin>(mut to: W, stdin: &[u8]) -> io::Result<()> {
    for piece in stdin.chunks(OUTPUT_CHUNK_MAX) {
        to.write_all(&output::header(Kind::Stdin, piece.len())).await?;
        to.write_all(piece).await?;
    }
    to.write_all(&output::header(Kind::StdinEnd, 0)).await?;
    to.flush().await
}

/// Passes the primary process's output on to the log, over however many sessions it takes.
/// `drained` becomes true at the end of the output.
pub async fn primary(first: Stream, relay: Relay, log: &Log, drained: watch::Sender<bool>) {
    let mut recorder = Recorder::new(log.instance_id(), Source::Server, None);
    let mut stream = first;
    let mut sessions = relay.session.clone();
    loop {
        let mut nobody = Asker::<tokio::io::Sink>(None);
        let ended = pass_on(stream, &mut recorder, log, &mut nobody).await;
        if let Ok(Some(_)) = ended {
            drained.send_replace(true);
            return;
        }
        // The session was lost, or the machine closed the stream without a last frame.
        if sessions.changed().await.is_err() {
            return;
        }
        let Ok(session) = relay.session().await else { return };
        sessions.mark_unchanged();
        let Ok(next) = relay::open_stream(&session.mux, &StreamHead::Logs, &[]).await else {
            return;
        };
        stream = next;
    }
}

/// Frames of one stream → entries → log and asker. Gives how the process ended, or `None` when the
/// stream ended without a word about that.
async fn pass_on<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    stream: R,
    recorder: &mut Recorder,
    log: &Log,
    asker: &mut Asker<W>,
) -> io::Result<Option<Result<ProcessExit, RpcError>>> {
    let mut stream = BufReader::new(stream);
    let mut buffer = Vec::new();
    let mut end = None;
    while let Some(frame) = logs::read_output(&mut stream, &mut buffer).await? {
        match frame {
            Output::Bytes(which, mut bytes) => {
                while !bytes.is_empty() {
                    let batch = recorder.batch(which, &mut bytes)?;
                    log.append(&batch).await;
                    asker.send(&batch).await;
                }
            }
            Output::End(Kind::Exit, json) => {
                end = Some(Ok(serde_json::from_slice(json)?));
                break;
            }
            Output::End(_, json) => {
                end = Some(Err(serde_json::from_slice(json)?));
                break;
            }
        }
    }
    let rest = recorder.rest()?;
    log.append(&rest).await;
    asker.send(&rest).await;
    Ok(end)
}
