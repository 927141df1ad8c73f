//! Events as they happen (contracts/couch.md 8): read from the ledger page by page, so that nothing
//! waits in memory for who is slow, and whoever comes back goes on where it was.

use std::collections::VecDeque;

use aegis_rules::refusal::Refusal;
use aegis_wire::bounds::EVENT_PAGE;
use aegis_wire::couch::{Event, EventKind};
use aegis_wire::words::{GuestId, Tree};
use tokio::sync::watch;

use super::{App, Error, Host, guest_not_found};
use crate::ledger::EventRow;

/// Behind which event to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// Behind the newest.
    Now,
    /// Before the first.
    Start,
    /// Behind this one, as its reader was told.
    After(u64),
}

/// Which events are asked for.
#[derive(Clone, Debug)]
pub struct Ask {
    /// From where on.
    pub begin: Begin,
    /// Only kinds that begin so.
    pub kind: Option<EventKind>,
    /// Only what concerns this guest: its invite, itself, its machines.
    pub guest: Option<GuestId>,
    /// Go on with what comes; else end with what is there.
    pub follow: bool,
}

/// Events in their order, each once.
pub struct Feed {
    app: App,
    kind: Option<EventKind>,
    tree: Option<String>,
    /// All up to here were looked at.
    after: u64,
    /// Where to end.
    until: Option<u64>,
    page: VecDeque<EventRow>,
    commits: watch::Receiver<u64>,
}

/// Opens a feed.
pub fn open(_: Host, app: &App, ask: Ask) -> Result<Feed, Error> {
    let commits = app.ctx.ledger.commits();
    let (tree, last) = app.ctx.ledger.read(|f| {
        let tree = match &ask.guest {
            None => None,
            Some(id) => Some(f.guest(id)?.map(|guest| Tree::Invite(guest.invite).to_string())),
        };
        Ok((tree, f.last_event()?))
    })?;
    let tree = tree.map(|tree| tree.ok_or_else(guest_not_found)).transpose()?;
    let after = match ask.begin {
        Begin::Now => last,
        Begin::Start => 0,
        // Of another ledger, or of this one before it was put back: waiting for it would be a hole.
        Begin::After(seq) if seq > last => {
            return Err(
                Refusal::field("since", format!("the seq of an event, at most {last}")).into()
            );
        }
        Begin::After(seq) => seq,
    };
    let until = (!ask.follow).then_some(last);
    let app = app.clone();
    Ok(Feed { app, kind: ask.kind, tree, after, until, page: VecDeque::new(), commits })
}

impl Feed {
    /// Behind which event the next one is looked for.
    pub fn position(&self) -> u64 {
        self.after
    }

    fn admits(&self, row: &EventRow) -> bool {
        self.tree.as_ref().is_none_or(|tree| *tree == row.tree)
            && self.kind.as_ref().is_none_or(|kind| kind.admits(&row.kind))
    }

    /// The next event; none at the end. May be dropped while it waits.
    pub async fn next(&mut self) -> Result<Option<Event>, Error> {
        loop {
            if let Some(row) = self.page.pop_front() {
                self.after = row.seq;
                if self.until.is_some_and(|until| row.seq > until) {
                    return Ok(None);
                }
                if self.admits(&row) {
                    return event(row).map(Some);
                }
                continue;
            }
            // Before the look: what is written after it is looked for again.
            self.commits.borrow_and_update();
            // All rows, of which those that are not asked for are looked at once: a look costs what
            // is new, however much else happens.
            let rows = self.app.ctx.ledger.read(|f| f.events(None, self.after, EVENT_PAGE))?;
            let waits = rows.is_empty();
            if waits && (self.until.is_some() || self.commits.changed().await.is_err()) {
                return Ok(None);
            }
            self.page = rows.into();
            // Where few match, others want their turn too.
            tokio::task::yield_now().await;
        }
    }
}

fn event(row: EventRow) -> Result<Event, Error> {
    Ok(Event {
        seq: row.seq,
        at: row.at,
        actor: row.actor,
        kind: row.kind,
        subject: row.subject,
        tree: row.tree,
        data: serde_json::from_str(&row.data).map_err(std::io::Error::other)?,
    })
}
