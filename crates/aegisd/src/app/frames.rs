//! Frames of a machine's streams, as its worker passes them on: nothing of them is believed but
//! their bounds.

use std::io;

use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::channel::output::{HEADER_LEN, Kind, header, parse_header};
use aegis_wire::channel::rpc::{CODE_CONFLICT, CODE_NOT_FOUND, CODE_UNAVAILABLE, RpcError};
use aegis_wire::words::InstanceId;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::Error;
use crate::lifecycle::{Connection, WorkerError};

/// A connection to a machine's stream; `None` where the machine does not run at this instant.
pub fn connected(
    id: &InstanceId,
    done: Result<Connection, WorkerError>,
) -> Result<Option<Connection>, Error> {
    match done {
        Ok(connection) => Ok(Some(connection)),
        Err(WorkerError::Refused(e)) if e.code == CODE_CONFLICT => Ok(None),
        Err(WorkerError::Refused(e)) => Err(refused(e)),
        Err(WorkerError::Gone(_)) => {
            let message = format!("the machine of {id} ended");
            Err(Refusal::new(Code::InstanceState, message).into())
        }
        Err(error) => Err(error.into()),
    }
}

/// What a worker's refusal means to who asked.
pub fn refused(error: RpcError) -> Error {
    match error.code {
        CODE_CONFLICT => Refusal::new(Code::InstanceState, error.message).into(),
        CODE_NOT_FOUND => Refusal::new(Code::InvalidField, error.message).into(),
        CODE_UNAVAILABLE => Refusal::new(Code::NoCapacity, error.message).into(),
        _ => Error::Machine(error.message),
    }
}

/// The next frame.
pub async fn read<R: AsyncRead + Unpin>(from: &mut R) -> io::Result<(Kind, Vec<u8>)> {
    let mut head = [0; HEADER_LEN];
    from.read_exact(&mut head).await?;
    let (kind, len) = parse_header(head).map_err(io::Error::other)?;
    let mut bytes = vec![0; len];
    from.read_exact(&mut bytes).await?;
    Ok((kind, bytes))
}

/// One frame.
pub async fn write<W: AsyncWrite + Unpin>(to: &mut W, kind: Kind, bytes: &[u8]) -> io::Result<()> {
    to.write_all(&header(kind, bytes.len())).await?;
    to.write_all(bytes).await?;
    to.flush().await
}
