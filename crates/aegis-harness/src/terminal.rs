//! Commands at a terminal: one stream of what it shows, bytes that are typed, and its size. The
//! session ends with its command, or is hung up when the host leaves.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use aegis_wire::bounds::{ATTACH_LEAVE, TERMINAL_INPUT_MAX, TERMINAL_STALL};
use aegis_wire::channel::output::Kind;
use aegis_wire::channel::{ExecStart, Tty, WindowSize};
use aegis_wire::pipe::mux::Stream;
use rustix::io::Errno;
use tokio::io::ReadHalf;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use crate::exec::{Host, hang_up, limited};
use crate::machine::Machine;
use crate::output::{self, Source, UNKNOWN, last_frame};
use crate::process::Unable;
use crate::{pty, sys};

/// Frames of the host that wait for the terminal.
const FRAMES: usize = 2;

/// Runs a command at a terminal of its own.
pub async fn serve(machine: Arc<Machine>, stream: Stream, start: ExecStart, tty: Tty) {
    let (from_host, to_host) = tokio::io::split(stream);
    let mut host = Host::new(to_host);
    let deadline = start.timeout_secs.map(std::time::Duration::from_secs);
    let (wish, seat) = match machine.take_seat(start) {
        Ok(begun) => begun,
        Err(error) => return host.end(&last_frame(Kind::Failed, &error)).await,
    };
    let started = async {
        let (child, master) = machine.starter.start_at_terminal(&wish, tty.size).await?;
        let watched = sys::watch_both(master).map_err(Unable::System)?;
        Ok::<_, Unable>((child, watched))
    };
    let (child, master) = match started.await {
        Ok(started) => started,
        Err(unable) => {
            host.end(&last_frame(Kind::Failed, &unable.answer())).await;
            return seat.leave(&machine, None).await;
        }
    };
    seat.taken_by(&machine, &child);
    let pid = child.pid;
    let mut exit = limited(Arc::clone(&machine), child, deadline);
    let (frames_in, frames) = mpsc::channel(FRAMES);
    let mut reader = tokio::spawn(read(from_host, frames_in));
    let ended = tokio::select! {
        // An unknown end can only be told as such.
        ended = output::pump(Screen(&master), &mut exit, &mut host) => Some(ended.unwrap_or(UNKNOWN)),
        () = obey(frames, &master) => None,
    };
    // Nobody's terminal from here on: who still sits at it gets SIGHUP from the kernel.
    drop(master);
    let ended = match ended {
        Some(ended) => {
            host.end(&last_frame(Kind::Exit, &ended)).await;
            // Ends when nobody takes its words, or when the other side, which has it all, leaves.
            let _ = tokio::time::timeout(ATTACH_LEAVE, &mut reader).await;
            Some(ended)
        }
        None => hang_up(&machine, pid, exit).await,
    };
    reader.abort();
    seat.leave(&machine, ended).await;
}

/// What a terminal shows.
struct Screen<'a>(&'a AsyncFd<OwnedFd>);

impl Source for Screen<'_> {
    // More than its buffers hold.
    const REST_MAX: usize = 1 << 20;

    async fn read(&mut self, buffer: &mut [u8]) -> Option<(Kind, usize)> {
        // An error: the last one has closed it.
        read_some(self.0, buffer).await.ok().map(|n| (Kind::Stdout, n))
    }

    fn read_now(&mut self, buffer: &mut [u8]) -> Option<(Kind, usize)> {
        match rustix::io::read(self.0, buffer) {
            Ok(n @ 1..) => Some((Kind::Stdout, n)),
            _ => None,
        }
    }
}

async fn read_some(master: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let mut ready = master.readable().await?;
        match ready.try_io(|fd| Ok(rustix::io::read(fd, &mut *buffer)?)) {
            Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => return done,
            Err(_not_ready) => {}
        }
    }
}

/// What the host says.
#[derive(Debug, PartialEq, Eq)]
enum Word {
    Typed(Vec<u8>),
    Resize(WindowSize),
}

