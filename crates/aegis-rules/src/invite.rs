//! Invites: create, redeem, revoke, expire (contracts/couch.md 2 and 3).
//!
//! ```text
//! active ──redeem──▶ redeemed      active ──revoke──▶ revoked      active ──clock──▶ expired
//! ```

use crate::capability::Capabilities;
use crate::change::Change;
use crate::egress::{AllowList, Egress, ServiceName};
use crate::given::{Given, Models};
use crate::guest::{Guest, GuestStatus, Provisioner};
use crate::instance::{Instance, Spec};
use crate::refusal::{Code, Refusal};
use crate::remote::Remote;
use crate::words::{
    CpuMillis, DiskBytes, DurationMs, GuestId, ImageRef, InstanceId, InviteId, Label, Limits,
    MemoryMb, OnLimit, Permissions, Port, PublicKey, Share, Time, Tree,
};

/// Depth of spawning where it is allowed and no depth is named.
const SPAWN_DEPTH: u32 = 1;
/// Children at a time where spawning is allowed and no number is named.
const MAX_CHILDREN: u32 = 5;
/// Ports that a machine which may spawn, and each of its children, may expose.
const MAX_EXPOSE_PORTS: u32 = 8;

/// SHA-256 of a secret; the secret itself is never stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SecretHash(pub [u8; 32]);

/// Where an invite is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InviteStatus {
    /// Can be redeemed.
    Active,
    /// Was redeemed, once.
    Redeemed,
    /// Withdrawn by the host.
    Revoked,
    /// Nobody came in time.
    Expired,
}

impl InviteStatus {
    /// All of them.
    pub const ALL: [InviteStatus; 4] = [
        InviteStatus::Active,
        InviteStatus::Redeemed,
        InviteStatus::Revoked,
        InviteStatus::Expired,
    ];

    /// The word on the wire.
    pub fn word(self) -> &'static str {
        match self {
            InviteStatus::Active => "active",
            InviteStatus::Redeemed => "redeemed",
            InviteStatus::Revoked => "revoked",
            InviteStatus::Expired => "expired",
        }
    }

    /// From the word on the wire.
    pub fn parse(word: &str) -> Option<InviteStatus> {
        Self::ALL.into_iter().find(|s| s.word() == word)
    }
}

/// What an invite offers besides limits and permissions (contracts/couch.md 2, "Ours").
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Offer {
    /// Image or commit to start from; else the configured one.
    pub golden: Option<ImageRef>,
    /// The guest's port behind `agentEndpoint`; when given, it must accept before `running` is said.
    pub agent_port: Option<Port>,
    /// Names with globs and CIDRs; absent means all public addresses, empty means none.
    pub egress_allow: Option<AllowList>,
    /// Names of host services.
    pub host_services: Vec<String>,
    /// Models of the LLM door; absent is what the host's providers offer, empty is none.
    pub llm_models: Option<Models>,
    /// Depth of spawning; 1 where it is allowed and this is absent.
    pub spawn_depth: Option<u32>,
    /// Children at a time; 5 where spawning is allowed and this is absent.
    pub max_children: Option<u32>,
    /// The part of CPU, memory and disk that the guest's own machine gets; the rest is for its
    /// children. Half where it may spawn and this is absent.
    pub root_share: Option<Share>,
    /// What to do when a limit is passed.
    pub on_limit: Option<OnLimit>,
}

/// A single-use invitation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invite {
    /// Its id, not secret.
    pub id: InviteId,
    /// Hash of its code.
    pub code_hash: SecretHash,
    /// As recorded; [`Invite::status_at`] is what holds.
    pub status: InviteStatus,
    /// Who invited.
    pub created_by: Label,
    /// What for.
    pub label: Option<Label>,
    /// The six limits.
    pub limits: Limits,
    /// The three permissions.
    pub permissions: Permissions,
    /// The rest of the offer.
    pub offer: Offer,
    /// When it was made.
    pub created_at: Time,
    /// From when on it can't be redeemed.
    pub expires_at: Time,
    /// When it was redeemed.
    pub redeemed_at: Option<Time>,
    /// By whom.
    pub redeemed_by: Option<Label>,
    /// As which guest.
    pub guest_id: Option<GuestId>,
}

