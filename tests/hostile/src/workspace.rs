//! What a machine can say about its workspace, by the first word of its command.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use aegis_wire::bounds::WORKSPACE_TRANSFER_MAX;
use aegis_wire::channel::frame::Epoch;
use aegis_wire::channel::workspace::{Head, Inbox, PORT, Resume, put};
use aegis_wire::pipe::mux::Stream;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};

use crate::noise::Noise;
use crate::port::Port;

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
pub async fn serve(mode: &watch::Receiver<String>, mut stream: Stream, resume: Resume) {
    let mut mode = mode.clone();
    let Ok(mode) = mode.wait_for(|mode| !mode.is_empty()).await.map(|mode| mode.clone()) else {
        return;
    };
    let heard = if mode == "ws-lies" { u64::MAX } else { 0 };
    let _ = stream.write_all(&heard.to_le_bytes()).await;
    let _ = stream.flush().await;
    if mode == "ws-mute" {
        return std::future::pending().await;
    }
    let port = Arc::new(Port::open(PORT));
    let (mut read, write) = tokio::io::split(port.connect());
    let mut to = To { write, epoch: resume.epoch };
    let long = Head { len: u32::MAX as usize, heard: 0 };
    let _ = match mode.as_str() {
        "ws-noise" => noise(&mut read, &mut to).await,
        // Whatever is answered, it never comes.
        "ws-deaf" => deaf(&mut to).await,
        "ws-long" => to.say(long, None).await,
        "ws-frames" => to.frames().await,
        "ws-talks" => stream.write_all(&[7; 4096]).await,
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

/// The way to the host.
struct To {
    write: WriteHalf<UnixStream>,
    epoch: Epoch,
}

impl To {
    async fn say(&mut self, head: Head, message: Option<&[u8]>) -> io::Result<()> {
        let mut bytes = Vec::new();
        put(&mut bytes, self.epoch, &(head, message.map(Arc::from)));
        self.write.write_all(&bytes).await
    }

    /// Frames of all kinds and sizes, of this epoch and of others, between bytes that are none.
    async fn frames(&mut self) -> io::Result<()> {
        let mut noise = Noise::new(13);
        loop {
            let len = noise.number() as usize % 3000;
            let body = noise.bytes(len);
            let [claimed, heard] = [noise.number() % 4000, noise.number() % 3];
            let mut bytes = Vec::new();
            let epoch = if heard == 0 { [9; 8] } else { self.epoch };
            put(&mut bytes, epoch, &(Head { len: claimed as usize, heard: 0 }, Some(body.into())));
            let cut = noise.number() as usize % bytes.len();
            self.write.write_all(&bytes[..if heard == 1 { cut } else { bytes.len() }]).await?;
        }
    }
}

async fn say(to: &mut To, heard: u64, request: &[u8]) -> io::Result<()> {
    to.say(Head { len: request.len(), heard }, Some(request)).await
}

/// Everything that the kernel could ask for, and more, in no order; answers are taken as they come.
async fn noise(read: &mut ReadHalf<UnixStream>, to: &mut To) -> io::Result<()> {
    let epoch = to.epoch;
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
            say(to, heard.load(Ordering::Relaxed), &request).await?;
            answers += u64::from(!UNANSWERED.contains(&opcode));
        }
    };
    tokio::select! {
        ended = say_all => ended,
        ended = hear_all(read, epoch, &heard, &news) => ended,
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

async fn hear_all(
    read: &mut ReadHalf<UnixStream>,
    epoch: Epoch,
    heard: &AtomicU64,
    news: &Notify,
) -> io::Result<()> {
    let (mut inbox, mut chunk) = (Inbox::default(), vec![0; 16 * 1024]);
    inbox.begin(epoch);
    loop {
        let n = read.read(&mut chunk).await?;
        inbox.feed(&chunk[..n]);
        while let Some((head, _)) = inbox.next_message().map_err(io::Error::other)? {
            heard.fetch_add(u64::from(head.len > 0), Ordering::Relaxed);
        }
        news.notify_one();
    }
}

/// A file is made, and read for ever, while nobody hears it.
async fn deaf(to: &mut To) -> io::Result<()> {
    let mut create = vec![0; 16];
    create[0] = 0x42;
    create[4..8].copy_from_slice(&0o644u32.to_le_bytes());
    create.extend_from_slice(b"deaf\0");
    say(to, 0, &request(35, 1, &create)).await?;
    let mut bytes = vec![0; 40];
    bytes[0] = 1;
    bytes[16..20].copy_from_slice(&(WORKSPACE_TRANSFER_MAX as u32).to_le_bytes());
    let reads = request(15, 2, &bytes);
    bytes.resize(40 + WORKSPACE_TRANSFER_MAX, 7);
    say(to, 0, &request(16, 2, &bytes)).await?;
    loop {
        say(to, 0, &reads).await?;
    }
}
