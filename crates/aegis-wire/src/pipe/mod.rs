//! The byte pipe as a set of streams: epoch sessions ([`session`]), yamux over one session
//! ([`mux`]), JSON-RPC on its control stream ([`peer`]). Both ends of the channel share this code.

pub mod mux;
pub mod peer;
pub mod session;
#[cfg(test)]
mod tests;

use std::io;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::bounds::RPC_MESSAGE_MAX;

/// Writes one length-prefixed JSON message (`u32` big-endian, at most [`RPC_MESSAGE_MAX`] bytes).
pub async fn write_message<W, T>(to: &mut W, message: &T) -> io::Result<()>
where
    W: AsyncWrite + Unpin,
    T: Serialize,
{
    let body = serde_json::to_vec(message).map_err(io::Error::other)?;
    if body.len() > RPC_MESSAGE_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a message of {} bytes; at most {RPC_MESSAGE_MAX} pass", body.len()),
        ));
    }
    let mut bytes = Vec::with_capacity(4 + body.len());
    bytes.extend_from_slice(&(body.len() as u32).to_be_bytes());
    bytes.extend_from_slice(&body);
    to.write_all(&bytes).await?;
    to.flush().await
}

/// Reads one length-prefixed JSON message; `None` at a clean end of the stream. A message that is
/// too long or not of type `T` is an error of kind `InvalidData`.
pub async fn read_message<R, T>(from: &mut R) -> io::Result<Option<T>>
where
    R: AsyncRead + Unpin,
    T: DeserializeOwned,
{
    let Some(body) = read_frame(from).await? else { return Ok(None) };
    serde_json::from_slice(&body)
        .map(Some)
        .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("not a message: {e}")))
}

/// Reads one length-prefixed body; `None` at a clean end of the stream.
pub async fn read_frame<R: AsyncRead + Unpin>(from: &mut R) -> io::Result<Option<Vec<u8>>> {
    let mut len = [0; 4];
    match from.read_exact(&mut len).await {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    }
    let len = u32::from_be_bytes(len) as usize;
    if len > RPC_MESSAGE_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a message of {len} bytes; at most {RPC_MESSAGE_MAX} pass"),
        ));
    }
    // Grow with what really arrives, not with what was claimed.
    let mut body = Vec::with_capacity(len.min(8 * 1024));
    (&mut *from).take(len as u64).read_to_end(&mut body).await?;
    if body.len() < len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(body))
}
