//! What a machine can do to its host with the port and the control stream, by the first word of its
//! command.

use std::sync::Arc;
use std::time::Duration;

use aegis_wire::bounds::{FRAME_PAYLOAD_MAX, OUTPUT_CHUNK_MAX, RPC_MESSAGE_MAX};
use aegis_wire::channel::frame::{self, Kind};
use aegis_wire::channel::rpc::Message;
use aegis_wire::channel::{guest, method, output};
use aegis_wire::pipe::mux::{Mux, Stream};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::control::Machine;
use crate::noise::{Noise, framed, swollen};
use crate::port::Port;

/// The good answers are on their way before the attack begins.
const CALM: Duration = Duration::from_millis(200);
/// Which attacks "everything" is made of, one after the other; the last ones never end. None of them
/// makes the host give the machine up.
const EVERYTHING: [&str; 5] = ["calls", "heavy", "frames", "streams", "oversized"];
/// How long each of them has before the next one joins in.
const SLICE: Duration = Duration::from_secs(2);
/// As good as for ever.
const LONG: Duration = Duration::from_secs(100_000);

/// Attacks until the session ends.
pub async fn control(
    machine: &Arc<Machine>,
    mode: &str,
    mux: &Mux,
    mut read: ReadHalf<Stream>,
    mut write: WriteHalf<Stream>,
) {
    if mode == "everything" {
        // Whoever redeemed it waits for a port: it "accepts", then all goes wrong.
        let mut len = [0; 4];
        if read.read_exact(&mut len).await.is_ok() {
            let mut body = vec![0; u32::from_be_bytes(len) as usize];
            let _ = read.read_exact(&mut body).await;
            if let Ok(Message { id: Some(id), .. }) = serde_json::from_slice(&body) {
                let answer = serde_json::to_vec(&Message::answer(id, Ok(json!({})))).unwrap();
                let _ = write.write_all(&framed(&answer)).await;
                let _ = write.flush().await;
            }
        }
    }
    tokio::time::sleep(CALM).await;
    // A control stream that is answered by nobody, but whose other end must not wait for us.
    let reading = async {
        if mode == "slow" {
            std::future::pending::<()>().await;
        }
        let mut ignored = vec![0; 16 * 1024];
        while read.read(&mut ignored).await.is_ok_and(|n| n > 0) {}
    };
    let attack = async {
        if mode == "everything" {
            for mode in EVERYTHING {
                let _ = attack(machine, mode, &mut write, Instant::now() + SLICE).await;
            }
        } else {
            let _ = attack(machine, mode, &mut write, Instant::now() + LONG).await;
        }
        mux.closed().await;
    };
    tokio::join!(reading, attack);
}

