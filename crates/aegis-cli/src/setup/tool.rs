//! Running the host's own tools: found or named with their package, words watched, failures told.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::failure::{Failure, Result};

/// Most that a tool may print to stdout, bytes; a decompressed kernel fits.
const OUTPUT_MAX: u64 = 1 << 30;
/// Lines of a tool's words that its failure repeats.
const LAST_WORDS: usize = 8;
/// Longest line of a tool's words that is looked at, bytes.
const WORD_LINE_MAX: u64 = 64 * 1024;

/// Where administrators' tools lie, though an ordinary user's PATH may not name it.
const ALSO: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// Finds a program on PATH, or where administrators' tools lie.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(ALSO.iter().map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    file.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Whether this process is root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A run of a tool.
pub struct Tool {
    name: String,
    command: Command,
    input: Option<Vec<u8>>,
}

impl Tool {
    /// The tool `name` with arguments, in the C locale so that its words can be read.
    pub fn new(name: &str, args: &[&str]) -> Result<Tool> {
        let program = find(name).ok_or_else(|| missing(name))?;
        let mut command = Command::new(program);
        command.args(args).env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        Ok(Tool { name: name.to_owned(), command, input: None })
    }

    /// One more argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Tool {
        self.command.arg(arg);
        self
    }

    /// More arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Tool {
        self.command.args(args);
        self
    }

    /// A variable of its environment.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Tool {
        self.command.env(name, value);
        self
    }

    /// Where it runs.
    pub fn dir(mut self, dir: &Path) -> Tool {
        self.command.current_dir(dir);
        self
    }

    /// What it reads.
    pub fn input(mut self, input: Vec<u8>) -> Tool {
        self.input = Some(input);
        self
    }

    /// Runs it and returns what it printed.
    pub fn run(self) -> Result<Vec<u8>> {
        self.watch(|_| {})
    }

    /// The same; each line of its words (stderr) is shown to `on_words` as it comes.
    pub fn watch(mut self, mut on_words: impl FnMut(&str)) -> Result<Vec<u8>> {
        let failed = |e| Failure::because(format!("cannot run {}", self.name), e);
        self.command
            .stdin(if self.input.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = self.command.spawn().map_err(failed)?;
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let input = self.input.take();
        let mut last: VecDeque<String> = VecDeque::new();
        let printed = std::thread::scope(|scope| {
            // A tool that ends early closes its stdin: not our failure, its exit status says more.
            scope.spawn(move || stdin.zip(input).map(|(mut to, bytes)| to.write_all(&bytes)));
            let printed = scope.spawn(move || {
                let mut printed = Vec::new();
                stdout.map_or(Ok(0), |from| from.take(OUTPUT_MAX).read_to_end(&mut printed))?;
                Ok::<_, std::io::Error>(printed)
            });
            if let Some(stderr) = stderr {
                let mut stderr = BufReader::new(stderr);
                let mut line = Vec::new();
                while (&mut stderr).take(WORD_LINE_MAX).read_until(b'\n', &mut line)? > 0 {
                    let words = String::from_utf8_lossy(&line).trim().to_owned();
                    line.clear();
                    if words.is_empty() {
                        continue;
                    }
                    on_words(&words);
                    if last.len() == LAST_WORDS {
                        last.pop_front();
                    }
                    last.push_back(words);
                }
            }
            printed.join().unwrap_or_else(|_| Err(std::io::Error::other("its reader failed")))
        });
        let status = child.wait().map_err(failed)?;
        if !status.success() {
            let words = Vec::from(last).join("\n    ");
            return Err(Failure::here(format!("{} failed ({status})\n    {words}", self.name)));
        }
        printed.map_err(failed)
    }
}

/// A tool that is not there, with what brings it.
pub fn missing(name: &str) -> Failure {
    let failure = Failure::here(format!("{name} is not installed"));
    match super::packages::package_of(name) {
        Some(package) => failure.fix(format!(
            "run `aegis setup --install`, or `{}`",
            super::packages::install_command(&[package])
        )),
        None => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_words_and_failures_are_told_apart() {
        let mut words = Vec::new();
        let printed = Tool::new("sh", &["-c", "echo out; echo word >&2; cat"])
            .unwrap()
            .input(b"in".to_vec())
            .watch(|w| words.push(w.to_owned()))
            .unwrap();
        assert_eq!(printed, b"out\nin");
        assert_eq!(words, ["word"]);
        let failure = Tool::new("sh", &["-c", "echo why >&2; exit 3"]).unwrap().run().unwrap_err();
        assert!(failure.words().contains("why"), "{}", failure.words());
        assert!(Tool::new("no-such-tool-here", &[]).is_err());
    }
}
