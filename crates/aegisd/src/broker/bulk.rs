//! What follows an answer on a stream of its own: the NDJSON of an exec or of logs, a child's file;
//! and a file for a child, the other way.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use aegis_wire::channel::files::FileAnswer;

use crate::app::exec::Running;
use crate::app::files::{self, Body, Open};
use crate::lifecycle::Connection;

/// The machine takes a line within this; a process that reads nothing holds no stream for ever.
const WRITE_DEADLINE: Duration = Duration::from_secs(300);

/// Lines, and where they go.
pub(super) struct Bulk {
    to: Connection,
    from: Source,
    /// Its place among the machine's streams.
    _slot: OwnedSemaphorePermit,
}

/// Where lines come from.
pub(super) enum Source {
    /// A command in a child.
    Exec(Box<Running>),
    /// A child's logs.
    Logs(mpsc::Receiver<io::Result<String>>),
    /// Something of a child's files.
    File(Box<Body>),
    /// Nothing: the machine writes a file of a child.
    Write(Box<Open>),
}

impl Source {
    async fn next(&mut self) -> Option<Vec<u8>> {
        match self {
            Source::Exec(running) => running.next_line().await,
            Source::Logs(lines) => lines.recv().await?.ok().map(String::into_bytes),
            Source::File(body) => body.next().await?.ok().map(Vec::from),
            Source::Write(_) => None,
        }
    }
}

impl Bulk {
    /// Lines to pour into a stream that the machine has opened.
    pub(super) fn new(to: Connection, from: Source, slot: OwnedSemaphorePermit) -> Bulk {
        Bulk { to, from, _slot: slot }
    }

    /// Writes all lines. Ends when there are no more, or when nobody takes them.
    pub(super) async fn pour(self) {
        let Bulk { to, mut from, _slot } = self;
        let (mut back, mut to) = tokio::io::split(to);
        if let Source::Write(open) = from {
            let done = match open.write(files::sent(back)).await {
                Ok(meta) => FileAnswer::Done { meta: Some(meta) },
                Err(error) => FileAnswer::Refused { fault: files::fault_of(&error) },
            };
            let _ = tokio::time::timeout(WRITE_DEADLINE, files::tell(&mut to, &done)).await;
            let _ = to.shutdown().await;
            return;
        }
        let write = async {
            while let Some(line) = from.next().await {
                match tokio::time::timeout(WRITE_DEADLINE, to.write_all(&line)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) | Err(_) => return,
                }
            }
            let _ = to.shutdown().await;
        };
        // Nothing is said back: a read that ends means that the stream has.
        let gone = async {
            let mut ignored = [0; 256];
            while matches!(back.read(&mut ignored).await, Ok(n) if n > 0) {}
        };
        tokio::select! {
            () = write => {}
            () = gone => {}
        }
    }
}
