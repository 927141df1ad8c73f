//! This host as a vers cloud for others: their machines are instances here, and only those that were
//! made by that API are theirs to see. A machine's UUID there is its ULID here, bit by bit, so that
//! nothing has to be remembered.

mod commits;
mod files;

pub use commits::*;
pub use files::*;

use std::collections::BTreeMap;

use aegis_rules::change::Change;
use aegis_rules::instance::{Instance, InstanceState, Verb, Wanted};
use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::host::{CreateBody, Exec};
use aegis_wire::vers::{
    LABEL_BYTES_MAX, LABELS_MAX, Vm, VmConfig, VmMetadata, VmState, WrittenState,
};
use aegis_wire::words::{CommitId, InstanceId, Uuid};

use super::exec::Running;
use super::instances::{self, Created, Goal};
use super::{App, Error, Host, instance_not_found};

/// The image where none is named.
const DEFAULT_IMAGE: &str = "default";
/// Memory where none is named, MiB.
const DEFAULT_MEMORY_MIB: u32 = 512;

/// What an instance is called by that API.
pub fn vm_id(id: &InstanceId) -> Uuid {
    uuid_of(id.as_str())
}

/// What a commit is called by that API.
pub(super) fn commit_uuid(id: &CommitId) -> Uuid {
    uuid_of(id.as_str())
}

/// The ULID at the end of an id, bit by bit.
fn uuid_of(id: &str) -> Uuid {
    let ulid = id.rsplit('-').next().unwrap_or_default();
    let ulid = ulid::Ulid::from_string(ulid).expect("ids of machines and commits end with a ULID");
    Uuid::from_bytes(u128::from(ulid).to_be_bytes())
}

/// Which instance that API means.
pub fn instance_id(vm: &Uuid) -> Option<InstanceId> {
    InstanceId::from_ulid_text(&ulid_of(vm)).ok()
}

/// Which commit that API means.
pub(super) fn commit_id(commit: &Uuid) -> Option<CommitId> {
    CommitId::from_ulid_text(&ulid_of(commit)).ok()
}

fn ulid_of(uuid: &Uuid) -> String {
    ulid::Ulid::from(u128::from_be_bytes(uuid.to_bytes())).to_string()
}

/// All machines that are lent.
pub fn list(host: Host, app: &App) -> Result<Vec<Vm>, Error> {
    let all = instances::list(host, app)?;
    Ok(all.iter().filter(|i| i.lent.is_some()).map(|i| shape(app, i)).collect())
}

/// One that is lent; what is not, is not there.
pub fn find(_: Host, app: &App, vm: &Uuid) -> Result<Instance, Error> {
    let found = match instance_id(vm) {
        Some(id) => app.ctx.ledger.read(|f| f.instance(&id))?,
        None => None,
    };
    let lent = found.filter(|i| i.lent.is_some() && i.state != InstanceState::Gone);
    Ok(lent.ok_or_else(instance_not_found)?)
}

/// A machine as that API shows it.
pub fn shape(app: &App, instance: &Instance) -> Vm {
    Vm {
        vm_id: vm_id(&instance.id),
        owner_id: app.ctx.keys.lender.owner().to_string(),
        created_at: instance.created_at.to_string(),
        state: state(instance),
        labels: instance.lent.clone().unwrap_or_default(),
    }
}

/// What that API tells beside it.
pub fn metadata(app: &App, instance: &Instance) -> VmMetadata {
    let origin = instance.spec.origin.as_ref().map(|origin| &origin.commit);
    let kept = origin.and_then(|id| app.ctx.commits.get(id));
    VmMetadata {
        vm_id: vm_id(&instance.id),
        owner_id: app.ctx.keys.lender.owner().to_string(),
        created_at: instance.created_at.to_string(),
        deleted_at: None,
        state: state(instance),
        // Machines here are reached by name, not by an address of their own.
        ip: "::".to_owned(),
        parent_commit_id: origin.map(commit_uuid),
        grandparent_vm_id: kept.map(|kept| vm_id(&kept.commit.source)),
    }
}

fn state(instance: &Instance) -> VmState {
    match instance.state {
        InstanceState::Starting => VmState::Booting,
        InstanceState::Running => VmState::Running,
        InstanceState::Paused | InstanceState::Frozen => VmState::Paused,
        InstanceState::Stopped | InstanceState::Gone => VmState::Dead,
    }
}

