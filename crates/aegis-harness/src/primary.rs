//! The primary process: started once, its output goes to whatever logs stream there is.

use std::sync::Arc;

use aegis_wire::channel::ProcessExit;
use aegis_wire::channel::output::Kind;
use aegis_wire::channel::rpc::RpcError;
use aegis_wire::pipe::mux::Stream;
use rustix::process::Pid;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::{mpsc, oneshot};

use crate::machine::Machine;
use crate::output::{self, Sink, last_frame};
use crate::process::Wish;

/// Starts it; `streams` are the logs streams that the host opens, one per session.
pub async fn start(
    machine: &Arc<Machine>,
    wish: &Wish,
    streams: mpsc::Receiver<Stream>,
) -> Result<Pid, (RpcError, mpsc::Receiver<Stream>)> {
    let (child, pipes) = match machine.starter.start(wish, false).await {
        Ok(started) => started,
        Err(unable) => return Err((unable.answer(), streams)),
    };
    let pid = child.pid;
    let (_, outputs) = output::split(pipes);
    let (alive, exited) = (machine.primary_alive.clone(), machine.primary_exit.clone());
    alive.send_replace(true);
    let (tell, mut exit) = oneshot::channel();
    tokio::spawn(async move {
        if let Ok(exit) = child.exit.await {
            alive.send_replace(false);
            let _ = tell.send(exit);
        }
    });
    tokio::spawn(async move {
        let mut host = Host { stream: None, streams };
        let exit = output::pump(outputs, &mut exit, &mut host).await;
        let exit = exit.unwrap_or(ProcessExit { code: -1, signal: None, timed_out: false });
        host.send(&last_frame(Kind::Exit, &exit)).await;
        if let Some(stream) = &mut host.stream {
            let _ = stream.shutdown().await;
        }
        // Only now: whoever hears of the exit has been sent all output.
        exited.send_replace(Some(exit));
        // A later session's logs stream has nothing to tell but the end.
        while let Some(mut stream) = host.streams.recv().await {
            let _ = stream.write_all(&last_frame(Kind::Exit, &exit)).await;
            let _ = stream.shutdown().await;
        }
    });
    Ok(pid)
}

/// The host's newest logs stream. While there is none, output waits in the pipes of the process,
/// and so does the process; what a lost session had already taken is not sent again.
struct Host {
    stream: Option<Stream>,
    streams: mpsc::Receiver<Stream>,
}

impl Sink for Host {
    async fn send(&mut self, frame: &[u8]) {
        loop {
            while let Ok(newer) = self.streams.try_recv() {
                self.stream = Some(newer);
            }
            if self.stream.is_none() {
                self.stream = self.streams.recv().await;
            }
            let Some(stream) = &mut self.stream else { return };
            if stream.write_all(frame).await.is_ok() && stream.flush().await.is_ok() {
                return;
            }
            self.stream = None;
        }
    }
}
