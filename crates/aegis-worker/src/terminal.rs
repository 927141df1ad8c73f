//! Commands at a terminal, and files: output frames both ways, as they come. Nothing of them is
//! logged: what a terminal shows are no lines, and what is in a file is nobody's business.

use std::io;

use aegis_wire::bounds::RPC_DEADLINE;
use aegis_wire::channel::StreamHead;
use aegis_wire::pipe::mux::Stream;
use aegis_wire::worker::Reply;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader};

use crate::lines;
use crate::relay::{self, Session};

/// Copied at a time and direction, bytes.
const COPY: usize = 32 * 1024;

/// Connects an asker with a command or a file, until either has ended. `Err` when nothing was said
/// to the asker yet.
pub async fn run<S>(session: &Session, asker: &mut S, head: StreamHead) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let inside = tokio::time::timeout(RPC_DEADLINE, relay::open_stream(&session.mux, &head, &[]))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "nothing inside answered"))??;
    lines::write(asker, &Reply::ok()).await?;
    carry(inside, asker).await;
    Ok(())
}

/// Carries both directions. The end of one is that of the whole: a command has ended, or is hung up.
pub async fn carry<S>(inside: Stream, asker: &mut S)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (from_inside, mut to_inside) = tokio::io::split(inside);
    let (from_asker, mut to_asker) = tokio::io::split(asker);
    let mut from_inside = BufReader::with_capacity(COPY, from_inside);
    let mut from_asker = BufReader::with_capacity(COPY, from_asker);
    tokio::select! {
        _ = tokio::io::copy_buf(&mut from_inside, &mut to_asker) => {}
        _ = tokio::io::copy_buf(&mut from_asker, &mut to_inside) => {}
    }
    let _ = tokio::time::timeout(RPC_DEADLINE, to_inside.shutdown()).await;
}
