//! The host's side of the machine: one session after the other over the control port.

use std::io;
use std::sync::Arc;

use aegis_wire::channel::{StreamHead, method};
use aegis_wire::pipe::mux::{self, Mux, Stream};
use aegis_wire::pipe::peer::Peer;
use aegis_wire::pipe::read_message;
use aegis_wire::pipe::session::{Ended, Pipe, SESSION_BUFFER};
use tokio::sync::mpsc;

use crate::calls::Calls;
use crate::machine::Machine;
use crate::pipe::Port;
use crate::{attached, exec, files, ports, terminal};

/// Serves the host for ever; only a port that is gone ends it.
pub async fn serve(machine: Arc<Machine>, port: Port) -> io::Result<()> {
    let mut pipe = Pipe::new(port);
    let mut next = pipe.accept().await?;
    while let Some(epoch) = next {
        let (app, ours) = tokio::io::duplex(SESSION_BUFFER);
        let (mux, streams) = mux::start(ours, false);
        tokio::spawn(session(Arc::clone(&machine), mux.clone(), streams));
        next = match pipe.serve(epoch, app).await? {
            Ended::NewEpoch(epoch) => Some(epoch),
            Ended::Bye => {
                mux.closed().await;
                pipe.acknowledge(epoch).await?;
                pipe.accept().await?
            }
            Ended::Closed => None,
        };
    }
    Ok(())
}

/// Serves the streams of one session. Nothing that it started ends with it.
async fn session(machine: Arc<Machine>, mux: Mux, mut streams: mpsc::Receiver<Stream>) {
    while let Some(stream) = streams.recv().await {
        tokio::spawn(one(Arc::clone(&machine), mux.clone(), stream));
    }
}

async fn one(machine: Arc<Machine>, mux: Mux, mut stream: Stream) {
    // What is no head, is no stream of ours.
    let Ok(Some(head)) = read_message(&mut stream).await else { return };
    match head {
        StreamHead::Control => control(machine, mux, stream).await,
        // More logs streams than sessions are none of ours.
        StreamHead::Logs => drop(machine.logs.try_send(stream)),
        StreamHead::Exec(mut start) => match start.tty.take() {
            None if start.attached => attached::serve(machine, stream, start).await,
            None => exec::serve(machine, stream, start).await,
            Some(tty) => {
                if let Some(term) = &tty.term {
                    let name = "TERM".to_owned();
                    start.env.entry(name).or_insert_with(|| term.as_str().to_owned());
                }
                terminal::serve(machine, stream, start, tty).await;
            }
        },
        StreamHead::Files(ask) => files::serve(machine, stream, ask).await,
        StreamHead::Port { port } => ports::serve(stream, port).await,
        StreamHead::Workspace(resume) => machine.workspace.arrived(stream, resume),
        StreamHead::Guest { ticket } => machine.guest.arrived(ticket, stream),
    }
}

/// Answers calls, and makes those of the machine, until the session ends; and tells of the primary
/// process's exit: in every session, as the one before may have been lost with the news.
async fn control(machine: Arc<Machine>, mux: Mux, stream: Stream) {
    let peer = Peer::start(stream, Calls(Arc::clone(&machine)));
    let _asked = machine.guest.session(peer.clone());
    let mut exit = machine.primary_exit.subscribe();
    let tell = async {
        if let Ok(exit) = exit.wait_for(Option::is_some).await.map(|exit| *exit) {
            let _ = peer.notify(method::PROCESS_EXITED, &exit).await;
        }
        std::future::pending::<()>().await
    };
    tokio::select! {
        () = tell => {}
        () = mux.closed() => {}
    }
}
