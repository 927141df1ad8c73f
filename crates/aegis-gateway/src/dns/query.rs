//! A question on its way to a resolver: from another port and with another number each time, over
//! TCP when the answer does not fit a datagram.

use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use mio::net::{TcpStream, UdpSocket};
use mio::{Interest, Registry, Token};

use super::Asker;
use super::message::{Question, Truncated};
use crate::engine::connected;
use hickory_proto::op::Message;

/// Resolvers that are asked, one after the other.
pub(super) const TRIES: u32 = 2;
/// The largest answer of a resolver, bytes.
const ANSWER_MAX: usize = 64 * 1024;
/// Answers to others, or lies, that are read before it is given up.
const STRAYS_MAX: u32 = 64;

pub(super) struct Query {
    pub asker: Asker,
    /// As the guest asked it.
    pub question: Question,
    /// As it is asked now: for the IPv6 addresses of a name that has no other, it differs.
    pub asked: Question,
    pub tries: u32,
    /// The end of all tries, and of this one.
    pub until: Instant,
    pub try_until: Instant,
    id: u16,
    strays: u32,
    way: Way,
}

enum Way {
    Datagram(UdpSocket),
    Stream { stream: TcpStream, out: Vec<u8>, received: Vec<u8> },
}

/// What a look at a query's socket came to.
pub(super) enum Look {
    Wait,
    Answer(Message),
    /// Ask again over TCP.
    Truncated,
    Failed,
}

impl Query {
    /// A question for one resolver, that is not sent yet.
    pub fn new(
        asker: Asker,
        question: Question,
        asked: Question,
        resolver: SocketAddr,
        (registry, token): (&Registry, Token),
        until: Instant,
    ) -> io::Result<Query> {
        let mut socket = connected(resolver)?;
        registry.register(&mut socket, token, Interest::READABLE)?;
        let way = Way::Datagram(socket);
        let id = draw()?;
        Ok(Query { asker, question, asked, tries: 1, until, try_until: until, id, strays: 0, way })
    }

    /// The bytes to be sent.
    pub fn bytes(&self) -> Option<Vec<u8>> {
        self.asked.forward(self.id)
    }

    /// Sends them; they were paid for.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.way {
            Way::Datagram(socket) => socket.send(bytes).map(drop),
            Way::Stream { out, .. } => {
                let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
                out.extend(length.to_be_bytes());
                out.extend(bytes);
                Ok(())
            }
        }
    }

    /// The next try: another socket, another number.
    pub fn again(
        &mut self,
        resolver: SocketAddr,
        (registry, token): (&Registry, Token),
        stream: bool,
    ) -> io::Result<()> {
        self.id = draw()?;
        self.strays = 0;
        self.way = if stream {
            let mut stream = TcpStream::connect(resolver)?;
            registry.register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
            Way::Stream { stream, out: Vec::new(), received: Vec::new() }
        } else {
            let mut socket = connected(resolver)?;
            registry.register(&mut socket, token, Interest::READABLE)?;
            Way::Datagram(socket)
        };
        Ok(())
    }

    /// Looks whether there is an answer.
    pub fn look(&mut self, scratch: &mut [u8]) -> Look {
        match &mut self.way {
            Way::Datagram(socket) => loop {
                match socket.recv(scratch) {
                    Ok(bytes) => match self.asked.hear(self.id, &scratch[..bytes]) {
                        Some(Ok(message)) => return Look::Answer(message),
                        Some(Err(Truncated)) => return Look::Truncated,
                        None if self.strays >= STRAYS_MAX => return Look::Failed,
                        None => self.strays += 1,
                    },
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Look::Wait,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return Look::Failed,
                }
            },
            Way::Stream { stream, out, received } => {
                match exchange(stream, out, received, scratch) {
                    Ok(()) => {}
                    Err(_) => return Look::Failed,
                }
                let Some((length, rest)) = received.split_first_chunk() else { return Look::Wait };
                let length = usize::from(u16::from_be_bytes(*length));
                match rest.get(..length).map(|bytes| self.asked.hear(self.id, bytes)) {
                    None => Look::Wait,
                    Some(Some(Ok(message))) => Look::Answer(message),
                    Some(_) => Look::Failed,
                }
            }
        }
    }

    /// How long the next try may take.
    pub fn plan_try(&mut self, now: Instant) {
        let left = self.until.saturating_duration_since(now);
        let tries_left = TRIES.saturating_sub(self.tries) + 1;
        self.try_until = now + left.div_f64(f64::from(tries_left)).max(Duration::from_millis(1));
    }
}

/// Writes what is to be written and reads what is there.
fn exchange(
    stream: &mut TcpStream,
    out: &mut Vec<u8>,
    received: &mut Vec<u8>,
    scratch: &mut [u8],
) -> io::Result<()> {
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    while !out.is_empty() {
        match stream.write(out) {
            Ok(bytes) => drop(out.drain(..bytes)),
            // Not connected yet, or full.
            Err(e)
                if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::NotConnected) =>
            {
                return Ok(());
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    loop {
        match stream.read(scratch) {
            Ok(0) => {
                let whole = received.split_first_chunk().is_some_and(|(length, rest)| {
                    rest.len() >= usize::from(u16::from_be_bytes(*length))
                });
                return if whole { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
            Ok(bytes) => {
                received.extend_from_slice(&scratch[..bytes]);
                if received.len() > 2 + ANSWER_MAX {
                    return Err(io::ErrorKind::InvalidData.into());
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

fn draw() -> io::Result<u16> {
    let mut bytes = [0; 2];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(u16::from_ne_bytes(bytes))
}
