//! Attached commands, and files: output frames both ways, as they come. Nothing of a terminal or a
//! file is logged: what a terminal shows are no lines, and what is in a file is nobody's business.

use std::io;

use aegis_wire::bounds::{ATTACHED_LOG_MAX, RPC_DEADLINE};
use aegis_wire::channel::StreamHead;
use aegis_wire::channel::output::{HEADER_LEN, Kind};
use aegis_wire::logs::{Source, Stream as Which};
use aegis_wire::pipe::mux::Stream;
use aegis_wire::worker::Reply;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader};

use crate::lines;
use crate::logs::{self, Log, Recorder};
use crate::relay::{self, Session};

/// Copied at a time and direction, bytes.
const COPY: usize = 32 * 1024;

/// Writes the output of an attached command to the log, as far as that goes.
pub struct Tap<'a> {
    log: &'a Log,
    recorder: Recorder,
    exec_id: String,
    left: usize,
}

impl<'a> Tap<'a> {
    /// Of a command.
    pub fn new(log: &'a Log, exec_id: String) -> Tap<'a> {
        let recorder = Recorder::new(log.instance_id(), Source::Exec, Some(exec_id.clone()));
        Tap { log, recorder, exec_id, left: ATTACHED_LOG_MAX }
    }

    /// Passes frames on, each before it is logged.
    async fn copy<R, W>(&mut self, mut from: R, to: &mut W) -> io::Result<()>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut frame = Vec::new();
        while let Some(kind) = logs::read_frame(&mut from, &mut frame).await? {
            to.write_all(&frame).await?;
            match kind {
                Kind::Stdout => self.note(Which::Stdout, &frame[HEADER_LEN..]).await?,
                Kind::Stderr => self.note(Which::Stderr, &frame[HEADER_LEN..]).await?,
                _ => {}
            }
        }
        Ok(())
    }

    async fn note(&mut self, which: Which, bytes: &[u8]) -> io::Result<()> {
        if self.left == 0 {
            return Ok(());
        }
        let mut rest = bytes;
        while !rest.is_empty() && self.left > 0 {
            let batch = self.recorder.batch(which, &mut rest)?;
            self.log.append(&batch).await;
            self.left = self.left.saturating_sub(batch.len());
        }
        if self.left == 0 {
            self.rest().await;
            let text = format!("more output of exec {} went to its client alone", self.exec_id);
            self.log.system(&text).await;
        }
        Ok(())
    }

    /// What no newline ended.
    async fn rest(&mut self) {
        if let Ok(rest) = self.recorder.rest() {
            self.log.append(&rest).await;
        }
    }
}

/// Connects an asker with a command or a file, until either has ended. `Err` when nothing was said
/// to the asker yet.
pub async fn run<S>(
    session: &Session,
    asker: &mut S,
    head: StreamHead,
    tap: Option<Tap<'_>>,
) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let inside = tokio::time::timeout(RPC_DEADLINE, relay::open_stream(&session.mux, &head, &[]))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "nothing inside answered"))??;
    lines::write(asker, &Reply::ok()).await?;
    carry(inside, asker, tap).await;
    Ok(())
}

/// Carries both directions. The end of one is that of the whole: a command has ended, or is hung up.
pub async fn carry<S>(inside: Stream, asker: &mut S, mut tap: Option<Tap<'_>>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (from_inside, mut to_inside) = tokio::io::split(inside);
    let (from_asker, mut to_asker) = tokio::io::split(asker);
    let mut from_inside = BufReader::with_capacity(COPY, from_inside);
    let mut from_asker = BufReader::with_capacity(COPY, from_asker);
    let outward = async {
        match &mut tap {
            None => drop(tokio::io::copy_buf(&mut from_inside, &mut to_asker).await),
            Some(tap) => drop(tap.copy(&mut from_inside, &mut to_asker).await),
        }
    };
    tokio::select! {
        () = outward => {}
        _ = tokio::io::copy_buf(&mut from_asker, &mut to_inside) => {}
    }
    if let Some(tap) = &mut tap {
        tap.rest().await;
    }
    let _ = tokio::time::timeout(RPC_DEADLINE, to_inside.shutdown()).await;
}
