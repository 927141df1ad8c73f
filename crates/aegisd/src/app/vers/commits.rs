//! Commits by the vers API, and machines from them: those of machines that are lent, and no others of
//! this host.

use std::collections::BTreeMap;

use aegis_rules::instance::{Instance, Verb};
use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::host::{CommitBody, CreateBody, ForkBody};
use aegis_wire::vers::{Commit as Ask, CommitInfo};
use aegis_wire::words::{CommitId, Uuid};

use super::super::instances::{self, Created};
use super::super::{App, Error, Host, commits};
use super::{commit_id, commit_uuid, find, vm_id};
use crate::commits::Kept;

/// One that is lent; what is not, is not there.
fn lent(app: &App, commit: &Uuid) -> Result<Kept, Error> {
    let found = commit_id(commit).and_then(|id| app.ctx.commits.get(&id));
    let lent = found.filter(|kept| kept.commit.lent && !kept.commit.temporary);
    Ok(lent.ok_or_else(commits::not_found)?)
}

/// All of them.
pub fn list_commits(_: Host, app: &App) -> Vec<CommitInfo> {
    let all = app.ctx.commits.all();
    let lent = all.iter().filter(|kept| kept.commit.lent && !kept.commit.temporary);
    lent.map(|kept| info(app, kept)).collect()
}

fn info(app: &App, kept: &Kept) -> CommitInfo {
    let commit = &kept.commit;
    CommitInfo {
        commit_id: commit_uuid(&commit.id),
        owner_id: app.ctx.keys.lender.owner().to_string(),
        name: commit.name.as_ref().map(ToString::to_string).unwrap_or_default(),
        description: None,
        is_public: false,
        created_at: commit.created_at.to_string(),
        parent_vm_id: Some(vm_id(&commit.source)),
        grandparent_commit_id: None,
    }
}

/// Keeps a machine as it is now, memory and disk. With `keep_paused` its clock stands still afterwards.
pub async fn commit(
    host: Host,
    app: &App,
    vm: &Uuid,
    ask: Ask,
    keep_paused: bool,
) -> Result<Uuid, Error> {
    let source = find(host, app, vm)?;
    let name = ask.name.filter(|name| !name.is_empty());
    let (name, disk_only) = CommitBody { name, disk_only: false }.parse()?;
    let made = commits::commit(host, app, source.id.as_str(), name, disk_only).await?;
    if keep_paused {
        instances::act(host, app, source.id.as_str(), Verb::Pause).await?;
    }
    let id: CommitId = made.id.parse().map_err(|e| Error::Machine(format!("its commit: {e}")))?;
    Ok(commit_uuid(&id))
}

/// Removes one.
pub async fn remove_commit(host: Host, app: &App, commit: &Uuid) -> Result<(), Error> {
    let id = lent(app, commit)?.commit.id;
    match commits::remove(host, app, id.as_str()).await {
        Err(Error::Refused(refusal)) if refusal.code == Code::CommitInUse => {
            let n = commits::find(host, app, id.as_str())?.in_use;
            let message = format!("commit still has {n} active VM(s)");
            Err(Refusal::new(Code::CommitInUse, message).into())
        }
        done => done,
    }
}

/// Makes a machine from a commit: it goes on where that one was.
pub async fn from_commit(host: Host, app: &App, commit: &Uuid) -> Result<Instance, Error> {
    let id = lent(app, commit)?.commit.id;
    let body = CreateBody {
        commit: Some(id.to_string()),
        idle_policy: Some("leave-running".to_owned()),
        ..CreateBody::default()
    };
    let none = Some(BTreeMap::new());
    let created = instances::create_lent(host, app, body.parse()?, none).await?;
    let (Created::New(made) | Created::Restarted(made)) = created;
    Ok(made)
}

/// Makes so many machines from a commit; all or none.
pub async fn branch_commit(
    host: Host,
    app: &App,
    commit: &Uuid,
    count: u8,
) -> Result<Vec<Uuid>, Error> {
    let mut made: Vec<Instance> = Vec::new();
    for _ in 0..count {
        match from_commit(host, app, commit).await {
            Ok(one) => made.push(one),
            Err(error) => {
                for one in made {
                    instances::act(host, app, one.id.as_str(), Verb::Delete).await?;
                }
                return Err(error);
            }
        }
    }
    Ok(made.iter().map(|one| vm_id(&one.id)).collect())
}

/// Makes so many machines of one that runs; all or none.
pub async fn branch(host: Host, app: &App, vm: &Uuid, count: u8) -> Result<Vec<Uuid>, Error> {
    let source = find(host, app, vm)?;
    let ask = ForkBody { count: Some(u32::from(count)), ..ForkBody::default() }.parse()?;
    let forked = commits::fork(host, app, source.id.as_str(), ask).await?;
    Ok(forked.instances.iter().map(|one| vm_id(&one.id)).collect())
}
