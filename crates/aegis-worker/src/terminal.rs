//! Commands at a terminal: output frames both ways, as they come. Nothing of them is logged: what a
//! terminal shows are no lines.

use std::io;

use aegis_wire::bounds::RPC_DEADLINE;
use aegis_wire::channel::{ExecStart, StreamHead};
use aegis_wire::worker::Reply;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};

use crate::lines;
use crate::relay::{self, Session};

/// Connects an asker with a command, until either has ended. `Err` when nothing was said to the
/// asker yet.
pub async fn run<S>(session: &Session, asker: &mut S, start: ExecStart) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let head = StreamHead::Exec(start);
    let inside = tokio::time::timeout(RPC_DEADLINE, relay::open_stream(&session.mux, &head, &[]))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "nothing inside answered"))??;
    lines::write(asker, &Reply::ok()).await?;
    let (mut from_inside, mut to_inside) = tokio::io::split(inside);
    let (mut from_asker, mut to_asker) = tokio::io::split(asker);
    // The end of one direction is that of the whole: a command has ended, or is hung up.
    tokio::select! {
        _ = tokio::io::copy(&mut from_inside, &mut to_asker) => {}
        _ = tokio::io::copy(&mut from_asker, &mut to_inside) => {}
    }
    let _ = tokio::time::timeout(RPC_DEADLINE, to_inside.shutdown()).await;
    Ok(())
}