impl Invite {
    /// The status that holds now: the clock decides, not the last sweep.
    pub fn status_at(&self, now: Time) -> InviteStatus {
        match self.status {
            InviteStatus::Active if now >= self.expires_at => InviteStatus::Expired,
            recorded => recorded,
        }
    }

    /// What the guest's own machine is made of.
    pub fn root_size(&self) -> (CpuMillis, MemoryMb, DiskBytes) {
        let share = match (self.permissions.spawn, self.offer.root_share) {
            (false, _) => Share::ALL,
            (true, None) => Share::HALF,
            (true, Some(share)) => share,
        };
        self.limits.share(share)
    }

    /// What the guest's machines may reach.
    pub fn egress(&self) -> Egress {
        Egress { internet: self.permissions.internet, allow: self.offer.egress_allow.clone() }
    }

    /// What the guest's own machine is given of the host. Services that are not permitted, or not
    /// named, it has none of.
    pub fn root_given(&self) -> Given {
        let services: Vec<ServiceName> = match self.permissions.host_services {
            false => Vec::new(),
            true => self.offer.host_services.iter().filter_map(|name| name.parse().ok()).collect(),
        };
        Given { services, models: self.offer.llm_models.clone(), ..Given::default() }
    }

    /// What the guest's own machine may do.
    pub fn root_capabilities(&self) -> Capabilities {
        if !self.permissions.spawn {
            return Capabilities::default();
        }
        let depth = self.offer.spawn_depth.unwrap_or(SPAWN_DEPTH);
        Capabilities {
            spawn: depth > 0,
            spawn_depth: depth,
            max_children: self.offer.max_children.unwrap_or(MAX_CHILDREN),
            allowed_images: vec!["*".to_owned()],
            max_memory: self.limits.memory,
            max_vcpus: self.limits.cpu.vcpus(),
            allowed_secrets: Vec::new(),
            allowed_workspaces: Vec::new(),
            max_expose_ports: MAX_EXPOSE_PORTS,
        }
    }
}

/// A request for an invite, parsed.
#[derive(Clone, Debug, PartialEq)]
pub struct Create {
    /// Who invites.
    pub created_by: Label,
    /// What for.
    pub label: Option<Label>,
    /// The six limits, defaults filled in.
    pub limits: Limits,
    /// The three permissions, defaults filled in.
    pub permissions: Permissions,
    /// The rest.
    pub offer: Offer,
    /// For how long it can be redeemed; in (0, 720] hours.
    pub expires_in: DurationMs,
}

/// Makes an invite.
pub fn create(ask: Create, id: InviteId, code_hash: SecretHash, now: Time) -> Vec<Change> {
    vec![Change::InviteCreated(Box::new(Invite {
        id,
        code_hash,
        status: InviteStatus::Active,
        created_by: ask.created_by,
        label: ask.label,
        limits: ask.limits,
        permissions: ask.permissions,
        offer: ask.offer,
        created_at: now,
        expires_at: now.plus(ask.expires_in),
        redeemed_at: None,
        redeemed_by: None,
        guest_id: None,
    }))]
}

/// A request to redeem, parsed. The code was used to find the invite.
#[derive(Clone, Debug, PartialEq)]
pub struct Redeem {
    /// The guest's name.
    pub name: Label,
    /// For SSH access.
    pub public_key: Option<PublicKey>,
    /// Hash of the `Idempotency-Key` header.
    pub idempotency: Option<SecretHash>,
}

