//! Reading: facts for decisions and for answers.

use aegis_rules::audit::Hash;
use aegis_rules::capacity::Held;
use aegis_rules::guest::{Guest, GuestStatus};
use aegis_rules::instance::Instance;
use aegis_rules::invite::{Invite, InviteStatus, SecretHash};
use aegis_wire::words::{GuestId, Handle, InstanceId, InviteId, Time, Tree};
use rusqlite::{Connection, OptionalExtension as _, Params, Row, params};

use super::{Error, rows};

/// Facts as one connection sees them: inside a write, those of its transaction.
pub struct Facts<'a> {
    pub(super) connection: &'a Connection,
}

/// A page of a list, newest first.
pub struct Page<T> {
    /// Its rows.
    pub rows: Vec<T>,
    /// Id after which the next page begins, when there is one.
    pub next: Option<String>,
}

/// A row of the audit trail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventRow {
    /// Its place among all rows.
    pub seq: u64,
    /// Whose chain it belongs to.
    pub tree: String,
    /// Its place in that chain, from 1.
    pub position: u64,
    /// When.
    pub at: Time,
    /// Who did it.
    pub actor: String,
    /// The event's name.
    pub kind: String,
    /// Id of what it is about.
    pub subject: String,
    /// The data, in the text that was hashed.
    pub data: String,
    /// `aegis_rules::audit::link` of the chain's row before it and of this one.
    pub hash: Hash,
}

