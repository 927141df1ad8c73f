//! Writing: the schema, and what a set of changes does to the tables.

use std::collections::BTreeMap;

use aegis_rules::audit::{GENESIS, Hash, Note, Row, Subject, link};
use aegis_rules::cascade;
use aegis_rules::change::Change;
use aegis_wire::words::{InstanceId, Time, Tree};
use rusqlite::{Connection, OptionalExtension as _, params};

use super::tally::Written;
use super::{Error, Facts, rows};

const SCHEMA: i64 = 3;
/// From each older schema to the next one.
const STEPS: [&str; 2] = [include_str!("schema-1-to-2.sql"), include_str!("schema-2-to-3.sql")];

/// Brings a connection to the writer's settings and the file to this program's schema.
pub(super) fn prepare(connection: &Connection) -> Result<(), Error> {
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // FULL: what was acknowledged survives a power cut.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.set_prepared_statement_cache_capacity(64);
    let found: i64 = connection.query_row("PRAGMA user_version", [], |r| r.get(0))?;
    match found {
        0 => {
            connection.execute_batch("BEGIN IMMEDIATE")?;
            connection.execute_batch(include_str!("schema.sql"))?;
            connection.pragma_update(None, "user_version", SCHEMA)?;
            connection.execute_batch("COMMIT")?;
            Ok(())
        }
        1..SCHEMA => {
            connection.execute_batch("BEGIN IMMEDIATE")?;
            for step in &STEPS[usize::try_from(found - 1).unwrap_or_default()..] {
                connection.execute_batch(step)?;
            }
            connection.pragma_update(None, "user_version", SCHEMA)?;
            connection.execute_batch("COMMIT")?;
            Ok(())
        }
        SCHEMA => Ok(()),
        found => Err(Error::Newer { found, known: SCHEMA }),
    }
}

/// Brings a connection to a reader's settings.
pub(super) fn prepare_reader(connection: &Connection) -> Result<(), Error> {
    connection.pragma_update(None, "query_only", true)?;
    connection.busy_timeout(std::time::Duration::from_secs(5))?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(())
}

/// What a set of changes came to.
pub(super) struct Applied {
    /// Instances that were touched only by what followed.
    pub(super) touched: Vec<InstanceId>,
    /// What there is to count.
    pub(super) written: Written,
}

/// Applies changes in their order, and what follows from them for the trees that they touched: the
/// rows, and the audit trail of each.
pub(super) fn apply(
    connection: &Connection,
    actor: &str,
    changes: &[Change],
) -> Result<Applied, Error> {
    let facts = Facts::new(connection);
    let mut written = Written::default();
    let mut moved: BTreeMap<Tree, Time> = BTreeMap::new();
    for change in changes {
        let Some(tree) = apply_one(connection, &facts, change, &mut written)? else { continue };
        append(connection, &tree, actor, change)?;
        if moves_a_tree(change) {
            let at = change_time(change).unwrap_or(Time(0));
            moved.entry(tree).and_modify(|last| *last = at.max(*last)).or_insert(at);
        }
    }
    let mut touched = Vec::new();
    for (tree, at) in moved {
        let family = facts.family(&tree)?;
        let guest = match family.iter().find_map(|i| i.guest.as_ref()) {
            Some(id) => facts.guest(id)?,
            None => None,
        };
        for change in cascade::follow(&family, guest.as_ref(), at) {
            if let Some(tree) = apply_one(connection, &facts, &change, &mut written)? {
                append(connection, &tree, actor, &change)?;
            }
            // Of one that is forgotten its driver removes what is left.
            if let Change::InstanceWanted { id, .. } | Change::InstanceForgotten { id, .. } = change
            {
                touched.push(id);
            }
        }
    }
    Ok(Applied { touched, written })
}

/// Whether something may follow from it for others of its tree.
fn moves_a_tree(change: &Change) -> bool {
    matches!(
        change,
        Change::InstanceCreated(_)
            | Change::InstanceWanted { .. }
            | Change::InstanceStarts { .. }
            | Change::InstanceDestroyed { .. }
            | Change::InstanceForgotten { .. }
    )
}

/// Writes one change's row, and says whose chain it belongs to.
fn apply_one(
    connection: &Connection,
    facts: &Facts<'_>,
    change: &Change,
    written: &mut Written,
) -> Result<Option<Tree>, Error> {
    written.note(change);
    match change {
        Change::InviteCreated(invite) => {
            rows::put_invite(connection, invite)?;
            return Ok(Some(Tree::Invite(invite.id.clone())));
        }
        Change::GuestCreated(guest) => {
            rows::put_guest(connection, guest)?;
            return Ok(Some(Tree::Invite(guest.invite.clone())));
        }
        Change::InstanceCreated(instance) => {
            rows::put_instance(connection, instance)?;
            return Ok(Some(instance.tree.clone()));
        }
        _ => {}
    }
    match change.subject() {
        Subject::Invite(id) => facts.invite(&id)?.map(|mut invite| {
            invite.apply(change);
            rows::put_invite(connection, &invite).map(|()| Tree::Invite(id))
        }),
        Subject::Guest(id) => facts.guest(&id)?.map(|mut guest| {
            let before = guest.clone();
            guest.apply(change);
            written.note_guest(&before, &guest);
            rows::put_guest(connection, &guest).map(|()| Tree::Invite(guest.invite))
        }),
        // No change is about one: see secrets.rs.
        Subject::Secret(_) => None,
        Subject::Instance(id) => facts.instance(&id)?.map(|mut instance| {
            if let Change::InstanceForgotten { .. } = change {
                connection
                    .prepare_cached("DELETE FROM instance WHERE id = ?1")?
                    .execute([id.as_str()])?;
            } else {
                let before = instance.clone();
                instance.apply(change);
                written.note_machine(&before, &instance);
                rows::put_instance(connection, &instance)?;
            }
            Ok(instance.tree)
        }),
    }
    .transpose()
}

