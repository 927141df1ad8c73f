//! How the program speaks: data to stdout, words to stderr, JSON when asked.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::Value;

use crate::failure::{Failure, Result};

/// How often a spinner turns.
const SPINNER_TICK: Duration = Duration::from_millis(120);

/// How to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Tables and words.
    Human,
    /// JSON on stdout, one value.
    Json,
}

impl Format {
    /// Answers: JSON as it is, or what `human` makes of it.
    pub fn answer<T: Serialize>(self, value: &T, human: impl FnOnce() -> String) -> Result<()> {
        match self {
            Format::Json => print_json(value),
            Format::Human => data(human().as_bytes()),
        }
    }
}

/// One JSON value to stdout.
pub fn print_json<T: Serialize>(value: &T) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|e| Failure::because("cannot write the answer as JSON", e))?;
    text.push('\n');
    data(text.as_bytes())
}

/// Bytes to stdout. A reader that left (`| head`) is no error, it is the end.
pub fn data(bytes: &[u8]) -> Result<()> {
    written(std::io::stdout().lock(), bytes)
}

/// A command's own stderr bytes.
pub fn data_err(bytes: &[u8]) -> Result<()> {
    written(std::io::stderr().lock(), bytes)
}

fn written(mut to: impl std::io::Write, bytes: &[u8]) -> Result<()> {
    match to.write_all(bytes).and_then(|()| to.flush()) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Err(Failure::Exit(0)),
        Err(e) => Err(Failure::because("cannot write the output", e)),
    }
}

/// One line of words to stderr; lost silently when nobody listens there.
pub fn say(words: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{words}");
}

/// A JSON value as people read it: text without quotes, nothing for null.
pub fn plain(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "no".into(),
        Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// A table that fits the terminal; when stdout is none, one row stays one line.
pub fn table(head: &[&str], rows: Vec<Vec<String>>) -> String {
    let width = std::io::stdout().is_terminal().then(terminal_width).flatten();
    table_of_width(head, rows, width)
}

fn table_of_width(head: &[&str], rows: Vec<Vec<String>>, width: Option<u16>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    match width {
        Some(width) => {
            table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
        }
        None => {
            table.set_content_arrangement(ContentArrangement::Disabled);
        }
    }
    if !head.is_empty() {
        table.set_header(head.iter().map(|h| h.to_uppercase()));
    }
    table.add_rows(rows.into_iter().map(|row| row.into_iter().map(|cell| clean(&cell))));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text: String = String::new();
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Names and rows of `name  value`.
pub fn fields(rows: &[(&str, String)]) -> String {
    let rows = rows.iter().filter(|(_, value)| !value.is_empty());
    table(&[], rows.map(|(name, value)| vec![format!("{name}:"), value.clone()]).collect())
}

/// Text without control characters: what a guest chose as its name must not steer the terminal.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// Columns of the terminal behind stdout.
fn terminal_width() -> Option<u16> {
    let size = rustix::termios::tcgetwinsize(rustix::stdio::stdout()).ok()?;
    (size.ws_col > 0).then_some(size.ws_col)
}

/// Long work that shows how far it is: a line that moves on a terminal, else plain lines; with
/// `--json` words still go to stderr, where they disturb nobody.
pub struct Work {
    name: &'static str,
    bar: Option<ProgressBar>,
    last: String,
}

impl Work {
    /// Begins something.
    pub fn begin(name: &'static str, what: &str) -> Work {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            bar.set_style(Work::spinner());
            bar.set_prefix(name);
            bar.enable_steady_tick(SPINNER_TICK);
            bar
        });
        let mut work = Work { name, bar, last: String::new() };
        work.now(what);
        work
    }

    fn spinner() -> ProgressStyle {
        ProgressStyle::with_template("{spinner} {prefix:<10} {wide_msg} {elapsed}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner())
    }

    /// What happens now.
    pub fn now(&mut self, what: &str) {
        if what == self.last {
            return;
        }
        self.last = what.to_owned();
        match &self.bar {
            Some(bar) => bar.set_message(clean(what)),
            None => say(&format!("{}: {what}", self.name)),
        }
    }

    /// How far it is, in bytes; shown on terminals only.
    pub fn at(&self, done: u64, total: u64) {
        let Some(bar) = &self.bar else { return };
        if bar.length() != Some(total) {
            bar.set_length(total);
            if let Ok(style) = ProgressStyle::with_template(
                "{spinner} {prefix:<10} {msg} [{bar:30}] {bytes}/{total_bytes} {elapsed}",
            ) {
                bar.set_style(style.progress_chars("=> "));
            }
        }
        bar.set_position(done);
        if done >= total {
            bar.set_style(Work::spinner());
            bar.unset_length();
        }
    }

    /// Shows nothing any more.
    pub fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// Ends well.
    pub fn done(self, result: &str) {
        self.clear();
        say(&format!("{}: {result}", self.name));
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stay_lines_without_a_terminal_and_fold_on_one() {
        let rows =
            || vec![vec!["a".into(), "word ".repeat(20)], vec!["b\u{1b}[2J".into(), "x".into()]];
        let wide = table_of_width(&["id", "what"], rows(), None);
        assert_eq!(wide.lines().count(), 3);
        assert!(wide.starts_with("ID"), "{wide}");
        assert!(!wide.contains('\u{1b}'));
        let narrow = table_of_width(&["id", "what"], rows(), Some(40));
        assert!(narrow.lines().count() > 3);
        assert!(narrow.lines().all(|line| line.chars().count() <= 40), "{narrow}");
    }

    #[test]
    fn values_read_plainly() {
        assert_eq!(plain(&serde_json::json!(["a", 1, null, true])), "a, 1, -, yes");
    }
}