async fn attack(
    machine: &Arc<Machine>,
    mode: &str,
    write: &mut WriteHalf<Stream>,
    until: Instant,
) -> std::io::Result<()> {
    let port = Arc::clone(&machine.port);
    let epoch = port.epoch();
    match mode {
        "calls" => calls(write, until).await,
        "heavy" => heavy(write, until).await,
        "liar" => liar(write).await,
        "oversized" => {
            write.write_all(&u32::MAX.to_be_bytes()).await?;
            endless(write, &[b'['; 16 * 1024]).await
        }
        "slow" => {
            write.write_all(&(RPC_MESSAGE_MAX as u32).to_be_bytes()).await?;
            loop {
                write.write_all(b"[").await?;
                write.flush().await?;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        "deaf" => {
            port.become_deaf();
            Ok(())
        }
        "garbage" => flood(port, |port, noise| port.write(&noise.bytes(16 * 1024))),
        "frames" => flood(port, frames),
        "streams" => flood(port, move |port, noise| {
            // New streams without end, a few with as much credit as can be said.
            let mut out = Vec::new();
            for _ in 0..2000 {
                let id = (noise.number() as u32 >> 8) & !1;
                let credit = if id.is_multiple_of(32) { u32::MAX } else { 0 };
                out.extend(yamux(1, 1, id.max(2), credit));
            }
            data(port, epoch, &out);
        }),
        "mux" => flood(port, move |port, noise| {
            // Frames of yamux on the host's own streams: data beyond every window, lengths that lie,
            // pings, resets, unknown kinds, other versions.
            let mut out = Vec::new();
            for _ in 0..200 {
                let n = noise.number();
                let (kind, flags, id) = ((n % 4) as u8, (n >> 8) as u16 % 16, (n >> 32) as u32 % 9);
                let len = if kind == 0 { noise.number() as u32 % 70_000 } else { n as u32 };
                out.extend(yamux(kind, flags, id, len));
                if kind == 0 {
                    out.extend(noise.bytes(len as usize));
                }
            }
            data(port, epoch, &out);
        }),
        _ => Ok(()),
    }
}

/// Messages that are none, or that nobody waits for.
async fn calls(write: &mut WriteHalf<Stream>, until: Instant) -> std::io::Result<()> {
    let text = |message: &Message| serde_json::to_vec(message).unwrap();
    let deep = "[".repeat(500_000).into_bytes();
    let within = format!(
        "{{\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"guest.spawn\",\"params\":{}{}}}",
        "[".repeat(100),
        "]".repeat(100)
    );
    let mut bodies = vec![
        b"".to_vec(),
        b"{".to_vec(),
        b"null".to_vec(),
        vec![0xff, 0xfe, b'{', b'}'],
        b"{\"jsonrpc\":\"2.0\",\"method\":\"\xc3\x28\"}".to_vec(),
        b"{\"jsonrpc\":\"1.0\",\"id\":1,\"method\":\"health\"}".to_vec(),
        b"{\"jsonrpc\":\"2.0\",\"id\":-1,\"method\":\"health\"}".to_vec(),
        b"{\"jsonrpc\":\"2.0\",\"id\":1e400,\"result\":{}}".to_vec(),
        b"{\"jsonrpc\":\"2.0\"}".to_vec(),
        deep,
        within.into_bytes(),
        text(&Message::notification(method::PROCESS_EXITED, json!({"code": "seven"}))),
        text(&Message::notification(method::PROCESS_EXITED, Value::Null)),
        text(&Message::notification(&"n".repeat(200_000), json!(["x"]))),
        text(&Message::request(u64::MAX, &"m".repeat(200_000), Value::Null)),
        text(&Message::request(3, "aegisd.stop", json!({"token": "x".repeat(1000)}))),
    ];
    for name in guest::method::ALL {
        bodies.push(text(&Message::request(4, name, json!({"token": "eyJ.forged.token"}))));
    }
    // Answers to calls never made, and to ones that may come.
    for id in (0..50).chain([u64::MAX]) {
        bodies.push(text(&Message::answer(id, Ok(json!({"boot_id": "forged", "pid": -1})))));
    }
    while Instant::now() < until {
        for body in &bodies {
            write.write_all(&framed(body)).await?;
        }
        write.flush().await?;
    }
    Ok(())
}

/// The largest messages there can be, that become a hundred times as large.
async fn heavy(write: &mut WriteHalf<Stream>, until: Instant) -> std::io::Result<()> {
    let params = swollen(RPC_MESSAGE_MAX - 1000);
    let head = "{\"jsonrpc\":\"2.0\",\"id\":9,\"method\":\"guest.spawn\",\"params\":{\"token\":\"t\",\"request\":";
    let message = framed(format!("{head}{params}}}}}").as_bytes());
    while Instant::now() < until {
        write.write_all(&message).await?;
        write.flush().await?;
    }
    Ok(())
}

/// Tells of one end after the other, each another one.
async fn liar(write: &mut WriteHalf<Stream>) -> std::io::Result<()> {
    for code in 40.. {
        let exit = json!({"code": code, "signal": 9, "timed_out": true});
        let body = Message::notification(method::PROCESS_EXITED, exit);
        write.write_all(&framed(&serde_json::to_vec(&body).unwrap())).await?;
        write.flush().await?;
    }
    Ok(())
}

async fn endless<W: AsyncWrite + Unpin>(write: &mut W, bytes: &[u8]) -> std::io::Result<()> {
    loop {
        write.write_all(bytes).await?;
        write.flush().await?;
    }
}

/// A thread that never ends: it writes past the session.
fn flood(
    port: Arc<Port>,
    mut act: impl FnMut(&Port, &mut Noise) + Send + 'static,
) -> std::io::Result<()> {
    std::thread::spawn(move || {
        let mut noise = Noise::new(42);
        loop {
            act(&port, &mut noise);
        }
    });
    Ok(())
}

/// Epoch frames of every kind but the right one.
fn frames(port: &Port, noise: &mut Noise) {
    let mut out = Vec::new();
    for round in 0..20 {
        let other = noise.number().to_le_bytes();
        for kind in [Kind::Hello, Kind::Ack, Kind::Bye] {
            out.extend(frame::header(kind, other, 0));
            out.extend(frame::header(kind, port.epoch(), 0));
        }
        out.extend(frame::header(Kind::Data, other, 1000));
        out.extend(noise.bytes(1000));
        let mut lying = frame::header(Kind::Data, port.epoch(), 0);
        let len = if round % 2 == 0 { u32::MAX } else { FRAME_PAYLOAD_MAX as u32 + 1 };
        lying[16..].copy_from_slice(&len.to_le_bytes());
        out.extend(lying);
        let mut unknown = frame::header(Kind::Data, port.epoch(), 0);
        (unknown[4], unknown[5]) = (noise.number() as u8, 0xff);
        out.extend(unknown);
        // Cut off within its header.
        out.extend(&frame::header(Kind::Data, port.epoch(), 10)[..7]);
    }
    port.write(&out);
}

/// Bytes of the session, past the multiplexer.
fn data(port: &Port, epoch: frame::Epoch, bytes: &[u8]) {
    for chunk in bytes.chunks(FRAME_PAYLOAD_MAX) {
        let mut out = frame::header(Kind::Data, epoch, chunk.len()).to_vec();
        out.extend_from_slice(chunk);
        port.write(&out);
    }
}

/// A header of yamux.
fn yamux(kind: u8, flags: u16, id: u32, len: u32) -> Vec<u8> {
    let mut out = vec![0, kind];
    out.extend(flags.to_be_bytes());
    out.extend(id.to_be_bytes());
    out.extend(len.to_be_bytes());
    out
}

/// The primary process's output.
pub async fn logs(mode: &watch::Receiver<String>, mut stream: Stream) {
    let mut mode = mode.clone();
    let Ok(mode) = mode.wait_for(|mode| !mode.is_empty()).await.map(|mode| mode.clone()) else {
        return;
    };
    let frame = |kind, byte: u8| {
        let mut out = output::header(kind, OUTPUT_CHUNK_MAX).to_vec();
        out.resize(out.len() + OUTPUT_CHUNK_MAX, byte);
        out
    };
    let _ = match mode.as_str() {
        // Lines as short as can be become the largest entries for their size.
        "log-lines" => endless(&mut stream, &frame(output::Kind::Stdout, b'\n')).await,
        "log-bytes" => endless(&mut stream, &frame(output::Kind::Stderr, 0xff)).await,
        "log-garbage" => {
            let bytes = Noise::new(7).bytes(OUTPUT_CHUNK_MAX);
            endless(&mut stream, &bytes).await
        }
        "log-oversized" => {
            let mut header = output::header(output::Kind::Stdout, 0);
            header[1..].copy_from_slice(&u32::MAX.to_be_bytes());
            endless(&mut stream, &header).await
        }
        "log-ends" => {
            // Ends again and again, without the process having ended.
            let body = "[".repeat(60_000);
            let mut out = output::header(output::Kind::Exit, body.len()).to_vec();
            out.extend_from_slice(body.as_bytes());
            endless(&mut stream, &out).await
        }
        _ => std::future::pending().await,
    };
}
