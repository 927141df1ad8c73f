//! An instance's logs: the files that its worker writes, read here; followed by inotify.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use aegis_rules::instance::InstanceState;
use aegis_wire::bounds::{LOG_LINE_MAX, OUTPUT_CHUNK_MAX};
use aegis_wire::logs::Entry;
use aegis_wire::words::{InstanceId, Time};
use futures_util::StreamExt as _;
use inotify::{Inotify, WatchMask};
use tokio::sync::mpsc;

use super::{App, Error};
use crate::ctx::InUse;

/// File that is written, and its rotated predecessor.
const FILES: [&str; 2] = ["log.1.ndjson", "log.ndjson"];
/// One entry as a line: base64 and text of the longest log line, and its names.
const LINE_MAX: u64 = (4 * LOG_LINE_MAX + OUTPUT_CHUNK_MAX) as u64;
/// Lines that wait for a slow reader.
const QUEUE: usize = 256;
/// Most entries that `tail` can ask for.
pub const TAIL_MAX: usize = 100_000;

/// Which entries are asked for.
#[derive(Clone, Debug, Default)]
pub struct Ask {
    /// Not before this.
    pub since: Option<Time>,
    /// At most the last so many.
    pub tail: Option<usize>,
    /// Of one exec only.
    pub exec_id: Option<String>,
    /// Go on until the instance has stopped.
    pub follow: bool,
}

/// Entries as NDJSON lines; the stream ends with the logs, or with the machine when following.
pub fn read(app: &App, id: &InstanceId, ask: Ask) -> mpsc::Receiver<io::Result<String>> {
    let (send, lines) = mpsc::channel(QUEUE);
    let (app, id) = (app.clone(), id.clone());
    tokio::spawn(async move {
        if let Err(error) = stream(&app, &id, &ask, &send).await {
            let _ = send.send(Err(io::Error::other(error))).await;
        }
    });
    lines
}

async fn stream(
    app: &App,
    id: &InstanceId,
    ask: &Ask,
    send: &mpsc::Sender<io::Result<String>>,
) -> Result<(), Error> {
    let dir = app.ctx.instance_dir(id).join("logs");
    // Who waits for its next line uses it.
    let _in_use = ask.follow.then(|| InUse::begin(&app.ctx, id));
    // Watched before the first read, so that nothing falls between.
    let watch = if ask.follow {
        std::fs::create_dir_all(&dir)?;
        let inotify = Inotify::init()?;
        let mask = WatchMask::MODIFY | WatchMask::CREATE | WatchMask::MOVED_TO;
        inotify.watches().add(&dir, mask)?;
        Some(inotify.into_event_stream(vec![0; 4096])?)
    } else {
        None
    };
    let (first, reading) = (dir.clone(), ask.clone());
    let (lines, mut tail) = tokio::task::spawn_blocking(move || history(&first, &reading))
        .await
        .map_err(io::Error::other)??;
    for line in lines {
        if send.send(Ok(line)).await.is_err() {
            return Ok(());
        }
    }
    let Some(mut events) = watch else { return Ok(()) };
    let mut commits = app.ctx.ledger.commits();
    loop {
        let live = app
            .ctx
            .ledger
            .read(|f| f.instance(id))?
            .is_some_and(|i| !matches!(i.state, InstanceState::Stopped | InstanceState::Gone));
        // Looked at after the state: what was written before the end is still read.
        for line in tail.more(ask)? {
            if send.send(Ok(line)).await.is_err() {
                return Ok(());
            }
        }
        if !live {
            return Ok(());
        }
        tokio::select! {
            event = events.next() => if event.is_none() { return Ok(()) },
            changed = commits.changed() => if changed.is_err() { return Ok(()) },
            () = send.closed() => return Ok(()),
        }
    }
}

/// What is there already, and where to go on.
fn history(dir: &Path, ask: &Ask) -> io::Result<(Vec<String>, Tail)> {
    let mut lines = std::collections::VecDeque::new();
    let mut tail = Tail { path: dir.join(FILES[1]), file: None, rest: Vec::new() };
    for name in FILES {
        let mut part = Tail { path: dir.join(name), file: None, rest: Vec::new() };
        for line in part.more(ask)? {
            lines.push_back(line);
            if ask.tail.is_some_and(|n| lines.len() > n) {
                lines.pop_front();
            }
        }
        tail = part;
    }
    Ok((lines.into(), tail))
}

/// A log file that grows and is rotated.
struct Tail {
    path: PathBuf,
    file: Option<BufReader<File>>,
    rest: Vec<u8>,
}

impl Tail {
    /// Whole lines that match, as far as they are written.
    fn more(&mut self, ask: &Ask) -> io::Result<Vec<String>> {
        let mut out = Vec::new();
        loop {
            if self.file.is_none() {
                match File::open(&self.path) {
                    Ok(file) => self.file = Some(BufReader::new(file)),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(out),
                    Err(e) => return Err(e),
                }
            }
            if let Some(file) = &mut self.file {
                loop {
                    let n = file.by_ref().take(LINE_MAX).read_until(b'\n', &mut self.rest)?;
                    if n == 0 {
                        break;
                    }
                    if self.rest.last() == Some(&b'\n') {
                        let line = std::mem::take(&mut self.rest);
                        out.extend(matching(&line, ask));
                    } else if self.rest.len() as u64 > LINE_MAX {
                        self.rest.clear();
                    }
                }
            }
            if !self.rotated()? {
                return Ok(out);
            }
            self.file = None;
            self.rest.clear();
        }
    }

    /// Whether the path is another file now than the one that was read to its end.
    fn rotated(&mut self) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt as _;
        let Some(file) = &mut self.file else { return Ok(false) };
        let now = match std::fs::metadata(&self.path) {
            Ok(meta) => meta,
            Err(_) => return Ok(false),
        };
        let old = file.get_ref().metadata()?;
        if now.ino() != old.ino() {
            // What was written between the last read and the rename is read first.
            return Ok(file.stream_position()? >= old.len());
        }
        if now.len() < file.stream_position()? {
            file.seek(SeekFrom::Start(0))?;
        }
        Ok(false)
    }
}

fn matching(line: &[u8], ask: &Ask) -> Option<String> {
    let entry: Entry = serde_json::from_slice(line).ok()?;
    let since = ask.since.is_none_or(|since| entry.ts >= since);
    let exec = ask.exec_id.is_none() || entry.exec_id == ask.exec_id;
    (since && exec).then(|| String::from_utf8_lossy(line).into_owned())
}
