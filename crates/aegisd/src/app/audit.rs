//! The audit trail, as a host takes it along to verify it elsewhere (contracts/couch.md 8).

use std::io;

use aegis_rules::audit::hex;
use aegis_wire::host::AuditRow;
use aegis_wire::words::Tree;
use tokio::sync::mpsc;

use super::{App, Error, Host};
use crate::ledger;

/// Rows that are read at once.
const BATCH: usize = 500;

/// All events after a position, of one tree or of all, as NDJSON lines in the order in which they
/// were written.
pub fn export(
    _: Host,
    app: &App,
    tree: Option<Tree>,
    after: u64,
) -> mpsc::Receiver<io::Result<String>> {
    let (send, lines) = mpsc::channel(BATCH);
    let app = app.clone();
    tokio::spawn(async move {
        if let Err(error) = pour(&app, tree.as_ref(), after, &send).await {
            let _ = send.send(Err(io::Error::other(error))).await;
        }
    });
    lines
}

async fn pour(
    app: &App,
    tree: Option<&Tree>,
    mut after: u64,
    send: &mpsc::Sender<io::Result<String>>,
) -> Result<(), Error> {
    loop {
        let rows = app.ctx.ledger.read(|f| f.events(tree, after, BATCH))?;
        let count = rows.len();
        for row in rows {
            after = row.seq;
            let mut line = line(row)?;
            line.push('\n');
            if send.send(Ok(line)).await.is_err() {
                return Ok(());
            }
        }
        if count < BATCH {
            return Ok(());
        }
    }
}

fn line(row: ledger::EventRow) -> io::Result<String> {
    serde_json::to_string(&AuditRow {
        seq: row.seq,
        tree: row.tree,
        position: row.position,
        at_ms: row.at.0,
        at: row.at,
        actor: row.actor,
        kind: row.kind,
        subject: row.subject,
        data: row.data,
        hash: hex(&row.hash),
    })
    .map_err(io::Error::other)
}
