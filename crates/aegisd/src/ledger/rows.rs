//! Records as rows. Columns are what is searched by; the rest is JSON of shapes that only this file
//! knows, so that a field which is missing here is noticed here.

mod given;
mod reach;
mod remote;
mod shapes;

use aegis_rules::guest::{Guest, GuestStatus};
use aegis_rules::instance::{Instance, InstanceState, Wanted};
use aegis_rules::invite::{Invite, InviteStatus, SecretHash};
use aegis_wire::words::{EgressBytes, OnLimit, Time};
use rusqlite::{Connection, Row, params};
use serde::de::DeserializeOwned;

use super::Error;
use reach::RequestRow;
use shapes::{GuestDetail, InstanceDetail, OfferRow, SpecRow};

fn damaged(table: &'static str, id: &str, what: impl ToString) -> Error {
    Error::Damaged { table, id: id.to_owned(), what: what.to_string() }
}

/// Reads one row with errors that name it.
struct Reader<'a> {
    row: &'a Row<'a>,
    table: &'static str,
    id: String,
}

impl<'a> Reader<'a> {
    fn new(row: &'a Row<'a>, table: &'static str) -> Result<Reader<'a>, Error> {
        Ok(Reader { row, table, id: row.get("id")? })
    }

    fn bad(&self, what: impl ToString) -> Error {
        damaged(self.table, &self.id, what)
    }

    fn word<T>(&self, column: &str) -> Result<T, Error>
    where
        T: TryFrom<String>,
        T::Error: ToString,
    {
        let text: String = self.row.get(column)?;
        T::try_from(text).map_err(|e| self.bad(e))
    }

    fn maybe<T>(&self, column: &str) -> Result<Option<T>, Error>
    where
        T: TryFrom<String>,
        T::Error: ToString,
    {
        let text: Option<String> = self.row.get(column)?;
        text.map(T::try_from).transpose().map_err(|e| self.bad(e))
    }

    fn state<T>(&self, column: &str, parse: fn(&str) -> Option<T>) -> Result<T, Error> {
        let text: String = self.row.get(column)?;
        parse(&text).ok_or_else(|| self.bad(format!("{column} is {text}")))
    }

    fn json<T: DeserializeOwned>(&self, column: &str) -> Result<T, Error> {
        let text: String = self.row.get(column)?;
        serde_json::from_str(&text).map_err(|e| self.bad(e))
    }

    fn time(&self, column: &str) -> Result<Time, Error> {
        Ok(Time(self.row.get(column)?))
    }

    fn maybe_time(&self, column: &str) -> Result<Option<Time>, Error> {
        let at: Option<i64> = self.row.get(column)?;
        Ok(at.map(Time))
    }
}

fn json<T: serde::Serialize>(table: &'static str, id: &str, value: &T) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|e| damaged(table, id, e))
}

pub(super) fn put_invite(connection: &Connection, i: &Invite) -> Result<(), Error> {
    connection
        .prepare_cached(
            "INSERT INTO invite (id, code_hash, status, created_by, label, offer, created_at,
                                 expires_at, redeemed_at, redeemed_by, guest_id)
             VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11)
             ON CONFLICT (id) DO UPDATE SET status = ?3, redeemed_at = ?9, redeemed_by = ?10,
                                            guest_id = ?11",
        )?
        .execute(params![
            i.id.as_str(),
            i.code_hash.0,
            i.status.word(),
            i.created_by.as_str(),
            i.label.as_ref().map(|l| l.as_str()),
            json("invite", i.id.as_str(), &OfferRow::of(i))?,
            i.created_at.0,
            i.expires_at.0,
            i.redeemed_at.map(|t| t.0),
            i.redeemed_by.as_ref().map(|l| l.as_str()),
            i.guest_id.as_ref().map(|g| g.as_str()),
        ])?;
    Ok(())
}

pub(super) fn invite(row: &Row<'_>) -> Result<Invite, Error> {
    let r = Reader::new(row, "invite")?;
    let (limits, permissions, offer) = r.json::<OfferRow>("offer")?.into_words();
    Ok(Invite {
        id: r.word("id")?,
        code_hash: SecretHash(row.get("code_hash")?),
        status: r.state("status", InviteStatus::parse)?,
        created_by: r.word("created_by")?,
        label: r.maybe("label")?,
        limits,
        permissions,
        offer,
        created_at: r.time("created_at")?,
        expires_at: r.time("expires_at")?,
        redeemed_at: r.maybe_time("redeemed_at")?,
        redeemed_by: r.maybe("redeemed_by")?,
        guest_id: r.maybe("guest_id")?,
    })
}

