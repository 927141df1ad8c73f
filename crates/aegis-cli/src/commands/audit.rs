//! `aegis audit …`: the trail of all that happened. Verifying needs no trust in the daemon that
//! exported it: the hashes are computed anew, here, from the rows alone (contracts/couch.md 8).

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read as _};
use std::path::{Path, PathBuf};

use aegis_wire::audit::{GENESIS, Hash, Row, hex, link};
use aegis_wire::host::AuditRow;
use aegis_wire::words::{Time, Tree};
use clap::Subcommand;
use hyper::Method;
use serde_json::json;

use super::Ask;
use crate::failure::{EXIT_OTHER, Failure, Result};
use crate::ndjson::Lines;
use crate::output::{self, say};
use aegis_wire::path::escape;

/// Longest row that is read from a file, bytes.
const ROW_MAX: u64 = 4 << 20;

/// What can be asked of the trail.
#[derive(Subcommand, Debug)]
pub enum AuditCommand {
    /// Print it, one JSON object per line, oldest first
    #[command(after_help = "\
Examples:
  aegis audit export > trail.ndjson
  aegis audit export --tree inst-… | jq -r '[.at, .actor, .kind, .subject] | @tsv'")]
    Export {
        /// Only one tree: an invite's id, or that of a machine of your own
        #[arg(long, value_name = "ID")]
        tree: Option<String>,
        /// Only what came after this number (`seq`)
        #[arg(long, value_name = "SEQ")]
        after: Option<u64>,
    },
    /// Compute its hashes anew, and say whether anything was changed or taken out
    #[command(after_help = "\
Each tree's chain must begin at its first event. What was cut off at the end can't be seen from the \
rows alone: keep the printed heads elsewhere, and compare.

Examples:
  aegis audit verify                      what the daemon has now
  aegis audit verify trail.ndjson         what was exported; `-` is standard input")]
    Verify {
        /// An exported trail [default: the daemon's]
        file: Option<PathBuf>,
        /// Only one tree: an invite's id, or that of a machine of your own
        #[arg(long, value_name = "ID")]
        tree: Option<String>,
    },
}

/// Asks.
pub async fn run(ask: &Ask, command: AuditCommand) -> Result<()> {
    match command {
        AuditCommand::Export { tree, after } => {
            let mut rows = rows(ask, tree.as_deref(), after).await?;
            while let Some(row) = rows.next().await? {
                output::data(&[&row[..], b"\n"].concat())?;
            }
            Ok(())
        }
        AuditCommand::Verify { file, tree } => {
            let mut chains = Chains::default();
            match &file {
                None => {
                    let mut rows = rows(ask, tree.as_deref(), None).await?;
                    while let Some(row) = rows.next().await? {
                        chains.take(&row, tree.as_deref());
                    }
                }
                Some(path) => read(path, tree.as_deref(), &mut chains)?,
            }
            chains.answer(ask)
        }
    }
}

async fn rows(ask: &Ask, tree: Option<&str>, after: Option<u64>) -> Result<Lines> {
    let mut query = Vec::new();
    query.extend(tree.map(|tree| format!("tree={}", escape(tree))));
    query.extend(after.map(|after| format!("after={after}")));
    let mut path = "/v1/audit".to_owned();
    if !query.is_empty() {
        path += &format!("?{}", query.join("&"));
    }
    ask.client.lines(Method::GET, &path, None).await
}

fn read(path: &Path, tree: Option<&str>, chains: &mut Chains) -> Result<()> {
    let failed = |e| Failure::file("read", path, e);
    let mut reader: Box<dyn BufRead> = if path == Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        let file = std::fs::File::open(path).map_err(|e| Failure::file("open", path, e))?;
        Box::new(BufReader::new(file))
    };
    loop {
        let mut row = Vec::new();
        let mut bounded = (&mut reader).take(ROW_MAX + 1);
        if bounded.read_until(b'\n', &mut row).map_err(failed)? == 0 {
            return Ok(());
        }
        if row.len() as u64 > ROW_MAX {
            return Err(Failure::here(format!("a row is longer than {ROW_MAX} bytes")));
        }
        if !row.trim_ascii().is_empty() {
            chains.take(&row, tree);
        }
    }
}

/// The head of a chain: how far it was followed.
struct Head {
    position: u64,
    hash: Hash,
}

/// All chains, each followed as far as it holds.
#[derive(Default)]
struct Chains {
    heads: BTreeMap<String, Head>,
    rows: u64,
    /// What is wrong; of each chain the first.
    broken: BTreeMap<String, String>,
}

impl Chains {
    fn take(&mut self, line: &[u8], only: Option<&str>) {
        self.rows += 1;
        let row: AuditRow = match serde_json::from_slice(line) {
            Ok(row) => row,
            Err(e) => {
                // Nobody knows of which chain it was.
                let name = format!("line {}", self.rows);
                self.broken.insert(name, format!("is no row of a trail: {e}"));
                return;
            }
        };
        if only.is_some_and(|only| only != row.tree) {
            self.rows -= 1;
            return;
        }
        // What follows a break proves nothing.
        if self.broken.contains_key(&row.tree) {
            return;
        }
        let head = self.heads.get(&row.tree);
        match check(&row, head) {
            Ok(hash) => {
                self.heads.insert(row.tree, Head { position: row.position, hash });
            }
            Err(why) => {
                self.broken.insert(row.tree, format!("seq {}: {why}", row.seq));
            }
        }
    }