/// Makes a machine from an image; with `wait` it is answered when it runs.
pub async fn new_root(host: Host, app: &App, ask: VmConfig, wait: bool) -> Result<Uuid, Error> {
    let labels = ask.labels.unwrap_or_default();
    check_labels(&labels)?;
    if ask.kernel_name.as_deref().is_some_and(|name| !name.starts_with(DEFAULT_IMAGE)) {
        return Err(Refusal::field("kernel_name", "left out: there is one kernel here").into());
    }
    let body = CreateBody {
        command: Some(app.ctx.config.guest_command.clone()),
        image_ref: ask.image_name.filter(|name| name != DEFAULT_IMAGE),
        vcpus: Some(f64::from(ask.vcpu_count.unwrap_or(1))),
        memory_mb: Some(f64::from(ask.mem_size_mib.unwrap_or(DEFAULT_MEMORY_MIB))),
        disk_gb: ask.fs_size_mib.map(|mib| f64::from(mib) * 1_048_576.0 / 1e9),
        // Its state is what was written, until something else is.
        idle_policy: Some("leave-running".to_owned()),
        ..CreateBody::default()
    };
    let created = instances::create_lent(host, app, body.parse()?, Some(labels)).await?;
    let (Created::New(made) | Created::Restarted(made)) = created;
    if wait {
        until_up(app, &made).await?;
    }
    Ok(vm_id(&made.id))
}

/// Waits until a machine that is on its way is there.
pub async fn until_up(app: &App, instance: &Instance) -> Result<(), Error> {
    if instance.state == InstanceState::Starting && instance.wanted == Wanted::Running {
        instances::reach(app, std::slice::from_ref(&instance.id), Goal::Running).await?;
    }
    Ok(())
}

/// Stops a machine's clock, or lets it go on.
pub async fn set_state(host: Host, app: &App, vm: &Uuid, state: WrittenState) -> Result<(), Error> {
    let instance = find(host, app, vm)?;
    let verb = match state {
        WrittenState::Paused => Verb::Pause,
        WrittenState::Running => Verb::Resume,
    };
    instances::act(host, app, instance.id.as_str(), verb).await.map(drop)
}

/// Sets the labels, all of them.
pub async fn label(
    host: Host,
    app: &App,
    vm: &Uuid,
    labels: BTreeMap<String, String>,
) -> Result<(), Error> {
    check_labels(&labels)?;
    let (id, at) = (find(host, app, vm)?.id, app.ctx.now());
    let write = app
        .ctx
        .ledger
        .write("host", move |_| Ok((vec![Change::InstanceLabelled { id, labels, at }], ())));
    Ok(write.await?)
}

fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), Refusal> {
    let fits = |text: &String| text.len() <= LABEL_BYTES_MAX;
    if labels.len() <= LABELS_MAX && labels.iter().all(|(name, value)| fits(name) && fits(value)) {
        return Ok(());
    }
    let most = format!("at most {LABELS_MAX} of {LABEL_BYTES_MAX} bytes each");
    Err(Refusal::field("labels", most))
}

/// Ends a machine; answered when nothing of it is left.
pub async fn remove(host: Host, app: &App, vm: &Uuid) -> Result<(), Error> {
    let instance = find(host, app, vm)?;
    let left = instances::act(host, app, instance.id.as_str(), Verb::Delete).await?;
    match left {
        Some(left) if left.state != InstanceState::Gone => {
            Err(Error::Machine("the machine is not gone yet; it is being ended".to_owned()))
        }
        _ => Ok(()),
    }
}

/// Runs a command.
pub async fn exec(host: Host, app: &App, vm: &Uuid, ask: Exec) -> Result<Running, Error> {
    let instance = find(host, app, vm)?;
    if instance.state == InstanceState::Stopped {
        return Err(Refusal::new(Code::InstanceState, "the machine is dead").into());
    }
    instances::exec(host, app, instance.id.as_str(), ask).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_there_is_one_here_and_back() {
        for text in ["inst-01ARZ3NDEKTSV4RRFFQ69G5FAV", "inst-7ZZZZZZZZZZZZZZZZZZZZZZZZZ"] {
            let id: InstanceId = text.parse().unwrap();
            assert_eq!(instance_id(&vm_id(&id)), Some(id));
            let commit: CommitId = text.replace("inst", "commit").parse().unwrap();
            assert_eq!(commit_id(&commit_uuid(&commit)), Some(commit));
        }
        let any: Uuid = "ffffffff-ffff-ffff-ffff-ffffffffffff".parse().unwrap();
        assert_eq!(vm_id(&instance_id(&any).unwrap()), any);
    }
}
