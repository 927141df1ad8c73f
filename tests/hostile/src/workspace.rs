//! What a machine can say about its workspace, by the first word of its command.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use aegis_wire::bounds::WORKSPACE_TRANSFER_MAX;
use aegis_wire::channel::workspace::{HEAD_LEN, Head};
use aegis_wire::pipe::mux::Stream;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::{Notify, watch};

use crate::noise::Noise;

/// Bytes of the kernel's head of a message.
const KERNEL_HEAD: usize = 40;
/// Highest number of a request that the kernel has.
const OPCODES: u64 = 53;
/// Requests that have no answer.
const UNANSWERED: [u32; 3] = [2, 36, 42];
/// Requests that wait for an answer.
const AHEAD: u64 = 32;
/// Names that lead somewhere else, and some that do not.
const NAMES: [&str; 8] =
    ["..", "../secret", "/etc/passwd", "out", "a", "b", "sub", "../../../../../../tmp"];

/// Attacks until the stream ends.
pub async fn serve(mode: &watch::Receiver<String>, stream: Stream) {
    let mut mode = mode.clone();
    let Ok(mode) = mode.wait_for(|mode| !mode.is_empty()).await.map(|mode| mode.clone()) else {
        return;
    };
    let (mut read, mut write) = tokio::io::split(stream);
    let heard = if mode == "ws-lies" { u64::MAX } else { 0 };
    let _ = write.write_all(&heard.to_le_bytes()).await;
    let _ = match mode.as_str() {
        "ws-noise" => noise(&mut read, &mut write).await,
        // Whatever is answered, it never comes.
        "ws-deaf" => deaf(&mut write).await,
        "ws-long" => write.write_all(&Head { len: u32::MAX as usize, heard: 0 }.bytes()).await,
        _ => Ok(()),
    };
    std::future::pending::<()>().await;
}

fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut request = vec![0; KERNEL_HEAD];
    request[..4].copy_from_slice(&((KERNEL_HEAD + body.len()) as u32).to_le_bytes());
    request[4..8].copy_from_slice(&opcode.to_le_bytes());
    request[8] = 1;
    request[16..24].copy_from_slice(&node.to_le_bytes());
    request.extend_from_slice(body);
    request
}

async fn say(write: &mut WriteHalf<Stream>, heard: u64, request: &[u8]) -> io::Result<()> {
    write.write_all(&Head { len: request.len(), heard }.bytes()).await?;
    write.write_all(request).await?;
    write.flush().await
}

/// Everything that the kernel could ask for, and more, in no order; answers are taken as they come.
async fn noise(read: &mut ReadHalf<Stream>, write: &mut WriteHalf<Stream>) -> io::Result<()> {
    let (heard, news) = (AtomicU64::new(0), Notify::new());
    let say_all = async {
        let (mut noise, mut answers) = (Noise::new(11), 0);
        loop {
            let body = body(&mut noise);
            let opcode = (noise.number() % OPCODES) as u32;
            let request = request(opcode, noise.number() % 30, &body);
            // Who is not heard is not spoken to any more either.
            while answers >= heard.load(Ordering::Relaxed) + AHEAD {
                news.notified().await;
            }
            say(write, heard.load(Ordering::Relaxed), &request).await?;
            answers += u64::from(!UNANSWERED.contains(&opcode));
        }
    };
    tokio::select! {
        ended = say_all => ended,
        ended = hear_all(read, &heard, &news) => ended,
    }
}

/// Numbers and names that a request could be made of.
fn body(noise: &mut Noise) -> Vec<u8> {
    let mut body = Vec::new();
    for _ in 0..noise.number() % 6 {
        match noise.number() % 4 {
            0 => body.extend_from_slice(&(noise.number() % 40).to_le_bytes()),
            1 => body.extend_from_slice(&((noise.number() % 40) as u32).to_le_bytes()),
            2 => {
                body.extend_from_slice(NAMES[noise.number() as usize % NAMES.len()].as_bytes());
                body.push(0);
            }
            _ => {
                let len = noise.number() as usize % 100;
                body.extend_from_slice(&noise.bytes(len));
            }
        }
    }
    body
}

async fn hear_all(read: &mut ReadHalf<Stream>, heard: &AtomicU64, news: &Notify) -> io::Result<()> {
    loop {
        let mut head = [0; HEAD_LEN];
        read.read_exact(&mut head).await?;
        let head = Head::read(head).map_err(io::Error::other)?;
        let mut message = vec![0; head.len];
        read.read_exact(&mut message).await?;
        heard.fetch_add(u64::from(head.len > 0), Ordering::Relaxed);
        news.notify_one();
    }
}

/// A file is made, and read for ever, while nobody hears it.
async fn deaf(write: &mut WriteHalf<Stream>) -> io::Result<()> {
    let mut create = vec![0; 16];
    create[0] = 0x42;
    create[4..8].copy_from_slice(&0o644u32.to_le_bytes());
    create.extend_from_slice(b"deaf\0");
    say(write, 0, &request(35, 1, &create)).await?;
    let mut bytes = vec![0; 40];
    bytes[0] = 1;
    bytes[16..20].copy_from_slice(&(WORKSPACE_TRANSFER_MAX as u32).to_le_bytes());
    let reads = request(15, 2, &bytes);
    bytes.resize(40 + WORKSPACE_TRANSFER_MAX, 7);
    say(write, 0, &request(16, 2, &bytes)).await?;
    loop {
        say(write, 0, &reads).await?;
    }
}