/// Ids and hashes made outside, where randomness and keys are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fresh {
    /// The guest's id.
    pub guest: GuestId,
    /// The hash of the guest's token.
    pub token_hash: SecretHash,
    /// The id of the guest's machine.
    pub instance: InstanceId,
}

/// How a redeem came out.
#[derive(Clone, Debug, PartialEq)]
pub enum Redeemed {
    /// A new guest: to be written.
    New {
        /// What to write.
        changes: Vec<Change>,
        /// The guest as it will be.
        guest: Box<Guest>,
    },
    /// The same request came before (`Idempotency-Key`): the guest that it made.
    Again(Box<Guest>),
}

impl Redeemed {
    /// The same, with the guest's machine in the vers cloud.
    pub fn in_vers(mut self) -> Redeemed {
        if let Redeemed::New { changes, guest } = &mut self {
            guest.provisioner = Provisioner::Vers;
            for change in changes {
                match change {
                    Change::GuestCreated(created) => created.provisioner = Provisioner::Vers,
                    Change::InstanceCreated(created) => created.remote = Some(Remote::default()),
                    _ => {}
                }
            }
        }
        self
    }
}

/// Redeems an invite: it is spent, a guest exists, and the intent to provision is written, all in
/// the one set of changes (contracts/couch.md 3).
///
/// `invite` is what the code's hash found; `earlier` is the invite's guest, where there is one;
/// `spec` is the machine that this invite becomes, `None` where guests are activated by hand.
pub fn redeem(
    invite: Option<&Invite>,
    earlier: Option<&Guest>,
    ask: Redeem,
    spec: Option<Spec>,
    fresh: Fresh,
    now: Time,
) -> Result<Redeemed, Refusal> {
    let unknown = || Refusal::new(Code::UnknownCode, "unknown, expired or revoked invite code");
    let invite = invite.ok_or_else(unknown)?;
    match invite.status_at(now) {
        InviteStatus::Active => {}
        InviteStatus::Revoked | InviteStatus::Expired => return Err(unknown()),
        InviteStatus::Redeemed => {
            if let (Some(guest), Some(key)) = (earlier, ask.idempotency)
                && guest.idempotency == Some(key)
            {
                return Ok(Redeemed::Again(Box::new(guest.clone())));
            }
            return Err(Refusal::new(Code::AlreadyRedeemed, "this invite was already redeemed"));
        }
    }
    let expires_at = now.plus(invite.limits.duration);
    let guest = Guest {
        id: fresh.guest.clone(),
        invite: invite.id.clone(),
        name: ask.name.clone(),
        public_key: ask.public_key,
        token_hash: fresh.token_hash,
        idempotency: ask.idempotency,
        status: GuestStatus::Provisioning,
        provisioner: if spec.is_some() { Provisioner::Local } else { Provisioner::Manual },
        limits: invite.limits,
        permissions: invite.permissions,
        instance: spec.as_ref().map(|_| fresh.instance.clone()),
        vm_id: None,
        agent_endpoint: None,
        provision_error: None,
        reported: Default::default(),
        limits_exceeded: false,
        on_limit: invite.offer.on_limit,
        frozen_by_limit: false,
        requests: Vec::new(),
        created_at: now,
        expires_at,
        stopped_at: None,
        receipt: None,
    };
    let mut changes = vec![
        Change::InviteRedeemed {
            id: invite.id.clone(),
            guest: fresh.guest.clone(),
            by: ask.name,
            at: now,
        },
        Change::GuestCreated(Box::new(guest.clone())),
    ];
    if let Some(spec) = spec {
        let tree = Tree::Invite(invite.id.clone());
        let (cpu, memory, disk) = invite.root_size();
        let spec = Spec {
            cpu: spec.cpu.min(cpu),
            memory: spec.memory.min(memory),
            disk: spec.disk.min(disk),
            given: invite.root_given(),
            ..spec
        };
        let instance = Instance::new(fresh.instance, tree, Some(fresh.guest), None, spec, now)
            .with_rights(invite.root_capabilities(), invite.limits, Some(expires_at))
            .with_egress(invite.egress());
        changes.push(Change::InstanceCreated(Box::new(instance)));
    }
    Ok(Redeemed::New { changes, guest: Box::new(guest) })
}

