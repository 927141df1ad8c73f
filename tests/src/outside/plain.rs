//! Servers without a protocol: one gives back what it gets, one takes all, one gives without end.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UdpSocket};

use super::seen::Port;

/// Bytes that are taken or given at once.
const PIECE: usize = 64 * 1024;

/// What a server does with its streams.
#[derive(Clone, Copy)]
pub(super) enum Habit {
    /// Gives back what it gets.
    Echo,
    /// Takes all, and says at the end how much it was.
    Sink,
    /// Gives without end.
    Source,
}

/// Serves connections, for ever.
pub(super) async fn serve(habit: Habit, port: Arc<Port>, listener: TcpListener) -> io::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        let mut stream = port.connected(stream);
        tokio::spawn(async move {
            let mut piece = vec![b'x'; PIECE];
            match habit {
                Habit::Echo => loop {
                    let n = stream.read(&mut piece).await?;
                    if n == 0 {
                        return stream.shutdown().await;
                    }
                    stream.write_all(&piece[..n]).await?;
                },
                Habit::Sink => {
                    let mut all: u64 = 0;
                    loop {
                        let n = stream.read(&mut piece).await?;
                        if n == 0 {
                            break;
                        }
                        all += n as u64;
                    }
                    stream.write_all(format!("{all}\n").as_bytes()).await?;
                    stream.shutdown().await
                }
                Habit::Source => loop {
                    stream.write_all(&piece).await?;
                },
            }
        });
    }
}

/// Serves datagrams, for ever; a sink takes them silently.
pub(super) async fn serve_udp(habit: Habit, port: Arc<Port>, socket: UdpSocket) -> io::Result<()> {
    let mut bytes = vec![0; PIECE];
    loop {
        let (n, from) = socket.recv_from(&mut bytes).await?;
        port.count(n);
        if let Habit::Echo = habit {
            let _ = socket.send_to(&bytes[..n], from).await;
        }
    }
}
