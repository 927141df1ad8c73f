//! Bytes of files and pipes for a request's body, read by a thread of their own: they block.

use std::io::{self, Read};

use bytes::Bytes;
use futures_util::Stream;
use tokio::sync::mpsc;

/// Bytes that are read at a time.
pub const PIECE: usize = 256 * 1024;
/// Pieces that wait for the daemon.
const PIECES_WAITING: usize = 4;

/// Where pieces go.
pub type Pieces = mpsc::Sender<io::Result<Bytes>>;

/// What a thread gives.
pub fn by(
    work: impl FnOnce(Pieces) + Send + 'static,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    let (pieces, read) = mpsc::channel(PIECES_WAITING);
    std::thread::spawn(move || work(pieces));
    futures_util::stream::unfold(read, |mut read| async move {
        read.recv().await.map(|piece| (piece, read))
    })
}

/// All that can be read.
pub fn pump(mut from: impl Read, to: &Pieces) {
    loop {
        let mut piece = vec![0; PIECE];
        let piece = match from.read(&mut piece) {
            Ok(0) => return,
            Ok(n) => {
                piece.truncate(n);
                Ok(Bytes::from(piece))
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => Err(e),
        };
        let last = piece.is_err();
        // A daemon that has heard enough says why itself.
        if to.blocking_send(piece).is_err() || last {
            return;
        }
    }
}