/// Passes the host's frames on until it leaves; what is none of a terminal's is its end too.
async fn read(mut from: ReadHalf<Stream>, to: mpsc::Sender<Word>) {
    let mut bytes = Vec::new();
    while let Ok(Some(kind)) = output::read_frame(&mut from, &mut bytes).await {
        let word = match kind {
            Kind::Stdin => Word::Typed(std::mem::take(&mut bytes)),
            Kind::Resize => match WindowSize::parse(&bytes) {
                Ok(size) => Word::Resize(size),
                Err(_) => return,
            },
            _ => return,
        };
        if to.send(word).await.is_err() {
            return;
        }
    }
}

/// Does what the host says, until it leaves. What is typed waits for the program, up to a bound; a
/// program that never reads loses it, so that the end behind it is seen.
async fn obey(mut words: mpsc::Receiver<Word>, master: &AsyncFd<OwnedFd>) {
    let mut typed = VecDeque::new();
    loop {
        let full = typed.len() >= TERMINAL_INPUT_MAX;
        tokio::select! {
            word = words.recv(), if !full => match word {
                Some(Word::Typed(bytes)) => typed.extend(bytes),
                // A terminal that is gone needs no size.
                Some(Word::Resize(size)) => drop(pty::resize(master, size)),
                None => return,
            },
            written = write_some(master, typed.as_slices().0), if !typed.is_empty() => {
                match written {
                    Ok(n) => drop(typed.drain(..n)),
                    Err(_) => typed.clear(),
                }
            }
            () = tokio::time::sleep(TERMINAL_STALL), if full => typed.clear(),
        }
    }
}

async fn write_some(master: &AsyncFd<OwnedFd>, bytes: &[u8]) -> io::Result<usize> {
    loop {
        let mut ready = master.writable().await?;
        let write = |fd: &AsyncFd<OwnedFd>| match rustix::io::write(fd, bytes) {
            // A terminal without room may also say so in this way.
            Ok(0) => Err(Errno::AGAIN.into()),
            done => Ok(done?),
        };
        if let Ok(done) = ready.try_io(write) {
            return done;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::CHUNK;

    fn pair() -> (AsyncFd<OwnedFd>, OwnedFd) {
        let (master, slave) = pty::Maker::find().unwrap().make(WindowSize::USUAL).unwrap();
        (sys::watch_both(master).unwrap(), slave)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_is_typed_arrives_and_a_size_is_shown() {
        let (master, slave) = pair();
        let (say, words) = mpsc::channel(FRAMES);
        let size = WindowSize::new(50, 132).unwrap();
        say.send(Word::Resize(size)).await.unwrap();
        say.send(Word::Typed(b"hello\r".to_vec())).await.unwrap();
        let echo = async {
            let mut echo = Vec::new();
            let mut buffer = [0; 64];
            while !echo.ends_with(b"hello\r\n") {
                let n = read_some(&master, &mut buffer).await.unwrap();
                echo.extend_from_slice(&buffer[..n]);
            }
        };
        tokio::select! {
            () = echo => {}
            () = obey(words, &master) => panic!("the host did not leave"),
        }
        let mut line = [0; 64];
        assert_eq!(rustix::io::read(&slave, &mut line).unwrap(), 6);
        assert_eq!(&line[..6], b"hello\n");
        let shown = rustix::termios::tcgetwinsize(&slave).unwrap();
        assert_eq!((shown.ws_row, shown.ws_col), (50, 132));
        drop(say);
    }

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn the_end_is_seen_behind_what_nobody_reads() {
        let (master, slave) = pair();
        let mut raw = rustix::termios::tcgetattr(&slave).unwrap();
        raw.make_raw();
        rustix::termios::tcsetattr(&slave, rustix::termios::OptionalActions::Now, &raw).unwrap();
        let (say, words) = mpsc::channel(FRAMES);
        let flood = async move {
            for _ in 0..3 * TERMINAL_INPUT_MAX / CHUNK {
                say.send(Word::Typed(vec![b'x'; CHUNK])).await.unwrap();
            }
        };
        // Returns at all.
        tokio::join!(flood, obey(words, &master));
        drop(slave);
    }
}
