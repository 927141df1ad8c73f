//! Bytes to and from a TCP port inside, each direction closing on its own.

use std::io;

use aegis_wire::bounds::RPC_DEADLINE;
use aegis_wire::channel::rpc::{CODE_NOT_FOUND, RpcError};
use aegis_wire::channel::{PORT_OPEN, StreamHead};
use aegis_wire::worker::Reply;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};

use crate::lines;
use crate::relay::{self, Session};

/// Copied at a time and direction, bytes.
const COPY: usize = 32 * 1024;

/// Connects an asker with a port. `Err` when nothing was said to the asker yet.
pub async fn run<S>(session: &Session, asker: &mut S, port: u16) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let connect = async {
        let head = StreamHead::Port { port };
        let mut inside = relay::open_stream(&session.mux, &head, &[]).await?;
        let answer = inside.read_u8().await?;
        io::Result::Ok((inside, answer))
    };
    let (mut inside, answer) = tokio::time::timeout(RPC_DEADLINE, connect)
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "nothing inside answered"))??;
    if answer != PORT_OPEN {
        let error = RpcError::new(CODE_NOT_FOUND, format!("nothing accepts on port {port} inside"));
        return lines::write(asker, &Reply::error(error)).await;
    }
    lines::write(asker, &Reply::ok()).await?;
    // Either side may leave in any way; that is the other's end, not an error of ours.
    let _ = tokio::io::copy_bidirectional_with_sizes(asker, &mut inside, COPY, COPY).await;
    Ok(())
}
