//! Output of a machine as log entries: cut into lines, written to the machine's log file, never
//! faster than agreed.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use aegis_wire::bounds::{LOG_FILE_MAX, LOG_LINE_MAX, LOG_RATE, OUTPUT_CHUNK_MAX};
use aegis_wire::channel::output::{self, HEADER_LEN, Kind};
use aegis_wire::logs::{Entry, Source, Stream};
use aegis_wire::words::{InstanceId, Time};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::sync::Mutex;
use tokio::time::Instant;

/// The log of now.
const FILE: &str = "log.ndjson";
/// The one before.
const OLD_FILE: &str = "log.1.ndjson";
/// Entries are passed on in batches of about this size, bytes; empty lines become eighty times
/// their size as entries.
const BATCH_MAX: usize = 128 * 1024;

/// The host's time.
pub fn now() -> Time {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Time(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// Cuts bytes into lines; one per output.
#[derive(Default)]
pub struct Splitter {
    held: Vec<u8>,
}

impl Splitter {
    /// Takes bytes from the front of `bytes` up to the end of the next line, and gives that line
    /// (without its newline) and whether it is partial. `None` when no line ended.
    pub fn next_line(&mut self, bytes: &mut &[u8]) -> Option<(Vec<u8>, bool)> {
        let room = LOG_LINE_MAX - self.held.len();
        let window = &bytes[..bytes.len().min(room + 1)];
        if let Some(at) = window.iter().position(|b| *b == b'\n') {
            self.held.extend_from_slice(&bytes[..at]);
            *bytes = &bytes[at + 1..];
            return Some((std::mem::take(&mut self.held), false));
        }
        let taken = bytes.len().min(room);
        self.held.extend_from_slice(&bytes[..taken]);
        *bytes = &bytes[taken..];
        // A line of exactly the greatest length is whole when its newline comes next.
        let too_long = self.held.len() == LOG_LINE_MAX && !bytes.is_empty();
        too_long.then(|| (std::mem::take(&mut self.held), true))
    }

    /// What came after the last newline.
    pub fn rest(&mut self) -> Option<Vec<u8>> {
        (!self.held.is_empty()).then(|| std::mem::take(&mut self.held))
    }
}

/// Makes entries, as NDJSON in batches, from the output of one process.
pub struct Recorder {
    instance_id: InstanceId,
    source: Source,
    exec_id: Option<String>,
    outputs: [Splitter; 2],
}

impl Recorder {
    /// For the output of one process.
    pub fn new(instance_id: InstanceId, source: Source, exec_id: Option<String>) -> Recorder {
        Recorder { instance_id, source, exec_id, outputs: Default::default() }
    }

    /// Takes from the front of `bytes` as much as makes one batch; empty when no line ended.
    pub fn batch(&mut self, stream: Stream, bytes: &mut &[u8]) -> io::Result<Vec<u8>> {
        let ts = now();
        let mut batch = Vec::new();
        while !bytes.is_empty() && batch.len() < BATCH_MAX {
            let Some((line, partial)) = self.outputs[stream as usize].next_line(bytes) else {
                break;
            };
            self.entry(ts, stream, &line, partial, &mut batch)?;
        }
        Ok(batch)
    }

    /// What is left at the end.
    pub fn rest(&mut self) -> io::Result<Vec<u8>> {
        let ts = now();
        let mut batch = Vec::new();
        for stream in [Stream::Stdout, Stream::Stderr] {
            if let Some(line) = self.outputs[stream as usize].rest() {
                self.entry(ts, stream, &line, true, &mut batch)?;
            }
        }
        Ok(batch)
    }

    fn entry(
        &self,
        ts: Time,
        stream: Stream,
        line: &[u8],
        partial: bool,
        to: &mut Vec<u8>,
    ) -> io::Result<()> {
        let (id, exec_id) = (self.instance_id.clone(), self.exec_id.clone());
        let entry = Entry::new(ts, stream, self.source, line, partial, id, exec_id);
        serde_json::to_writer(&mut *to, &entry).map_err(io::Error::other)?;
        to.push(b'\n');
        Ok(())
    }
}

/// One frame of output from inside.
pub enum Output<'a> {
    /// Bytes.
    Bytes(Stream, &'a [u8]),
    /// The last frame: JSON of how it ended, or why it never began.
    End(Kind, &'a [u8]),
}

/// Reads the next frame into `buffer`, header and all; `None` at the end of the stream.
pub async fn read_frame<R: AsyncRead + Unpin>(
    from: &mut R,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<Kind>> {
    let mut header = [0; HEADER_LEN];
    match from.read_exact(&mut header).await {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    }
    let (kind, len) = output::parse_header(header).map_err(io::Error::other)?;
    debug_assert!(len <= OUTPUT_CHUNK_MAX, "the parser bounds it");
    buffer.resize(HEADER_LEN + len, 0);
    buffer[..HEADER_LEN].copy_from_slice(&header);
    from.read_exact(&mut buffer[HEADER_LEN..]).await?;
    Ok(Some(kind))
}

/// Reads the next frame of output; `None` at the end of the stream. What is none is an error.
pub async fn read_output<'a, R: AsyncRead + Unpin>(
    from: &mut R,
    buffer: &'a mut Vec<u8>,
) -> io::Result<Option<Output<'a>>> {
    let Some(kind) = read_frame(from, buffer).await? else { return Ok(None) };
    let buffer = &buffer[HEADER_LEN..];
    Ok(Some(match kind {
        Kind::Stdout => Output::Bytes(Stream::Stdout, buffer),
        Kind::Stderr => Output::Bytes(Stream::Stderr, buffer),
        Kind::Exit | Kind::Failed => Output::End(kind, buffer),
        Kind::Stdin
        | Kind::StdinEnd
        | Kind::Resize
        | Kind::Answer
        | Kind::Data
        | Kind::DataEnd
        | Kind::Taken => return Err(io::Error::other("no frame of output")),
    }))
}

/// A machine's log file. Entries of all its outputs meet here, and share one rate.
pub struct Log {
    instance_id: InstanceId,
    inner: Mutex<Inner>,
}

struct Inner {
    directory: PathBuf,
    file: File,
    size: u64,
    // Bytes that may be written at once, as of `refilled`.
    allowance: f64,
    refilled: Instant,
    broken: bool,
}

impl Log {
    /// Opens the log in `directory`, which is made when it is not there.
    pub fn open(directory: &Path, instance_id: InstanceId) -> io::Result<Log> {
        std::fs::create_dir_all(directory)?;
        let file = append_to(&directory.join(FILE))?;
        let size = file.metadata()?.len();
        let inner = Inner {
            directory: directory.to_owned(),
            file,
            size,
            allowance: f64::from(LOG_RATE),
            refilled: Instant::now(),
            broken: false,
        };
        Ok(Log { instance_id, inner: Mutex::new(inner) })
    }

    /// Appends whole lines in one write; waits while the machine writes too fast.
    pub async fn append(&self, lines: &[u8]) {
        if lines.is_empty() {
            return;
        }
        let mut inner = self.inner.lock().await;
        let wait = inner.take(lines.len());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        let wrote = inner.write(lines);
        // A full host disk must not end machines; it is told once.
        if let Err(error) = &wrote
            && !inner.broken
        {
            tracing::error!(%error, "log entries are lost");
        }
        inner.broken = wrote.is_err();
    }

    /// Appends a line of Aegis itself.
    pub async fn system(&self, text: &str) {
        let mut recorder = Recorder::new(self.instance_id.clone(), Source::System, None);
        let line = format!("{text}\n");
        if let Ok(batch) = recorder.batch(Stream::Stderr, &mut line.as_bytes()) {
            self.append(&batch).await;
        }
    }

    /// Whose log it is.
    pub fn instance_id(&self) -> InstanceId {
        self.instance_id.clone()
    }
}

impl Inner {
    /// How long to wait before so many bytes may be written.
    fn take(&mut self, bytes: usize) -> Duration {
        let (rate, now) = (f64::from(LOG_RATE), Instant::now());
        let gained = now.duration_since(self.refilled).as_secs_f64() * rate;
        self.allowance = (self.allowance + gained).min(rate) - bytes as f64;
        self.refilled = now;
        Duration::from_secs_f64((-self.allowance / rate).max(0.0))
    }

    fn write(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.size > 0 && self.size + lines.len() as u64 > LOG_FILE_MAX {
            let file = self.directory.join(FILE);
            std::fs::rename(&file, self.directory.join(OLD_FILE))?;
            self.file = append_to(&file)?;
            self.size = 0;
        }
        self.file.write_all(lines)?;
        self.size += lines.len() as u64;
        Ok(())
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    File::options().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id() -> InstanceId {
        "inst-01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().unwrap()
    }

    proptest! {
        /// However output is cut into chunks: the bytes of its entries are its bytes.
        #[test]
        fn bytes_survive(
            lines in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..40),
            long in 0usize..3 * LOG_LINE_MAX,
            piece in 1usize..20_000,
        ) {
            let mut output: Vec<u8> = lines.concat();
            output.extend(std::iter::repeat_n(b'x', long));
            output.extend_from_slice(b"\nend");
            let mut recorder = Recorder::new(id(), Source::Exec, Some("e".to_owned()));
            let mut text = Vec::new();
            for mut chunk in output.chunks(piece) {
                while !chunk.is_empty() {
                    text.extend(recorder.batch(Stream::Stdout, &mut chunk).unwrap());
                }
            }
            text.extend(recorder.rest().unwrap());
            let mut back = Vec::new();
            for line in text.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
                let entry: Entry = serde_json::from_slice(line).unwrap();
                prop_assert!(entry.bytes().len() <= LOG_LINE_MAX + 1);
                back.extend(entry.bytes());
            }
            prop_assert_eq!(back, output);
        }
    }

    #[test]
    fn long_lines_are_cut_and_whole_ones_are_not() {
        let mut splitter = Splitter::default();
        let exact = [vec![b'a'; LOG_LINE_MAX], vec![b'\n']].concat();
        let mut bytes = &exact[..];
        let (line, partial) = splitter.next_line(&mut bytes).unwrap();
        assert!(line.len() == LOG_LINE_MAX && !partial && bytes.is_empty());
        let long = vec![b'a'; LOG_LINE_MAX + 1];
        let mut bytes = &long[..];
        assert!(splitter.next_line(&mut bytes).unwrap().1);
        assert!(splitter.next_line(&mut bytes).is_none() && bytes.is_empty());
        assert_eq!(splitter.rest().unwrap(), b"a");
    }

    #[tokio::test]
    async fn files_are_rotated() {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::open(dir.path(), id()).unwrap();
        let line = [vec![b'x'; 1 << 20], vec![b'\n']].concat();
        for _ in 0..7 {
            log.append(&line).await;
        }
        assert!(!dir.path().join(OLD_FILE).exists());
        log.append(&line).await;
        log.system("process exited (code=3)").await;
        assert_eq!(
            std::fs::metadata(dir.path().join(OLD_FILE)).unwrap().len(),
            7 * line.len() as u64
        );
        let text = std::fs::read(dir.path().join(FILE)).unwrap();
        let last = text.split(|b| *b == b'\n').rev().nth(1).unwrap();
        let entry: Entry = serde_json::from_slice(last).unwrap();
        assert_eq!(
            (entry.line.as_str(), entry.source),
            ("process exited (code=3)", Source::System)
        );
    }

    #[test]
    fn a_flood_must_wait() {
        let dir = tempfile::tempdir().unwrap();
        let rt = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let _guard = rt.enter();
        let log = Log::open(dir.path(), id()).unwrap();
        let mut inner = log.inner.try_lock().unwrap();
        assert!(inner.take(LOG_RATE as usize / 2).is_zero());
        let wait = inner.take(LOG_RATE as usize);
        assert!(wait > Duration::from_millis(400) && wait < Duration::from_millis(600));
    }
}