fn append(connection: &Connection, tree: &Tree, actor: &str, change: &Change) -> Result<(), Error> {
    match change.note() {
        Some(note) => append_note(connection, tree, actor, note, change_time(change)),
        None => Ok(()),
    }
}

/// Adds a row to a tree's chain.
pub(super) fn append_note(
    connection: &Connection,
    tree: &Tree,
    actor: &str,
    note: Note,
    at: Option<Time>,
) -> Result<(), Error> {
    let last: Option<(u64, Hash)> = connection
        .prepare_cached(
            "SELECT position, hash FROM event WHERE tree = ?1 ORDER BY position DESC LIMIT 1",
        )?
        .query_row([tree.to_string()], |r| Ok((r.get(0)?, r.get(1)?)))
        .optional()?;
    let (position, previous) = last.map_or((1, GENESIS), |(p, h)| (p + 1, h));
    // An ordered map: the text is the same whoever writes it again.
    let data: BTreeMap<&str, String> = note.data.into_iter().collect();
    let data = serde_json::to_string(&data).map_err(|e| Error::Commit(e.to_string()))?;
    let at = at.unwrap_or(Time(0));
    let row =
        Row { tree, position, at, actor, kind: note.kind, subject: note.subject.id(), data: &data };
    let hash = link(&previous, &row);
    connection
        .prepare_cached(
            "INSERT INTO event (tree, position, at, actor, kind, subject, data, hash)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        )?
        .execute(params![
            tree.to_string(),
            position,
            at.0,
            actor,
            note.kind,
            note.subject.id(),
            data,
            hash
        ])?;
    Ok(())
}

fn change_time(change: &Change) -> Option<Time> {
    Some(match change {
        Change::InviteCreated(i) => i.created_at,
        Change::GuestCreated(g) => g.created_at,
        Change::InstanceCreated(i) => i.created_at,
        Change::InviteRedeemed { at, .. }
        | Change::InviteRevoked { at, .. }
        | Change::InviteExpired { at, .. }
        | Change::GuestActivated { at, .. }
        | Change::GuestMoved { at, .. }
        | Change::ProvisionFailed { at, .. }
        | Change::LimitsExceeded { at, .. }
        | Change::LimitsEased { at, .. }
        | Change::GuestLimits { at, .. }
        | Change::RequestDecided { at, .. }
        | Change::EgressSet { at, .. }
        | Change::EgressDenied { at, .. }
        | Change::InstanceEnvelope { at, .. }
        | Change::KillUnverified { at, .. }
        | Change::InstanceWanted { at, .. }
        | Change::InstanceStarts { at, .. }
        | Change::InstanceDisabled { at, .. }
        | Change::InstanceRuns { at, .. }
        | Change::InstanceFroze { at, .. }
        | Change::BootFailed { at, .. }
        | Change::InstanceCleared { at, .. }
        | Change::InstanceForgotten { at, .. }
        | Change::InstanceToken { at, .. }
        | Change::VmIntended { at, .. }
        | Change::VmClaimed { at, .. }
        | Change::VmAbsent { at, .. }
        | Change::InstanceLabelled { at, .. }
        | Change::InstanceSecrets { at, .. }
        | Change::InstanceCommitted { at, .. }
        | Change::TokensReserved { at, .. }
        | Change::TokensSettled { at, .. }
        | Change::LeaseHeld { at, .. }
        | Change::LeaseReleased { at, .. }
        | Change::InstanceExposed { at, .. }
        | Change::InstanceUnexposed { at, .. }
        | Change::GuestDenied { at, .. }
        | Change::ChildExec { at, .. }
        | Change::ChildFiles { at, .. } => *at,
        Change::RequestRaised { request, .. } => request.at,
        Change::KillVerified { receipt, .. } => {
            receipt.machines.iter().map(|m| m.destroyed_at).max()?
        }
        Change::InstanceEnded { exit, .. } => exit.at,
        Change::InstanceDestroyed { end, .. } => end.destroyed_at,
        Change::UsageReported { .. }
        | Change::InstancePort { .. }
        | Change::InstanceUsed { .. }
        | Change::EgressAllowed { .. }
        | Change::EgressCalledBack { .. }
        | Change::InstanceAbsorbed { .. }
        | Change::DestroyFailed { .. } => return None,
    })
}
