//! The bytes of a file, on their way to the host.

use std::fs::{self, File, Metadata};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use aegis_wire::bounds::OUTPUT_CHUNK_MAX;
use aegis_wire::channel::files::{Fault, FilePath};
use aegis_wire::channel::output::{HEADER_LEN, Kind, header};
use rustix::fs::OFlags;

use super::place::described;
use super::{agree, as_path, at_once, fault};
use crate::exec::Host;
use crate::hands::Hands;
use crate::output::{Sink as _, last_frame};

/// Sends them, as many as the file had when it was opened; without an end where it has fewer now.
pub async fn run(
    clerks: &Hands,
    host: &mut Host,
    path: FilePath,
    from: u64,
    length: Option<u64>,
) -> Result<(), Fault> {
    let opened = at_once(clerks, move || open(as_path(&path), from)).await?;
    let (mut file, meta) = opened;
    let size = meta.len();
    agree(host, Some(described(&meta))).await;
    let most = length.unwrap_or(u64::MAX);
    // Files of the kernel's own say that they are empty: those are read to their end.
    let mut left = if size == 0 { most } else { most.min(size.saturating_sub(from)) };
    let mut frame = Vec::new();
    while left > 0 && host.listens() {
        let want = usize::try_from(left).unwrap_or(usize::MAX).min(OUTPUT_CHUNK_MAX);
        let read = at_once(clerks, move || {
            frame.resize(HEADER_LEN + want, 0);
            let n = read_some(&mut file, &mut frame[HEADER_LEN..])?;
            frame.truncate(HEADER_LEN + n);
            Ok((file, frame))
        });
        // Too late to refuse: without an end the host knows that this is not all.
        let Ok((its, filled)) = read.await else { return Ok(()) };
        (file, frame) = (its, filled);
        let n = frame.len() - HEADER_LEN;
        if n == 0 {
            break;
        }
        frame[..HEADER_LEN].copy_from_slice(&header(Kind::Data, n));
        host.send(&frame).await;
        left -= n as u64;
    }
    if left == 0 || size == 0 {
        host.send(&last_frame(Kind::DataEnd, &())).await;
    }
    Ok(())
}

/// Opens a regular file, and nothing that does anything by being opened.
fn open(path: &Path, from: u64) -> Result<(File, Metadata), Fault> {
    regular(&fs::metadata(path).map_err(fault)?)?;
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::options().read(true).custom_flags(flags.bits() as i32).open(path);
    let mut file = file.map_err(fault)?;
    // It may be another one by now.
    let meta = file.metadata().map_err(fault)?;
    regular(&meta)?;
    if from > 0 {
        file.seek(SeekFrom::Start(from)).map_err(fault)?;
    }
    Ok((file, meta))
}

fn regular(meta: &Metadata) -> Result<(), Fault> {
    match (meta.is_dir(), meta.is_file()) {
        (true, _) => Err(Fault::IsADirectory),
        (_, true) => Ok(()),
        _ => Err(Fault::NotAFile),
    }
}

fn read_some(file: &mut File, buffer: &mut [u8]) -> Result<usize, Fault> {
    loop {
        match file.read(buffer) {
            Ok(n) => return Ok(n),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            // One of the kernel's that waits for news: what is there is all.
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(0),
            Err(e) => return Err(fault(e)),
        }
    }
}