/// Withdraws an active invite.
pub fn revoke(invite: &Invite, now: Time) -> Result<Vec<Change>, Refusal> {
    match invite.status_at(now) {
        InviteStatus::Active => Ok(vec![Change::InviteRevoked { id: invite.id.clone(), at: now }]),
        other => Err(Refusal::new(
            Code::InviteState,
            format!("cannot revoke invite with status '{}'", other.word()),
        )),
    }
}

/// Records that nobody came in time.
pub fn expire(invite: &Invite, now: Time) -> Vec<Change> {
    if invite.status == InviteStatus::Active && now >= invite.expires_at {
        vec![Change::InviteExpired { id: invite.id.clone(), at: now }]
    } else {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invite(spawn: bool, offer: Offer) -> Invite {
        let ask = Create {
            created_by: "noah".parse().unwrap(),
            label: None,
            limits: Limits::default(),
            permissions: Permissions { spawn, ..Permissions::default() },
            offer,
            expires_in: DurationMs(1),
        };
        let id = "01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().unwrap();
        match create(ask, id, SecretHash([0; 32]), Time(0)).remove(0) {
            Change::InviteCreated(invite) => *invite,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn who_may_not_spawn_gets_all_for_one_machine() {
        let offer = Offer {
            spawn_depth: Some(3),
            max_children: Some(3),
            root_share: Share::new(0.2),
            ..Offer::default()
        };
        let invite = invite(false, offer);
        let Limits { cpu, memory, disk, .. } = invite.limits;
        assert_eq!(invite.root_size(), (cpu, memory, DiskBytes(disk.0 / 4096 * 4096)));
        assert_eq!(invite.root_capabilities(), Capabilities::default());
    }

    #[test]
    fn services_need_the_permission_and_their_names() {
        let offer = || Offer { host_services: vec!["ollama".to_owned()], ..Offer::default() };
        let mut asked = invite(false, offer());
        assert_eq!(asked.root_given(), Given::default(), "not permitted");
        asked.permissions.host_services = true;
        assert_eq!(asked.root_given().services, ["ollama".parse().unwrap()]);
        asked.offer.host_services.clear();
        assert_eq!(asked.root_given(), Given::default(), "an empty list is none");
    }

    #[test]
    fn who_may_spawn_shares_with_its_children() {
        let plain = invite(true, Offer::default());
        let (cpu, memory, disk) = plain.root_size();
        assert_eq!((cpu, memory), (CpuMillis(1000), MemoryMb(2048)));
        assert!(disk.0 <= 10_000_000_000 && disk.0 > 9_999_990_000);
        let may = plain.root_capabilities();
        assert!(may.spawn);
        assert_eq!((may.spawn_depth, may.max_children, may.max_expose_ports), (1, 5, 8));
        assert_eq!((may.max_memory, may.max_vcpus), (MemoryMb(4096), 2));
        assert!(may.allowed_secrets.is_empty() && may.allowed_workspaces.is_empty());

        let offer = Offer {
            spawn_depth: Some(0),
            max_children: Some(0),
            root_share: Share::new(0.1),
            ..Offer::default()
        };
        let mut none = invite(true, offer);
        assert!(!none.root_capabilities().spawn);
        assert_eq!(none.root_capabilities().max_children, 0);
        assert_eq!(none.root_size().0, CpuMillis(200));
        // A machine has a least size, whatever its share.
        none.limits.memory = MemoryMb(200);
        assert_eq!(none.root_size().1, MemoryMb(128));
        for bad in [0.0, 0.09, 1.01, -1.0, f64::NAN] {
            assert_eq!(Share::new(bad), None);
        }
    }
}
