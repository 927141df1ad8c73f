//! Epoch sessions: what [`crate::channel::frame`] describes, over an async byte pipe.
//!
//! Each side hands in one end of a [`tokio::io::duplex`] as the session's bytes, and keeps the
//! other for yamux.

use std::io;

use tokio::io::{
    AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf,
};

use crate::bounds::FRAME_PAYLOAD_MAX;
use crate::channel::frame::{self, Decoder, Epoch, Frame, Kind};

/// Bytes that a session's duplex holds per direction.
pub const SESSION_BUFFER: usize = 4 * FRAME_PAYLOAD_MAX;

/// One end of the byte pipe.
pub struct Pipe<P> {
    read: ReadHalf<P>,
    write: WriteHalf<P>,
    decoder: Decoder,
    chunk: Vec<u8>,
}

/// Why a session of the machine's side ended.
pub enum Ended {
    /// The host began a new session.
    NewEpoch(Epoch),
    /// The host ended it, and waits for an acknowledgement.
    Bye,
    /// The pipe itself is gone.
    Closed,
}

impl<P: AsyncRead + AsyncWrite> Pipe<P> {
    /// Takes a pipe on which any stale bytes may still lie.
    pub fn new(pipe: P) -> Pipe<P> {
        let (read, write) = tokio::io::split(pipe);
        Pipe { read, write, decoder: Decoder::new(), chunk: vec![0; FRAME_PAYLOAD_MAX * 2] }
    }

    /// Host side: opens the session `epoch`. Returns once the machine acknowledged it; the caller
    /// bounds the time.
    pub async fn open(&mut self, epoch: Epoch) -> io::Result<()> {
        self.ask(Kind::Hello, epoch).await
    }

    /// Host side: ends the session `epoch`, which nothing carries any more. Returns once the machine
    /// has cleared it away; the caller bounds the time.
    pub async fn leave(&mut self, epoch: Epoch) -> io::Result<()> {
        self.ask(Kind::Bye, epoch).await
    }

    /// Says it behind whatever half frame may be on its way, and waits for the acknowledgement.
    async fn ask(&mut self, kind: Kind, epoch: Epoch) -> io::Result<()> {
        let mut said = vec![0xFF; frame::PADDING];
        said.extend_from_slice(&frame::header(kind, epoch, 0));
        self.write.write_all(&said).await?;
        self.write.flush().await?;
        loop {
            match self.next().await? {
                Some(f) if f.kind == Kind::Ack && f.epoch == epoch => return Ok(()),
                Some(_) => {}
                None => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
    }

    /// Host side: carries the session's bytes until `app` is dropped at its other end or the pipe
    /// ends. Afterwards a new session can be opened.
    pub async fn carry(&mut self, epoch: Epoch, app: DuplexStream) -> io::Result<()> {
        let (mut from_app, mut to_app) = tokio::io::split(app);
        let Pipe { read, write, decoder, chunk } = self;
        tokio::select! {
            ended = inbound(read, decoder, chunk, epoch, &mut to_app, false) => ended.map(drop),
            ended = outbound(write, epoch, &mut from_app) => ended,
        }
    }

    /// Machine side: waits for the host's next HELLO and discards all else.
    pub async fn accept(&mut self) -> io::Result<Option<Epoch>> {
        loop {
            match self.next().await? {
                Some(f) if f.kind == Kind::Hello => return Ok(Some(f.epoch)),
                Some(_) => {}
                None => return Ok(None),
            }
        }
    }

    /// Machine side: says that the session `epoch` is open, or after [`Ended::Bye`] cleared away.
    pub async fn acknowledge(&mut self, epoch: Epoch) -> io::Result<()> {
        self.write.write_all(&frame::header(Kind::Ack, epoch, 0)).await?;
        self.write.flush().await
    }

    /// Machine side: acknowledges `epoch` and carries its bytes until the host ends it or begins
    /// another.
    pub async fn serve(&mut self, epoch: Epoch, app: DuplexStream) -> io::Result<Ended> {
        self.acknowledge(epoch).await?;
        let (mut from_app, mut to_app) = tokio::io::split(app);
        let Pipe { read, write, decoder, chunk } = self;
        let out = async {
            // When the app's side ends first, the session still waits for the host's next one.
            let _ = outbound(write, epoch, &mut from_app).await;
            std::future::pending::<()>().await
        };
        tokio::select! {
            ended = inbound(read, decoder, chunk, epoch, &mut to_app, true) => ended,
            () = out => Ok(Ended::Closed),
        }
    }

    async fn next(&mut self) -> io::Result<Option<Frame>> {
        next_frame(&mut self.read, &mut self.decoder, &mut self.chunk).await
    }
}

async fn next_frame<R: AsyncRead + Unpin>(
    read: &mut R,
    decoder: &mut Decoder,
    chunk: &mut [u8],
) -> io::Result<Option<Frame>> {
    loop {
        if let Some(frame) = decoder.next_frame() {
            return Ok(Some(frame));
        }
        // Cancel-safe: either bytes were read and fed, or nothing happened.
        let n = read.read(chunk).await?;
        if n == 0 {
            return Ok(None);
        }
        decoder.feed(&chunk[..n]);
    }
}

/// Pipe → app. Returns at a HELLO or a BYE (`listen`), or at the pipe's end; an error when the app's
/// side is gone and nobody listens for those.
async fn inbound<R: AsyncRead + Unpin>(
    read: &mut R,
    decoder: &mut Decoder,
    chunk: &mut [u8],
    epoch: Epoch,
    to_app: &mut WriteHalf<DuplexStream>,
    listen: bool,
) -> io::Result<Ended> {
    let mut app_gone = false;
    while let Some(frame) = next_frame(read, decoder, chunk).await? {
        match frame.kind {
            Kind::Hello if listen => return Ok(Ended::NewEpoch(frame.epoch)),
            Kind::Bye if listen && frame.epoch == epoch => return Ok(Ended::Bye),
            Kind::Data if frame.epoch == epoch && !app_gone => {
                if let Err(e) = to_app.write_all(&frame.payload).await {
                    if !listen {
                        return Err(e);
                    }
                    app_gone = true;
                }
            }
            _ => {}
        }
    }
    Ok(Ended::Closed)
}

/// App → pipe, until the app's side ends.
async fn outbound<W: AsyncWrite + Unpin>(
    write: &mut W,
    epoch: Epoch,
    from_app: &mut ReadHalf<DuplexStream>,
) -> io::Result<()> {
    // Header and payload leave in one write.
    let mut out = vec![0; frame::HEADER_LEN + FRAME_PAYLOAD_MAX];
    loop {
        let n = from_app.read(&mut out[frame::HEADER_LEN..]).await?;
        if n == 0 {
            return Ok(());
        }
        out[..frame::HEADER_LEN].copy_from_slice(&frame::header(Kind::Data, epoch, n));
        write.write_all(&out[..frame::HEADER_LEN + n]).await?;
        write.flush().await?;
    }
}