pub(super) fn put_guest(connection: &Connection, g: &Guest) -> Result<(), Error> {
    connection
        .prepare_cached(
            "INSERT INTO guest (id, invite, name, token_hash, status, instance, detail, created_at,
                                expires_at, stopped_at)
             VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10)
             ON CONFLICT (id) DO UPDATE SET status = ?5, instance = ?6, detail = ?7,
                                            expires_at = ?9, stopped_at = ?10",
        )?
        .execute(params![
            g.id.as_str(),
            g.invite.as_str(),
            g.name.as_str(),
            g.token_hash.0,
            g.status.word(),
            g.instance.as_ref().map(|i| i.as_str()),
            json("guest", g.id.as_str(), &GuestDetail::of(g))?,
            g.created_at.0,
            g.expires_at.0,
            g.stopped_at.map(|t| t.0),
        ])?;
    Ok(())
}

pub(super) fn guest(row: &Row<'_>) -> Result<Guest, Error> {
    let r = Reader::new(row, "guest")?;
    let d: GuestDetail = r.json("detail")?;
    Ok(Guest {
        id: r.word("id")?,
        invite: r.word("invite")?,
        name: r.word("name")?,
        public_key: d.public_key,
        token_hash: SecretHash(row.get("token_hash")?),
        idempotency: d.idempotency.map(SecretHash),
        status: r.state("status", GuestStatus::parse)?,
        provisioner: d.provisioner.into(),
        limits: d.limits.into(),
        permissions: d.permissions.into(),
        instance: r.maybe("instance")?,
        vm_id: d.vm_id,
        agent_endpoint: d.agent_endpoint,
        provision_error: d.provision_error,
        reported: d.reported.into(),
        limits_exceeded: d.limits_exceeded,
        on_limit: d.on_limit.as_deref().and_then(OnLimit::parse),
        frozen_by_limit: d.frozen_by_limit,
        requests: d
            .requests
            .into_iter()
            .map(RequestRow::into_words)
            .collect::<Result<_, _>>()
            .map_err(|e| r.bad(e))?,
        created_at: r.time("created_at")?,
        expires_at: r.time("expires_at")?,
        stopped_at: r.maybe_time("stopped_at")?,
        receipt: d.receipt.map(Into::into),
    })
}

/// What a machine takes of this host: nothing where it is in another cloud.
fn here(instance: &Instance, amount: u64) -> u64 {
    if instance.remote.is_some() { 0 } else { amount }
}

pub(super) fn put_instance(connection: &Connection, i: &Instance) -> Result<(), Error> {
    connection
        .prepare_cached(
            "INSERT INTO instance (id, tree, guest, parent, handle, wanted, state, memory_mb,
                                   disk_bytes, spec, detail, created_at, updated_at, ends_at)
             VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14)
             ON CONFLICT (id) DO UPDATE SET wanted = ?6, state = ?7, spec = ?10, detail = ?11,
                                            updated_at = ?13, ends_at = ?14",
        )?
        .execute(params![
            i.id.as_str(),
            i.tree.to_string(),
            i.guest.as_ref().map(|g| g.as_str()),
            i.parent.as_ref().map(|p| p.as_str()),
            i.spec.handle.as_ref().map(|h| h.as_str()),
            i.wanted.word(),
            i.state.word(),
            here(i, u64::from(i.spec.memory.0)),
            here(i, i.spec.disk.0),
            json("instance", i.id.as_str(), &SpecRow::of(&i.spec))?,
            json("instance", i.id.as_str(), &InstanceDetail::of(i))?,
            i.created_at.0,
            i.updated_at.0,
            i.ends_at.map(|t| t.0),
        ])?;
    Ok(())
}

pub(super) fn instance(row: &Row<'_>) -> Result<Instance, Error> {
    let r = Reader::new(row, "instance")?;
    let d: InstanceDetail = r.json("detail")?;
    let tree: String = row.get("tree")?;
    Ok(Instance {
        id: r.word("id")?,
        tree: tree.parse().map_err(|e| r.bad(e))?,
        guest: r.maybe("guest")?,
        parent: r.maybe("parent")?,
        spec: r.json::<SpecRow>("spec")?.into_words().map_err(|e| r.bad(e))?,
        remote: d.remote.map(Into::into),
        lent: d.lent,
        capabilities: d.capabilities.into(),
        envelope: d.envelope.into(),
        egress: d.egress.into(),
        egress_allowed: EgressBytes(d.egress_allowed),
        egress_version: d.egress_version,
        ends_at: r.maybe_time("ends_at")?,
        jti: d.jti,
        lease: d.lease.map(Into::into),
        wanted: r.state("wanted", Wanted::parse)?,
        state: r.state("state", InstanceState::parse)?,
        enabled: d.enabled,
        attempts: d.attempts,
        retry_at: d.retry_at.map(Time),
        last_error: d.last_error,
        boot_id: d.boot_id,
        usage_past: d.usage_past.into(),
        usage_boot: d.usage_boot.into(),
        usage_below: d.usage_below.into(),
        tokens_reserved: d.tokens_reserved,
        exit: d.exit.map(Into::into),
        frozen_at: d.frozen_at.map(Time),
        end: d.end.map(Into::into),
        created_at: r.time("created_at")?,
        updated_at: r.time("updated_at")?,
        stopped_at: d.stopped_at.map(Time),
    })
}
