//! An instance's logs: the files that its worker writes, read here; followed by inotify.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use aegis_rules::instance::InstanceState;
use aegis_wire::bounds::{LOG_LINE_MAX, OUTPUT_CHUNK_MAX};
use aegis_wire::logs::Entry;
use aegis_wire::words::{InstanceId, Time};
use tokio::sync::mpsc;

use super::{App, Error};
use crate::ctx::InUse;

/// File that is written, and its rotated predecessor.
const FILES: [&str; 2] = ["log.1.ndjson", "log.ndjson"];
/// One entry as a line: base64 and text of the longest log line, and its names.
const LINE_MAX: u64 = (4 * LOG_LINE_MAX + OUTPUT_CHUNK_MAX) as u64;
/// Lines that wait for a slow reader.
const QUEUE: usize = 8;
/// Lines are read from a file in batches of about this size, bytes: what a machine logged does not
/// wait here for a reader that is slow.
const BATCH: usize = 256 * 1024;
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
        Some(app.ctx.watch.follow(&dir)?)
    } else {
        None
    };
    let Some(mut tail) = history(&dir, ask, send).await? else { return Ok(()) };
    let Some(mut events) = watch else { return Ok(()) };
    let mut commits = app.ctx.ledger.commits();
    loop {
        let live = app
            .ctx
            .ledger
            .read(|f| f.instance(id))?
            .is_some_and(|i| !matches!(i.state, InstanceState::Stopped | InstanceState::Gone));
        // Looked at after the state: what was written before the end is still read.
        while let Some(lines) = tail.more(ask)? {
            if !pass_on(lines, send).await {
                return Ok(());
            }
        }
        if !live {
            return Ok(());
        }
        tokio::select! {
            () = events.changed() => {}
            changed = commits.changed() => if changed.is_err() { return Ok(()) },
            () = send.closed() => return Ok(()),
        }
    }
}

/// Sends what is there already, and gives where to go on; `None` when the reader left.
async fn history(
    dir: &Path,
    ask: &Ask,
    send: &mpsc::Sender<io::Result<String>>,
) -> io::Result<Option<Tail>> {
    // Both as they are now, the newer one first: a rotation in between shows one file twice.
    let mut tail = Tail::up_to_now(dir.join(FILES[1]))?;
    let mut older = Tail::up_to_now(dir.join(FILES[0]))?;
    let twice = older.inode()? == tail.inode()?;
    let mut skip = 0;
    if let Some(most) = ask.tail {
        // Counted first and read again: a slow reader's lines wait in the file, not here.
        for part in [Some(&mut older).filter(|_| !twice), Some(&mut tail)].into_iter().flatten() {
            let whole = part.left;
            while let Some(lines) = part.more(ask)? {
                skip += lines.len();
                tokio::task::yield_now().await;
            }
            part.rewind(whole)?;
        }
        skip = skip.saturating_sub(most);
    }
    for part in [Some(&mut older).filter(|_| !twice), Some(&mut tail)].into_iter().flatten() {
        while let Some(mut lines) = part.more(ask)? {
            let skipped = skip.min(lines.len());
            skip -= skipped;
            if !pass_on(lines.drain(skipped..), send).await {
                return Ok(None);
            }
        }
    }
    tail.left = None;
    Ok(Some(tail))
}

/// Sends lines as fast as the reader takes them; false when it left.
async fn pass_on(
    lines: impl IntoIterator<Item = String>,
    send: &mpsc::Sender<io::Result<String>>,
) -> bool {
    for line in lines {
        if send.send(Ok(line)).await.is_err() {
            return false;
        }
    }
    // Where nothing matches, nothing is waited for: others want their turn too.
    tokio::task::yield_now().await;
    true
}

/// A log file that grows and is rotated.
struct Tail {
    path: PathBuf,
    file: Option<BufReader<File>>,
    rest: Vec<u8>,
    /// Bytes up to where it is read; without it, as far as it grows, and over rotations.
    left: Option<u64>,
}

impl Tail {
    /// What is written of it now, which may be nothing.
    fn up_to_now(path: PathBuf) -> io::Result<Tail> {
        let file = match File::open(&path) {
            Ok(file) => Some(file),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(e),
        };
        let left = file.as_ref().map(File::metadata).transpose()?.map_or(0, |meta| meta.len());
        Ok(Tail { path, file: file.map(BufReader::new), rest: Vec::new(), left: Some(left) })
    }

    fn inode(&self) -> io::Result<Option<u64>> {
        use std::os::unix::fs::MetadataExt as _;
        let meta = self.file.as_ref().map(|f| f.get_ref().metadata()).transpose()?;
        Ok(meta.map(|meta| meta.ino()))
    }

    /// Begins again, up to the same place.
    fn rewind(&mut self, left: Option<u64>) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            file.seek(SeekFrom::Start(0))?;
        }
        self.rest.clear();
        self.left = left;
        Ok(())
    }

    /// What matches of the next whole lines, about [`BATCH`] bytes of them; `None` when all that is
    /// written was read.
    fn more(&mut self, ask: &Ask) -> io::Result<Option<Vec<String>>> {
        let (mut out, mut size) = (Vec::new(), 0);
        loop {
            if self.left == Some(0) {
                return Ok((size > 0).then_some(out));
            }
            if self.file.is_none() {
                match File::open(&self.path) {
                    Ok(file) => self.file = Some(BufReader::new(file)),
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {
                        return Ok((size > 0).then_some(out));
                    }
                    Err(e) => return Err(e),
                }
            }
            if let Some(file) = &mut self.file {
                loop {
                    let most = self.left.map_or(LINE_MAX, |left| left.min(LINE_MAX));
                    let n = file.by_ref().take(most).read_until(b'\n', &mut self.rest)?;
                    if let Some(left) = &mut self.left {
                        *left -= n as u64;
                    }
                    if n == 0 {
                        break;
                    }
                    if self.rest.last() == Some(&b'\n') {
                        let line = std::mem::take(&mut self.rest);
                        size += line.len();
                        out.extend(matching(&line, ask));
                        if size >= BATCH {
                            return Ok(Some(out));
                        }
                    } else if self.rest.len() as u64 > LINE_MAX {
                        self.rest.clear();
                    }
                }
            }
            if self.left.is_some() || !self.rotated()? {
                return Ok((size > 0).then_some(out));
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
        let mut tail = Tail::up_to_now(dir.path().join(FILES[1])).unwrap();
        let lines = tail.more(&Ask::default()).unwrap().unwrap();
        assert!(lines.iter().map(String::len).sum::<usize>() < 2 * BATCH);
        let (send, lines) = mpsc::channel(QUEUE);
        drop(lines);
        assert!(history(dir.path(), &Ask::default(), &send).await.unwrap().is_none());
    }
}
