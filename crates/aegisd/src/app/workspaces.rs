//! Workspaces (contracts/aegis.md 1): which folder an instance gets, and the host's named ones.

use std::path::Path;

use aegis_rules::capability::{Workspace, WorkspaceAsk as Wish};
use aegis_rules::given::Folder;
use aegis_rules::instance::Instance;
use aegis_rules::refusal::{Code, Refusal};
use aegis_rules::spawn::Permit;
use aegis_wire::host::{WorkspaceAsk, WorkspaceList, WorkspaceShape};
use aegis_wire::words::{Handle, InstanceId};

use super::tree::Caller;
use super::{App, Error, Host};
use crate::workspaces::{self, Workspaces};

/// Looks at the file system, which may take its time.
async fn look<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    let looked = tokio::task::spawn_blocking(work).await;
    looked.map_err(|e| Error::Io(std::io::Error::other(e)))
}

/// The folder that the host asks for.
pub(super) async fn of_host(app: &App, ask: WorkspaceAsk) -> Result<Folder, Error> {
    let home = app.ctx.config.home.clone();
    let WorkspaceAsk { place, read_only } = ask;
    let path = look(move || Workspaces::of(&home).find(&place)).await??;
    Ok(Folder { path, read_only })
}

/// What a machine asks for, for its child, as far as the host's file system is concerned.
pub(super) struct Looked {
    /// For the laws.
    pub wish: Wish,
    read_only: bool,
    // Of the caller's own, when it asks for a part of that.
    own: Option<Folder>,
    part: Result<String, Refusal>,
}

/// Looks where it leads.
pub(super) async fn look_for_child(
    caller: &Caller,
    app: &App,
    ask: WorkspaceAsk,
) -> Result<Looked, Error> {
    let own = app.ctx.ledger.read(|f| f.instance(&caller.channel))?;
    let own = own.and_then(|own| own.spec.given.workspace);
    // Whose paths are no business of theirs, learns nothing of them.
    let on_host = !caller.claims.cap.allowed_workspaces.is_empty();
    let home = app.ctx.config.home.clone();
    let WorkspaceAsk { place, read_only } = ask;
    look(move || {
        let resolved = match on_host {
            true => std::fs::canonicalize(&place).ok(),
            false => None,
        };
        let resolved = resolved.filter(|path| path.is_dir());
        let resolved = resolved.and_then(|path| path.into_os_string().into_string().ok());
        let wish = Wish { given: place, resolved };
        let all = Workspaces::of(&home);
        let part = match (wish.below_own(), &wish.resolved, &own) {
            (Some(below), _, Some(own)) => all.part(own, &below),
            (Some(_), _, None) => Err(none_of_its_own()),
            (None, Some(path), _) => all.check(path.clone()),
            (None, None, _) => Err(Refusal::field("workspace", "an existing directory")),
        };
        Looked { wish, read_only, own, part }
    })
    .await
}

fn none_of_its_own() -> Refusal {
    Refusal::field(
        "workspace",
        "left out, or a host path that is allowed: you have none of your own",
    )
}

impl Looked {
    /// The folder that was permitted.
    ///
    /// # Errors
    /// When it is not there, or nobody's to lend.
    pub fn folder(self, permit: &Permit) -> Result<Option<Folder>, Refusal> {
        match permit.workspace() {
            None => Ok(None),
            Some(Workspace::OfParent { .. }) => {
                let own = self.own.ok_or_else(none_of_its_own)?;
                let read_only = self.read_only || own.read_only;
                Ok(Some(Folder { path: self.part?, read_only }))
            }
            Some(Workspace::Host { .. }) => {
                Ok(Some(Folder { path: self.part?, read_only: self.read_only }))
            }
        }
    }
}

/// Instances that have a directory, or a part of it.
fn users(all: &[Instance], directory: &Path) -> Vec<InstanceId> {
    let has = |i: &&Instance| {
        let folder = i.spec.given.workspace.as_ref();
        folder.is_some_and(|folder| Path::new(&folder.path).starts_with(directory))
    };
    all.iter().filter(has).map(|i| i.id.clone()).collect()
}

/// The named ones.
pub async fn list(_: Host, app: &App) -> Result<WorkspaceList, Error> {
    let instances = app.ctx.ledger.read(|f| f.instances())?;
    let home = app.ctx.config.home.clone();
    let all = look(move || {
        let all = Workspaces::of(&home);
        let shape = |name: Handle| {
            let path = all.path(&name);
            let size = workspaces::size(&path);
            WorkspaceShape {
                name: name.to_string(),
                path: path.to_string_lossy().into_owned(),
                bytes: size.bytes,
                files: size.files,
                more: size.more,
                used_by: users(&instances, &path).iter().map(ToString::to_string).collect(),
            }
        };
        let names = all.names()?;
        let workspaces = names.into_iter().filter_map(|n| n.try_into().ok()).map(shape).collect();
        std::io::Result::Ok(WorkspaceList { workspaces })
    });
    Ok(all.await??)
}

/// Removes a named one with all that is in it, unless an instance has it.
pub async fn remove(_: Host, app: &App, name: Handle) -> Result<(), Error> {
    let absent = {
        let message = format!("this host has no workspace {name}");
        Refusal::new(Code::WorkspaceNotFound, message)
    };
    let home = app.ctx.config.home.clone();
    let instances = app.ctx.ledger.read(|f| f.instances())?;
    let users = users(&instances, &Workspaces::of(&home).path(&name));
    if let Some(first) = users.first() {
        let message =
            format!("the workspace {name} is in use by {} instances: {first}", users.len());
        return Err(Refusal::new(Code::WorkspaceInUse, message).hint("delete them first").into());
    }
    match look(move || Workspaces::of(&home).remove(&name)).await?? {
        true => Ok(()),
        false => Err(absent.into()),
    }
}
