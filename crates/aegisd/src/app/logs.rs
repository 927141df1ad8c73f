//! An instance's logs: the files that its worker writes, read here; followed by inotify.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use aegis_rules::instance::InstanceState;
use aegis_wire::bounds::{LOG_FILE_MAX, LOG_LINE_MAX, OUTPUT_CHUNK_MAX};
use aegis_wire::logs::Entry;
use aegis_wire::words::{InstanceId, Time};
use futures_util::StreamExt as _;
use inotify::{EventStream, Inotify, WatchMask};
use tokio::sync::{Semaphore, mpsc};

use super::{App, Error};
use crate::ctx::InUse;

/// File that is written, and its rotated predecessor.
const FILES: [&str; 2] = ["log.1.ndjson", "log.ndjson"];
/// One entry as a line: base64 and text of the longest log line, and its names.
const LINE_MAX: u64 = (4 * LOG_LINE_MAX + OUTPUT_CHUNK_MAX) as u64;
/// Lines that wait for a slow reader.
const QUEUE: usize = 64;
/// Bytes that are read at a time.
const READ_AT_ONCE: usize = 256 * 1024;
/// A host has few watches, and machines may follow logs too: who comes later looks this often.
const LOOK_EVERY: Duration = Duration::from_millis(250);
static WATCHES: Semaphore = Semaphore::const_new(32);
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
    // Without a watch it is looked at again and again.
    let place = if ask.follow { WATCHES.try_acquire().ok() } else { None };
    let mut watch = match place {
        Some(_) => watch(&dir)?,
        None => None,
    };
    let Some(mut tail) = history(&dir, ask, send).await? else { return Ok(()) };
    if !ask.follow {
        return Ok(());
    }
    let mut commits = app.ctx.ledger.commits();
    loop {
        let live = app
            .ctx
            .ledger
            .read(|f| f.instance(id))?
            .is_some_and(|i| !matches!(i.state, InstanceState::Stopped | InstanceState::Gone));
        // Looked at after the state: what was written before the end is still read.
        match pour(tail, ask, send, &mut 0).await? {
            Some((_, true)) if !live => return Ok(()),
            Some((after, end)) => {
                tail = after;
                if !end {
                    continue;
                }
            }
            None => return Ok(()),
        }
        let grown = async {
            match &mut watch {
                Some(events) => events.next().await.is_some(),
                None => {
                    tokio::time::sleep(LOOK_EVERY).await;
                    true
                }
            }
        };
        tokio::select! {
            more = grown => if !more { return Ok(()) },
            changed = commits.changed() => if changed.is_err() { return Ok(()) },
            () = send.closed() => return Ok(()),
        }
    }
}

/// Events of a directory; none where the host has no more to give.
fn watch(dir: &Path) -> io::Result<Option<EventStream<Vec<u8>>>> {
    std::fs::create_dir_all(dir)?;
    let Ok(inotify) = Inotify::init() else { return Ok(None) };
    let mask = WatchMask::MODIFY | WatchMask::CREATE | WatchMask::MOVED_TO;
    inotify.watches().add(dir, mask)?;
    Ok(Some(inotify.into_event_stream(vec![0; 4096])?))
}

/// Sends what is there already; returns where to go on, unless nobody listens any more.
async fn history(
    dir: &Path,
    ask: &Ask,
    send: &mpsc::Sender<io::Result<String>>,
) -> io::Result<Option<Tail>> {
    let mut skip = 0;
    if let Some(most) = ask.tail {
        let mut count = 0_usize;
        for name in FILES {
            let mut tail = Tail::of(dir.join(name));
            for _ in 0..=LOG_FILE_MAX / READ_AT_ONCE as u64 {
                let (back, lines, end) = some(tail, ask).await?;
                tail = back;
                count = count.saturating_add(lines.len());
                if end {
                    break;
                }
            }
        }
        skip = count.saturating_sub(most);
    }
    let mut last = Tail::of(dir.join(FILES[1]));
    for name in FILES {
        match pour(Tail::of(dir.join(name)), ask, send, &mut skip).await? {
            Some((tail, _)) => last = tail,
            None => return Ok(None),
        }
    }
    Ok(Some(last))
}

