//! What a permitted spawn writes: the child as a whole, in the transaction that permitted it.

use crate::capability::{Capabilities, Workspace};
use crate::change::Change;
use crate::egress::Egress;
use crate::given::Folder;
use crate::instance::{Instance, Spec};
use crate::words::{GuestId, InstanceId, Limits, Time, Tree};

/// The permission to spawn one child, which only [`crate::authorize::authorize`] makes.
#[derive(Clone, Debug, PartialEq)]
pub struct Permit {
    pub(crate) parent: InstanceId,
    pub(crate) tree: Tree,
    pub(crate) guest: Option<GuestId>,
    pub(crate) spec: Spec,
    pub(crate) capabilities: Capabilities,
    pub(crate) envelope: Limits,
    pub(crate) egress: Egress,
    pub(crate) ends_at: Option<Time>,
    pub(crate) workspace: Option<Workspace>,
}

impl Permit {
    /// Who spawns.
    pub fn parent(&self) -> &InstanceId {
        &self.parent
    }

    /// What the child is made of.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The workspace that it gets.
    pub fn workspace(&self) -> Option<&Workspace> {
        self.workspace.as_ref()
    }

    /// The same permission with the folder that the permitted workspace is.
    pub fn lend(mut self, folder: Option<Folder>) -> Permit {
        self.spec.given.workspace = folder;
        self
    }

    /// The tree that it joins.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }
}

/// What to write, and the child as it will be.
pub fn spawn(permit: Permit, id: InstanceId, now: Time) -> (Vec<Change>, Instance) {
    let Permit { parent, tree, guest, spec, capabilities, envelope, egress, ends_at, .. } = permit;
    let child = Instance::new(id, tree, guest, Some(parent), spec, now)
        .with_rights(capabilities, envelope, ends_at)
        .with_egress(egress);
    (vec![Change::InstanceCreated(Box::new(child.clone()))], child)
}
