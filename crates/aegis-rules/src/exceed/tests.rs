use super::*;
use crate::guest::Provisioner;
use crate::instance::{InstanceState, Spec, Wanted};
use crate::invite::SecretHash;
use crate::words::{EgressBytes, InstanceId, LlmTokens, Permissions, Tree, Usage};

const NOW: Time = Time(1_000_000);

fn id(n: u8) -> InstanceId {
    format!("inst-01ARZ3NDEKTSV4RRFFQ69G5FA{}", char::from(b'0' + n)).parse().unwrap()
}

fn guest(on_limit: Option<OnLimit>) -> Guest {
    let ulid = "01ARZ3NDEKTSV4RRFFQ69G5FAV";
    Guest {
        id: ulid.parse().unwrap(),
        invite: ulid.parse().unwrap(),
        name: "ty".parse().unwrap(),
        public_key: None,
        token_hash: SecretHash([0; 32]),
        idempotency: None,
        status: GuestStatus::Running,
        provisioner: Provisioner::Local,
        limits: Limits { egress: EgressBytes(1000), tokens: LlmTokens(100), ..Limits::default() },
        permissions: Permissions::default(),
        instance: Some(id(0)),
        vm_id: None,
        agent_endpoint: None,
        provision_error: None,
        reported: Usage::default(),
        limits_exceeded: false,
        on_limit,
        frozen_by_limit: false,
        requests: Vec::new(),
        created_at: Time(0),
        expires_at: Time(0).plus(Limits::default().duration),
        stopped_at: None,
        receipt: None,
    }
}

/// A root that sent all that it may, and a child.
fn machines(of: &Guest) -> Vec<Instance> {
    let tree = Tree::Invite(of.invite.clone());
    let new = |n: u8, parent: Option<InstanceId>| {
        let owner = Some(of.id.clone());
        let new = Instance::new(id(n), tree.clone(), owner, parent, Spec::example(), Time(0));
        let new = new.with_rights(Default::default(), of.limits, Some(of.expires_at));
        Instance { state: InstanceState::Running, ..new }
    };
    let mut family = vec![new(0, None), new(1, Some(id(0)))];
    family[0].usage_boot.egress = of.limits.egress;
    family[0].egress_allowed = of.limits.egress;
    family
}

fn apply(guest: &mut Guest, machines: &mut [Instance], changes: &[Change]) {
    for change in changes {
        guest.apply(change);
        machines
            .iter_mut()
            .filter(|m| change.subject().id() == m.id.as_str())
            .for_each(|m| m.apply(change));
    }
}

fn wants(machines: &[Instance]) -> Vec<Wanted> {
    machines.iter().map(|m| m.wanted).collect()
}

#[test]
fn egress_that_is_spent_freezes_the_tree_and_more_of_it_thaws() {
    let mut guest = guest(None);
    let mut family = machines(&guest);
    let changes = spent(&guest, &family, Limit::Egress, NOW);
    assert!(matches!(&changes[0], Change::LimitsExceeded { froze: true, .. }), "{changes:?}");
    apply(&mut guest, &mut family, &changes);
    assert_eq!(guest.status, GuestStatus::Frozen);
    assert_eq!(wants(&family), [Wanted::Frozen; 2]);
    // Asked again while it stands still: nothing new.
    assert_eq!(spent(&guest, &family, Limit::Egress, NOW), []);

    let same = Raise { tokens: Some(LlmTokens(200)), ..Raise::default() };
    let changes = set_limits(&guest, &family, same, NOW).unwrap();
    apply(&mut guest, &mut family, &changes);
    assert_eq!(guest.status, GuestStatus::Frozen, "another limit does not thaw");

    let more = Raise { egress: Some(EgressBytes(2000)), ..Raise::default() };
    let changes = set_limits(&guest, &family, more, NOW).unwrap();
    apply(&mut guest, &mut family, &changes);
    assert_eq!(guest.status, GuestStatus::Running);
    assert_eq!(wants(&family), [Wanted::Running; 2]);
    assert!(!guest.limits_exceeded && !guest.frozen_by_limit);
    assert_eq!(family[0].envelope.egress, EgressBytes(2000));
    assert_eq!(family[1].envelope.egress, EgressBytes(1000), "a child's is its own");
}

