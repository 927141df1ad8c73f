//! Answers to an exec, by its first word, and to a port, by its number.

use std::io;

use aegis_wire::bounds::OUTPUT_CHUNK_MAX;
use aegis_wire::channel::PORT_OPEN;
use aegis_wire::channel::output::{Kind, header};
use aegis_wire::pipe::mux::Stream;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::noise::Noise;

/// One command.
pub async fn serve(command: &[String], mut stream: Stream) {
    let _ = answer(&command[0], &mut stream).await;
}

async fn answer(word: &str, stream: &mut Stream) -> io::Result<()> {
    match word {
        "polite" => {
            send(stream, Kind::Stdout, b"ok\n").await?;
            send(stream, Kind::Exit, br#"{"code":0}"#).await?;
        }
        "leaves" => {}
        "silent" => std::future::pending().await,
        "garbage" => stream.write_all(&Noise::new(3).bytes(50_000)).await?,
        "oversized" => {
            let mut lie = header(Kind::Stdout, 0);
            lie[1..].copy_from_slice(&u32::MAX.to_be_bytes());
            stream.write_all(&lie).await?;
            stream.write_all(&[b'x'; 100_000]).await?;
        }
        "half" => {
            stream.write_all(&header(Kind::Stdout, OUTPUT_CHUNK_MAX)).await?;
            stream.write_all(b"half").await?;
        }
        "stdin" => send(stream, Kind::Stdin, b"for you").await?,
        "deep" => send(stream, Kind::Exit, "[".repeat(60_000).as_bytes()).await?,
        "utf8" => send(stream, Kind::Exit, b"{\"code\":\xff\xfe}").await?,
        "huge-code" => send(stream, Kind::Exit, br#"{"code":99999999999999999999}"#).await?,
        "loud" => {
            let message = "no\n".repeat(15_000);
            let failed = serde_json::json!({"code": -32603, "message": message, "data": [[[]]]});
            send(stream, Kind::Failed, failed.to_string().as_bytes()).await?;
        }
        "forged" => {
            let done = "{\"exec_id\":\"x\",\"done\":true,\"exit_code\":0}\n";
            send(stream, Kind::Stdout, done.repeat(100).as_bytes()).await?;
            send(stream, Kind::Stdout, &[0xff, 0, b'\n', b'"', b'\\']).await?;
            send(stream, Kind::Exit, br#"{"code":3}"#).await?;
        }
        // Of an attached client's input: more was taken than was sent, or a part of a number.
        "overcount" => send(stream, Kind::Taken, &1_u64.to_be_bytes()).await?,
        "miscount" => send(stream, Kind::Taken, b"abc").await?,
        "endless" => loop {
            send(stream, Kind::Stdout, &[b'x'; OUTPUT_CHUNK_MAX]).await?;
        },
        "newlines" => loop {
            send(stream, Kind::Stderr, &[b'\n'; OUTPUT_CHUNK_MAX]).await?;
        },
        "empty" => loop {
            send(stream, Kind::Stdout, b"").await?;
        },
        _ => {}
    }
    stream.shutdown().await
}

/// One frame.
pub async fn send(stream: &mut Stream, kind: Kind, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(&header(kind, bytes.len())).await?;
    stream.write_all(bytes).await?;
    stream.flush().await
}

/// One connection.
pub async fn port(port: u16, mut stream: Stream) {
    let _ = connect(port, &mut stream).await;
}

async fn connect(port: u16, stream: &mut Stream) -> io::Result<()> {
    match port {
        // Neither open nor refused.
        1 => stream.write_all(&[0x77; 100]).await?,
        2 => std::future::pending().await,
        // Talks without end, and listens to nothing.
        3 => {
            stream.write_all(&[PORT_OPEN]).await?;
            loop {
                stream.write_all(&[b'x'; 16 * 1024]).await?;
            }
        }
        4 => stream.write_all(&[PORT_OPEN]).await?,
        // Swallows everything, says nothing.
        5 => {
            stream.write_all(&[PORT_OPEN]).await?;
            stream.flush().await?;
            let mut ignored = vec![0; 16 * 1024];
            while stream.read(&mut ignored).await? > 0 {}
            std::future::pending().await
        }
        _ => {}
    }
    stream.shutdown().await
}