/// Sends lines, but the first `skip`, of as much as one file has; says whether that was all that is
/// written. Nothing comes back when nobody listens any more. Only some lines are in memory at a time,
/// however slowly they are taken.
async fn pour(
    mut tail: Tail,
    ask: &Ask,
    send: &mpsc::Sender<io::Result<String>>,
    skip: &mut usize,
) -> io::Result<Option<(Tail, bool)>> {
    // A machine that writes faster than it is read makes no history endless.
    for _ in 0..=LOG_FILE_MAX / READ_AT_ONCE as u64 {
        let (back, lines, end) = some(tail, ask).await?;
        tail = back;
        let skipped = lines.len().min(*skip);
        *skip -= skipped;
        for line in lines.into_iter().skip(skipped) {
            if send.send(Ok(line)).await.is_err() {
                return Ok(None);
            }
        }
        if end {
            return Ok(Some((tail, true)));
        }
    }
    Ok(Some((tail, false)))
}

/// Reads on, away from the tasks that must not wait for a disk.
async fn some(mut tail: Tail, ask: &Ask) -> io::Result<(Tail, Vec<String>, bool)> {
    let ask = ask.clone();
    let read = tokio::task::spawn_blocking(move || {
        let (lines, end) = tail.more(&ask)?;
        Ok((tail, lines, end))
    });
    read.await.map_err(io::Error::other)?
}

/// A log file that grows and is rotated.
struct Tail {
    path: PathBuf,
    file: Option<BufReader<File>>,
    rest: Vec<u8>,
}

impl Tail {
    fn of(path: PathBuf) -> Tail {
        Tail { path, file: None, rest: Vec::new() }
    }

    /// Whole lines that match, as far as they are written, but only so many at a time; says whether
    /// these were all.
    fn more(&mut self, ask: &Ask) -> io::Result<(Vec<String>, bool)> {
        let mut out = Vec::new();
        let mut read = 0;
        loop {
            if self.file.is_none() {
                match File::open(&self.path) {
                    Ok(file) => self.file = Some(BufReader::new(file)),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok((out, true)),
                    Err(e) => return Err(e),
                }
            }
            if let Some(file) = &mut self.file {
                loop {
                    if read >= READ_AT_ONCE {
                        return Ok((out, false));
                    }
                    let n = file.by_ref().take(LINE_MAX).read_until(b'\n', &mut self.rest)?;
                    if n == 0 {
                        break;
                    }
                    read += n;
                    if self.rest.last() == Some(&b'\n') {
                        let line = std::mem::take(&mut self.rest);
                        out.extend(matching(&line, ask));
                    } else if self.rest.len() as u64 > LINE_MAX {
                        self.rest.clear();
                    }
                }
            }
            if !self.rotated()? {
                return Ok((out, true));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(n: usize) -> String {
        let instance = "inst-01ARZ3NDEKTSV4RRFFQ69G5FAV";
        serde_json::json!({
            "ts": "2026-01-01T00:00:00Z", "stream": "stdout", "source": "server",
            "line": format!("{n} {}", "x".repeat(500)), "instance_id": instance,
        })
        .to_string()
    }

    fn write(dir: &Path, name: &str, lines: std::ops::Range<usize>) {
        let text: String = lines.map(|n| entry(n) + "\n").collect();
        std::fs::write(dir.join(name), text).unwrap();
    }

    async fn read(dir: &Path, ask: &Ask) -> Vec<String> {
        let (send, mut lines) = mpsc::channel::<io::Result<String>>(QUEUE);
        let taking = async {
            let mut out = Vec::new();
            while let Some(line) = lines.recv().await {
                out.push(line.unwrap().trim_end().to_owned());
            }
            out
        };
        let pouring = async move { history(dir, ask, &send).await.unwrap().is_some() };
        let (all, out) = tokio::join!(pouring, taking);
        assert!(all);
        out
    }

    #[tokio::test]
    async fn history_is_whole_and_its_tail_too() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path(), &Ask::default()).await.is_empty());
        write(dir.path(), FILES[0], 0..3000);
        write(dir.path(), FILES[1], 3000..4000);
        let all: Vec<String> = (0..4000).map(entry).collect();
        assert_eq!(read(dir.path(), &Ask::default()).await, all);
        for tail in [0, 1, 1000, 1001, 3999, 4000, 9000] {
            let ask = Ask { tail: Some(tail), ..Ask::default() };
            assert_eq!(read(dir.path(), &ask).await, all[4000_usize.saturating_sub(tail)..]);
        }
    }

    #[tokio::test]
    async fn little_is_held_for_who_reads_nothing() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), FILES[1], 0..4000);
        let mut tail = Tail::of(dir.path().join(FILES[1]));
        let (lines, end) = tail.more(&Ask::default()).unwrap();
        assert!(!end && lines.iter().map(String::len).sum::<usize>() < 2 * READ_AT_ONCE);
        let (send, lines) = mpsc::channel(QUEUE);
        drop(lines);
        assert!(history(dir.path(), &Ask::default(), &send).await.unwrap().is_none());
    }
}