#[test]
fn what_the_host_froze_no_limit_thaws() {
    let mut guest = guest(Some(OnLimit::Throttle));
    let mut family = machines(&guest);
    let changes = spent(&guest, &family, Limit::Egress, NOW);
    apply(&mut guest, &mut family, &changes);
    assert_eq!((guest.status, guest.limits_exceeded), (GuestStatus::Running, true));
    let changes = guest::freeze(&guest, &family, NOW).unwrap();
    apply(&mut guest, &mut family, &changes);
    let more = Raise { egress: Some(EgressBytes(2000)), ..Raise::default() };
    let changes = set_limits(&guest, &family, more, NOW).unwrap();
    apply(&mut guest, &mut family, &changes);
    assert_eq!((guest.status, guest.limits_exceeded), (GuestStatus::Frozen, false));
}

#[test]
fn a_host_that_thaws_lets_it_run_until_it_wants_more_again() {
    let mut guest = guest(None);
    let mut family = machines(&guest);
    let changes = spent(&guest, &family, Limit::Egress, NOW);
    apply(&mut guest, &mut family, &changes);
    let changes = guest::thaw(&guest, &family, NOW).unwrap();
    apply(&mut guest, &mut family, &changes);
    assert_eq!(guest.status, GuestStatus::Running);
    let usage = guest.usage(&family);
    assert_eq!(guest::exceeded(&guest, &family, &usage, NOW), [], "a measure alone does not");
    let changes = spent(&guest, &family, Limit::Egress, NOW);
    apply(&mut guest, &mut family, &changes);
    assert_eq!(guest.status, GuestStatus::Frozen);
}

#[test]
fn the_last_word_is_a_kill() {
    let mut guest = guest(Some(OnLimit::Kill));
    let mut family = machines(&guest);
    let changes = spent(&guest, &family, Limit::Tokens, NOW);
    assert!(matches!(&changes[0], Change::LimitsExceeded { froze: false, .. }), "{changes:?}");
    apply(&mut guest, &mut family, &changes);
    assert_eq!(guest.status, GuestStatus::Revoked);
    assert_eq!(wants(&family), [Wanted::Gone; 2]);
    assert_eq!(spent(&guest, &family, Limit::Tokens, NOW), []);
    assert!(set_limits(&guest, &family, Raise::default(), NOW).is_err());
}

#[test]
fn a_measured_limit_is_noted_once_and_enforced_sizes_freeze_nobody() {
    let mut guest = guest(None);
    let mut family = machines(&guest);
    family[0].usage_boot.egress = EgressBytes(0);
    let usage = Usage { memory_peak_bytes: 1 << 50, ..Usage::default() };
    let changes = guest::exceeded(&guest, &family, &usage, NOW);
    apply(&mut guest, &mut family, &changes);
    assert_eq!((guest.status, guest.limits_exceeded), (GuestStatus::Running, true));
    assert_eq!(guest::exceeded(&guest, &family, &usage, NOW), []);
}

#[test]
fn time_can_be_given_and_not_taken_back_into_the_past() {
    let mut guest = guest(None);
    let mut family = machines(&guest);
    let past = Raise { duration: Some(DurationMs(1)), ..Raise::default() };
    let refusal = set_limits(&guest, &family, past, NOW).unwrap_err();
    assert_eq!(refusal.field.as_deref(), Some("resourceLimits.maxDurationHours"));
    let longer = DurationMs(100 * DurationMs::HOUR);
    let more = Raise { duration: Some(longer), ..Raise::default() };
    let changes = set_limits(&guest, &family, more, NOW).unwrap();
    apply(&mut guest, &mut family, &changes);
    assert_eq!(guest.expires_at, Time(0).plus(longer));
    assert!(family.iter().all(|m| m.ends_at == Some(guest.expires_at)));
}
