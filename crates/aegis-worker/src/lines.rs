//! One JSON value per line, never longer than agreed.

use std::io;

use serde::Serialize;
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Reads one line of at most `max` bytes, without its newline; `None` at the end of the stream.
pub async fn read<R: AsyncBufRead + Unpin>(
    from: &mut R,
    max: usize,
) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    loop {
        let available = from.fill_buf().await?;
        if available.is_empty() {
            return Ok(None);
        }
        let (taken, whole) = match available.iter().position(|b| *b == b'\n') {
            Some(at) => (at, true),
            None => (available.len(), false),
        };
        if line.len() + taken > max {
            let text = format!("a line of more than {max} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        line.extend_from_slice(&available[..taken]);
        from.consume(taken + usize::from(whole));
        if whole {
            return Ok(Some(line));
        }
    }
}

/// Writes a value as one line, in one write.
pub async fn write<W: AsyncWrite + Unpin, T: Serialize>(to: &mut W, value: &T) -> io::Result<()> {
    to.write_all(&line(value)?).await?;
    to.flush().await
}

/// A value as one line.
pub fn line<T: Serialize>(value: &T) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value).map_err(io::Error::other)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_bounded() {
        let mut from = &b"{\"a\":1}\nrest"[..];
        assert_eq!(read(&mut from, 7).await.unwrap().unwrap(), b"{\"a\":1}");
        assert!(read(&mut from, 100).await.unwrap().is_none(), "an unfinished line is none");
        let mut from = &b"12345678\n"[..];
        assert!(read(&mut from, 7).await.is_err());
    }
}
