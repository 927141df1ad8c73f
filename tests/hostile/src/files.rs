//! Answers to questions about files, by their path.

use std::io;

use aegis_wire::bounds::OUTPUT_CHUNK_MAX;
use aegis_wire::channel::files::FileAsk;
use aegis_wire::channel::output::{Kind, header};
use aegis_wire::pipe::mux::Stream;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

use crate::exec::send;
use crate::noise::Noise;

/// One question.
pub async fn serve(ask: &FileAsk, mut stream: Stream) {
    let _ = answer(&ask.path().lossy(), &mut stream).await;
}

fn meta(size: u64) -> Value {
    json!({"kind": "file", "size": size, "mode": 0o644, "uid": 0, "gid": 0, "mtime_ms": 0})
}

/// An entry whose name is this (base64).
fn entry(name: &str) -> Vec<u8> {
    json!({"name": name, "meta": meta(1)}).to_string().into_bytes()
}

async fn agree(stream: &mut Stream, meta: Value) -> io::Result<()> {
    let answer = json!({"answer": "done", "meta": meta}).to_string();
    send(stream, Kind::Answer, answer.as_bytes()).await
}

async fn answer(path: &str, stream: &mut Stream) -> io::Result<()> {
    match path {
        "/garbage" => stream.write_all(&Noise::new(5).bytes(50_000)).await?,
        "/deep" => send(stream, Kind::Answer, "[".repeat(60_000).as_bytes()).await?,
        "/fault" => send(stream, Kind::Answer, br#"{"answer":"refused","fault":"<b>"}"#).await?,
        "/mode" => agree(stream, json!({"mode": 0o777_777})).await?,
        "/leaves" => {}
        // "../../evil", "a/b", "..", "", "a\0b"
        "/up" => named(stream, "Li4vLi4vZXZpbA==").await?,
        "/slash" => named(stream, "YS9i").await?,
        "/dots" => named(stream, "Li4=").await?,
        "/empty" => named(stream, "").await?,
        "/zero" => named(stream, "YQBi").await?,
        "/endless" => {
            agree(stream, Value::Null).await?;
            loop {
                send(stream, Kind::Data, &entry("YQ==")).await?;
            }
        }
        "/more" => {
            agree(stream, meta(10)).await?;
            send(stream, Kind::Data, &[b'x'; 1000]).await?;
            send(stream, Kind::DataEnd, b"").await?;
        }
        "/less" => {
            agree(stream, meta(1 << 40)).await?;
            send(stream, Kind::Data, &[b'x'; 1000]).await?;
            send(stream, Kind::DataEnd, b"").await?;
        }
        "/cut" => {
            agree(stream, meta(0)).await?;
            send(stream, Kind::Data, &[b'x'; 1000]).await?;
        }
        "/oversized" => {
            agree(stream, meta(10)).await?;
            let mut lie = header(Kind::Data, 0);
            lie[1..].copy_from_slice(&u32::MAX.to_be_bytes());
            stream.write_all(&lie).await?;
            stream.write_all(&[b'x'; OUTPUT_CHUNK_MAX]).await?;
        }
        // Agrees to everything, and takes nothing.
        "/deaf" => {
            agree(stream, Value::Null).await?;
            std::future::pending::<()>().await;
        }
        _ => {}
    }
    stream.shutdown().await
}

async fn named(stream: &mut Stream, name: &str) -> io::Result<()> {
    agree(stream, Value::Null).await?;
    send(stream, Kind::Data, &entry(name)).await?;
    send(stream, Kind::DataEnd, b"").await
}