    fn answer(self, ask: &Ask) -> Result<()> {
        let heads: Vec<_> = self
            .heads
            .iter()
            .map(|(tree, head)| {
                json!({ "tree": tree, "events": head.position, "head": hex(&head.hash) })
            })
            .collect();
        let broken: Vec<_> =
            self.broken.iter().map(|(tree, why)| json!({ "tree": tree, "error": why })).collect();
        let ok = broken.is_empty();
        let told = json!({ "ok": ok, "events": self.rows, "chains": heads, "broken": broken });
        ask.format.answer(&told, || {
            let rows = self
                .heads
                .iter()
                .map(|(tree, head)| vec![tree.clone(), head.position.to_string(), hex(&head.hash)]);
            let table = output::table(&["tree", "events", "head"], rows.collect());
            let verdict = if ok { "unbroken" } else { "BROKEN" };
            format!("{table}{} events in {} chains: {verdict}\n", self.rows, self.heads.len())
        })?;
        for (tree, why) in &self.broken {
            say(&output::clean(&format!("{tree}: {why}")));
        }
        if ok { Ok(()) } else { Err(Failure::Exit(EXIT_OTHER)) }
    }
}

/// The hash of a row, if the row is the next one of its chain and bears that hash.
fn check(row: &AuditRow, head: Option<&Head>) -> Result<Hash, String> {
    let (position, previous) = head.map_or((0, GENESIS), |head| (head.position, head.hash));
    if row.position != position + 1 {
        return Err(format!(
            "it is event {} of its tree, and {} would be the next: events are missing",
            row.position,
            position + 1
        ));
    }
    let tree: Tree = row.tree.parse().map_err(|_| "its tree is no id".to_owned())?;
    if row.at != Time(row.at_ms) {
        return Err("its two times differ".to_owned());
    }
    let computed = link(
        &previous,
        &Row {
            tree: &tree,
            position: row.position,
            at: Time(row.at_ms),
            actor: &row.actor,
            kind: &row.kind,
            subject: &row.subject,
            data: &row.data,
        },
    );
    if hex(&computed) != row.hash {
        return Err("its hash is not that of its words: it, or one before it, was changed".into());
    }
    Ok(computed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trail() -> Vec<AuditRow> {
        let mut rows: Vec<AuditRow> = Vec::new();
        let trees = ["inst-01ARZ3NDEKTSV4RRFFQ69G5FAV", "inst-01ARZ3NDEKTSV4RRFFQ69G5FAW"];
        for seq in 1..=8_u64 {
            let name = trees[(seq % 2) as usize];
            let tree: Tree = name.parse().unwrap();
            let last = rows.iter().rev().find(|row| row.tree == name);
            let previous = last.map_or(GENESIS, |row| {
                let mut hash = GENESIS;
                for (byte, pair) in hash.iter_mut().zip(row.hash.as_bytes().chunks(2)) {
                    *byte = u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
                }
                hash
            });
            let (position, at) = (last.map_or(1, |row| row.position + 1), Time(1_000 + seq as i64));
            let (actor, kind, data) = ("host", "instance.spawned", "{}");
            let row = Row { tree: &tree, position, at, actor, kind, subject: name, data };
            rows.push(AuditRow {
                seq,
                tree: name.into(),
                position,
                at_ms: at.0,
                at,
                actor: actor.into(),
                kind: kind.into(),
                subject: name.into(),
                data: data.into(),
                hash: hex(&link(&previous, &row)),
            });
        }
        rows
    }

    fn verdict(rows: &[AuditRow]) -> Chains {
        let mut chains = Chains::default();
        for row in rows {
            chains.take(&serde_json::to_vec(row).unwrap(), None);
        }
        chains
    }

    #[test]
    fn a_whole_trail_is_unbroken() {
        let chains = verdict(&trail());
        assert!(chains.broken.is_empty(), "{:?}", chains.broken);
        assert_eq!((chains.rows, chains.heads.len()), (8, 2));
    }

    #[test]
    fn every_change_is_seen() {
        let changes: [fn(&mut Vec<AuditRow>); 8] = [
            |rows| rows[2].actor = "guest:1".into(),
            |rows| rows[2].kind = "instance.deleted".into(),
            |rows| rows[2].subject = "x".into(),
            |rows| rows[2].data = "{ }".into(),
            |rows| rows[2].at_ms += 1,
            |rows| rows[2].at = Time(0),
            |rows| drop(rows.remove(2)),
            |rows| rows.swap(2, 4),
        ];
        for (i, change) in changes.iter().enumerate() {
            let mut rows = trail();
            change(&mut rows);
            assert_eq!(verdict(&rows).broken.len(), 1, "change {i}");
        }
        let mut chains = verdict(&trail());
        chains.take(b"nonsense", None);
        assert_eq!(chains.broken.len(), 1);
    }
}