impl<'a> Facts<'a> {
    pub(super) fn new(connection: &'a Connection) -> Facts<'a> {
        Facts { connection }
    }

    fn one<T>(
        &self,
        sql: &str,
        with: impl Params,
        map: fn(&Row<'_>) -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        let mut statement = self.connection.prepare_cached(sql)?;
        let mut found = statement.query(with)?;
        found.next()?.map(map).transpose()
    }

    fn many<T>(
        &self,
        sql: &str,
        with: impl Params,
        map: fn(&Row<'_>) -> Result<T, Error>,
    ) -> Result<Vec<T>, Error> {
        let mut statement = self.connection.prepare_cached(sql)?;
        let mut found = statement.query(with)?;
        let mut out = Vec::new();
        while let Some(row) = found.next()? {
            out.push(map(row)?);
        }
        Ok(out)
    }

    /// The invite with this id.
    pub fn invite(&self, id: &InviteId) -> Result<Option<Invite>, Error> {
        self.one("SELECT * FROM invite WHERE id = ?1", [id.as_str()], rows::invite)
    }

    /// The invite whose code has this hash.
    pub fn invite_by_code(&self, hash: &SecretHash) -> Result<Option<Invite>, Error> {
        self.one("SELECT * FROM invite WHERE code_hash = ?1", [hash.0], rows::invite)
    }

    /// Invites with a status that holds now, newest first, after the cursor.
    pub fn invites(
        &self,
        status: Option<InviteStatus>,
        now: Time,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<Invite>, Error> {
        // The clock decides what is expired, not the last sweep.
        let clause = match status {
            None => "?1 IS NOT NULL",
            Some(InviteStatus::Active) => "status = 'active' AND expires_at > ?1",
            Some(InviteStatus::Expired) => {
                "(status = 'expired' OR (status = 'active' AND expires_at <= ?1))"
            }
            Some(InviteStatus::Redeemed) => "status = 'redeemed' AND ?1 IS NOT NULL",
            Some(InviteStatus::Revoked) => "status = 'revoked' AND ?1 IS NOT NULL",
        };
        let sql = format!(
            "SELECT * FROM invite WHERE {clause} AND (?2 IS NULL OR id < ?2) ORDER BY id DESC LIMIT ?3"
        );
        let found = self.many(&sql, params![now.0, after, limit + 1], rows::invite)?;
        Ok(page(found, limit, |i| i.id.to_string()))
    }

    /// The guest with this id.
    pub fn guest(&self, id: &GuestId) -> Result<Option<Guest>, Error> {
        self.one("SELECT * FROM guest WHERE id = ?1", [id.as_str()], rows::guest)
    }

    /// The guest whose machine, or below whose machine, an instance is.
    pub fn guest_of(&self, instance: &Instance) -> Result<Option<Guest>, Error> {
        instance.guest.as_ref().map_or(Ok(None), |id| self.guest(id))
    }

    /// The guest whose token has this hash.
    pub fn guest_by_token(&self, hash: &SecretHash) -> Result<Option<Guest>, Error> {
        self.one("SELECT * FROM guest WHERE token_hash = ?1", [hash.0], rows::guest)
    }

    /// Guests with a status that holds now, newest first, after the cursor.
    pub fn guests(
        &self,
        status: Option<GuestStatus>,
        now: Time,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<Guest>, Error> {
        let live = "status IN ('provisioning','running','frozen')";
        let clause = match status {
            None => "?1 IS NOT NULL".to_owned(),
            Some(GuestStatus::Expired) => {
                format!("(status = 'expired' OR ({live} AND expires_at <= ?1))")
            }
            Some(s) if s.is_live() => format!("status = '{}' AND expires_at > ?1", s.word()),
            Some(s) => format!("status = '{}' AND ?1 IS NOT NULL", s.word()),
        };
        let sql = format!(
            "SELECT * FROM guest WHERE {clause} AND (?2 IS NULL OR id < ?2) ORDER BY id DESC LIMIT ?3"
        );
        let found = self.many(&sql, params![now.0, after, limit + 1], rows::guest)?;
        Ok(page(found, limit, |g| g.id.to_string()))
    }

    /// Guests that have not ended, newest first.
    pub fn live_guests(&self, now: Time, limit: usize) -> Result<Vec<Guest>, Error> {
        self.many(
            "SELECT * FROM guest WHERE status IN ('provisioning','running','frozen')
               AND expires_at > ?1 ORDER BY id DESC LIMIT ?2",
            params![now.0, limit],
            rows::guest,
        )
    }

    /// The instance with this id.
    pub fn instance(&self, id: &InstanceId) -> Result<Option<Instance>, Error> {
        self.one("SELECT * FROM instance WHERE id = ?1", [id.as_str()], rows::instance)
    }

    /// The instance with this handle that is not gone.
    pub fn instance_by_handle(&self, handle: &Handle) -> Result<Option<Instance>, Error> {
        self.one(
            "SELECT * FROM instance WHERE handle = ?1 AND state <> 'gone'",
            [handle.as_str()],
            rows::instance,
        )
    }

    /// All machines that a guest has or had.
    pub fn instances_of(&self, guest: &GuestId) -> Result<Vec<Instance>, Error> {
        self.many(
            "SELECT * FROM instance WHERE guest = ?1 ORDER BY id",
            [guest.as_str()],
            rows::instance,
        )
    }

    /// All records of a tree: a root and everything that descends from it, gone ones included as
    /// long as they are kept.
    pub fn family(&self, tree: &Tree) -> Result<Vec<Instance>, Error> {
        self.many(
            "SELECT * FROM instance WHERE tree = ?1 ORDER BY id",
            [tree.to_string()],
            rows::instance,
        )
    }

    /// Rows of the audit trail behind this place, of one tree or of all, oldest first.
    pub fn events(
        &self,
        tree: Option<&Tree>,
        after_seq: u64,
        limit: usize,
    ) -> Result<Vec<EventRow>, Error> {
        let tree = tree.map(ToString::to_string);
        // Two statements: each has its index.
        let clause = if tree.is_some() { "tree = ?2" } else { "?2 IS NULL" };
        let sql = format!("SELECT * FROM event WHERE seq > ?1 AND {clause} ORDER BY seq LIMIT ?3");
        self.many(&sql, params![after_seq, tree, limit], |r| {
            Ok(EventRow {
                seq: r.get("seq")?,
                tree: r.get("tree")?,
                position: r.get("position")?,
                at: Time(r.get("at")?),
                actor: r.get("actor")?,
                kind: r.get("kind")?,
                subject: r.get("subject")?,
                data: r.get("data")?,
                hash: r.get("hash")?,
            })
        })
    }

    /// The place of the newest row of the audit trail; 0 where there is none.
    pub fn last_event(&self) -> Result<u64, Error> {
        let sql = "SELECT coalesce(max(seq), 0) FROM event";
        Ok(self.connection.prepare_cached(sql)?.query_row([], |r| r.get(0))?)
    }

    /// All instances that are not gone, oldest first.
    pub fn instances(&self) -> Result<Vec<Instance>, Error> {
        self.many("SELECT * FROM instance WHERE state <> 'gone' ORDER BY id", [], rows::instance)
    }

    /// Instances with LLM calls that were not settled, also those that are gone.
    pub fn with_reserved_tokens(&self) -> Result<Vec<Instance>, Error> {
        self.many(
            "SELECT * FROM instance WHERE json_extract(detail, '$.tokens_reserved') > 0 ORDER BY id",
            [],
            rows::instance,
        )
    }

    /// Instances whose machines are in another cloud, and gone ones that may have left one there since
    /// this time.
    pub fn in_cloud(&self, since: Time) -> Result<Vec<Instance>, Error> {
        self.many(
            "SELECT * FROM instance WHERE json_extract(detail, '$.remote') IS NOT NULL
             AND (state <> 'gone' OR json_extract(detail, '$.remote.unclear[1]') >= ?1)
             ORDER BY id",
            [since.0],
            rows::instance,
        )
    }

    /// What live machines hold of this host.
    pub fn held(&self) -> Result<Held, Error> {
        let found = self
            .connection
            .prepare_cached(
                "SELECT count(*) FILTER (WHERE state <> 'stopped'),
                        coalesce(sum(memory_mb) FILTER (WHERE state <> 'stopped'), 0),
                        coalesce(sum(disk_bytes), 0)
                 FROM instance
                 WHERE state <> 'gone' AND json_extract(detail, '$.remote') IS NULL",
            )?
            .query_row([], |r| {
                Ok(Held { machines: r.get(0)?, memory_mb: r.get(1)?, disk_bytes: r.get(2)? })
            })?;
        Ok(found)
    }

    /// Active invites whose time is over.
    pub fn due_invites(&self, now: Time, limit: usize) -> Result<Vec<Invite>, Error> {
        self.many(
            "SELECT * FROM invite WHERE status = 'active' AND expires_at <= ?1
             ORDER BY expires_at LIMIT ?2",
            params![now.0, limit],
            rows::invite,
        )
    }

    /// Guests whose time is over and that live, or whose machine is still kept.
    pub fn due_guests(&self, now: Time, limit: usize) -> Result<Vec<Guest>, Error> {
        self.many(
            "SELECT * FROM guest WHERE expires_at <= ?1 AND (
               status IN ('provisioning','running','frozen')
               OR EXISTS (SELECT 1 FROM instance i WHERE i.guest = guest.id AND i.wanted <> 'gone'))
             ORDER BY expires_at LIMIT ?2",
            params![now.0, limit],
            rows::guest,
        )
    }

    /// Instances that run on though the time of their envelope is over.
    pub fn due_instances(&self, now: Time, limit: usize) -> Result<Vec<Instance>, Error> {
        self.many(
            "SELECT * FROM instance WHERE ends_at <= ?1 AND wanted NOT IN ('stopped', 'gone')
             ORDER BY ends_at LIMIT ?2",
            params![now.0, limit],
            rows::instance,
        )
    }

    /// When the next invite, guest or instance is due.
    pub fn next_due(&self) -> Result<Option<Time>, Error> {
        let found: Option<i64> = self
            .connection
            .prepare_cached(
                "SELECT min(t) FROM (
                   SELECT min(expires_at) AS t FROM invite WHERE status = 'active'
                   UNION ALL SELECT min(ends_at) FROM instance
                     WHERE ends_at IS NOT NULL AND wanted NOT IN ('stopped', 'gone')
                   UNION ALL SELECT min(expires_at) FROM guest g WHERE
                     status IN ('provisioning','running','frozen') OR EXISTS
                       (SELECT 1 FROM instance i WHERE i.guest = g.id AND i.wanted <> 'gone'))",
            )?
            .query_row([], |r| r.get(0))
            .optional()?
            .flatten();
        Ok(found.map(Time))
    }

    /// Active invites and live guests at this time.
    pub fn counts(&self, now: Time) -> Result<(u64, u64), Error> {
        let found = self
            .connection
            .prepare_cached(
                "SELECT (SELECT count(*) FROM invite WHERE status = 'active' AND expires_at > ?1),
                        (SELECT count(*) FROM guest WHERE
                           status IN ('provisioning','running','frozen') AND expires_at > ?1)",
            )?
            .query_row([now.0], |r| Ok((r.get(0)?, r.get(1)?)))?;
        Ok(found)
    }
}

fn page<T>(mut rows: Vec<T>, limit: usize, id: impl Fn(&T) -> String) -> Page<T> {
    let more = rows.len() > limit;
    rows.truncate(limit);
    let next = if more { rows.last().map(id) } else { None };
    Page { rows, next }
}
