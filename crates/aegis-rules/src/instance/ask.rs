//! What a host may ask of an instance, as a table: (state, wanted, verb) → yes | already so | no.

use super::{Instance, InstanceState, Wanted, children, find};
use crate::change::Change;
use crate::envelope::{self, Draw};
use crate::guest::{self, Guest};
use crate::refusal::{Code, Refusal};
use crate::words::Time;

/// What a host asks of an instance (contracts/aegis.md 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    /// A stopped instance runs again, on its old disk.
    Start,
    /// No machine; record and disk are kept.
    Stop,
    /// As stop, and nothing but start wakes it.
    Disable,
    /// Its clock stands still.
    Pause,
    /// It goes on.
    Resume,
    /// Nothing left.
    Delete,
    /// A command is to run in it; a paused machine wakes for it.
    Exec,
    /// Somebody connects to one of its ports: it wakes, or starts again unless it is disabled.
    Wake,
}

impl Verb {
    /// All of them.
    pub const ALL: [Verb; 8] = [
        Verb::Start,
        Verb::Stop,
        Verb::Disable,
        Verb::Pause,
        Verb::Resume,
        Verb::Delete,
        Verb::Exec,
        Verb::Wake,
    ];

    fn name(self) -> &'static str {
        match self {
            Verb::Start => "start",
            Verb::Stop => "stop",
            Verb::Disable => "disable",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::Delete => "delete",
            Verb::Exec => "exec in",
            Verb::Wake => "wake",
        }
    }
}

/// A yes.
#[derive(Clone, Debug, PartialEq)]
pub enum Asked {
    /// It is so already.
    Already,
    /// To be written.
    Yes(Vec<Change>),
}

/// Judges a verb that the host asks for, or that its parent may ask for ([`crate::authorize`]).
/// `guest` is the instance's guest, where it has one; `family` are all records of its tree.
pub fn ask(
    instance: &Instance,
    guest: Option<&Guest>,
    family: &[Instance],
    verb: Verb,
    now: Time,
) -> Result<Asked, Refusal> {
    let want = |wanted| {
        Ok(Asked::Yes(vec![Change::InstanceWanted { id: instance.id.clone(), wanted, at: now }]))
    };
    let refuse = |why: &str| {
        Err(Refusal::new(
            Code::InstanceState,
            format!("cannot {} instance {}: {why}", verb.name(), instance.name()),
        ))
    };
    // A guest lives and ends with its own machine, not with those that this one spawned.
    let of_guest = guest.filter(|g| g.instance.as_ref() == Some(&instance.id));
    let guest_lives = of_guest.is_some_and(|g| g.status_at(now).is_live());
    match (verb, instance.wanted) {
        (Verb::Delete, Wanted::Gone) => Ok(Asked::Already),
        (_, Wanted::Gone) => refuse("it is being destroyed"),

        (Verb::Exec | Verb::Wake, _) if instance.remote.is_some() => {
            refuse("its machine is in another cloud; ask there")
        }

        (Verb::Delete, _) if guest_lives => {
            refuse("it belongs to a living guest; kill the guest instead")
        }
        (Verb::Delete, _) => want(Wanted::Gone),

        (Verb::Wake, Wanted::Stopped) if !instance.enabled => refuse("it is disabled; start it"),
        (Verb::Start | Verb::Wake, Wanted::Stopped) if of_guest.is_some() => {
            refuse("its guest has ended; invite again")
        }
        (Verb::Start | Verb::Wake, Wanted::Stopped) => match instance.state {
            InstanceState::Stopped => {
                may_start(instance, guest, family, now)?;
                if verb == Verb::Wake && is_crowded(instance, family) {
                    return refuse("the instance that spawned it has as many children as it may");
                }
                Ok(Asked::Yes(vec![Change::InstanceStarts { id: instance.id.clone(), at: now }]))
            }
            _ => refuse("it is stopping; ask again when it is stopped"),
        },
        (Verb::Wake, Wanted::Running) => Ok(Asked::Already),
        (Verb::Wake, Wanted::Paused) => want(Wanted::Running),
        (Verb::Wake, Wanted::Frozen) => refuse("it is frozen; thaw it"),
        (Verb::Start, Wanted::Running) => refuse("it is running already"),
        (Verb::Start, Wanted::Paused) => want(Wanted::Running),
        (Verb::Start, Wanted::Frozen) => refuse("it is frozen; thaw it"),

        (Verb::Stop, Wanted::Stopped) => Ok(Asked::Already),
        (Verb::Stop, Wanted::Running | Wanted::Paused | Wanted::Frozen) => {
            Ok(Asked::Yes(stop(instance, of_guest, now)))
        }
        (Verb::Disable, wanted) => {
            let mut changes = vec![Change::InstanceDisabled { id: instance.id.clone(), at: now }];
            if wanted != Wanted::Stopped {
                changes.extend(stop(instance, of_guest, now));
            }
            Ok(Asked::Yes(changes))
        }

        (Verb::Pause, Wanted::Paused) | (Verb::Resume, Wanted::Running) => Ok(Asked::Already),
        (Verb::Pause, Wanted::Running) if instance.state == InstanceState::Running => {
            want(Wanted::Paused)
        }
        (Verb::Pause, Wanted::Running) => refuse("it is not running yet"),
        (Verb::Resume, Wanted::Paused) => want(Wanted::Running),
        (Verb::Pause | Verb::Resume, Wanted::Frozen) => refuse("it is frozen; thaw it"),
        (Verb::Pause | Verb::Resume, Wanted::Stopped) => refuse("it is stopped"),

        (Verb::Exec, Wanted::Running) => Ok(Asked::Already),
        (Verb::Exec, Wanted::Paused) => want(Wanted::Running),
        (Verb::Exec, Wanted::Frozen) => refuse("it is frozen; thaw it"),
        (Verb::Exec, Wanted::Stopped) => refuse("it is stopped; start it"),
    }
}

/// What a start needs besides a machine that is at rest: a parent that lives, be it paused for
/// idleness, time, and room in every envelope up to the root.
fn may_start(
    instance: &Instance,
    guest: Option<&Guest>,
    family: &[Instance],
    now: Time,
) -> Result<(), Refusal> {
    let no = |why: &str| {
        let name = instance.name();
        Refusal::new(Code::InstanceState, format!("cannot start instance {name}: {why}"))
    };
    if guest.is_some_and(|g| !g.status_at(now).is_live()) {
        return Err(no("its guest has ended; invite again"));
    }
    if instance.is_over(now) {
        return Err(no("the time of its envelope is over"));
    }
    if let Some(parent) = &instance.parent
        && find(family, parent).is_none_or(|p| p.is_ending() || p.wanted == Wanted::Frozen)
    {
        return Err(no("the instance that spawned it does not run; start that one first"));
    }
    envelope::admit(family, &instance.id, &Draw::of_start(&instance.spec))
}

/// Whether its parent has as many live children as it may. Only the host may start more.
fn is_crowded(instance: &Instance, family: &[Instance]) -> bool {
    instance.parent.as_ref().and_then(|p| find(family, p)).is_some_and(|parent| {
        let live = children(family, &parent.id).filter(|c| c.is_live() || !c.is_ending()).count();
        live >= parent.capabilities.max_children as usize
    })
}

/// Wants an instance stopped whose envelope's time is over: those that no guest's end covers.
pub fn expire(instance: &Instance, now: Time) -> Vec<Change> {
    if !instance.is_over(now) || instance.is_ending() {
        return Vec::new();
    }
    vec![Change::InstanceWanted { id: instance.id.clone(), wanted: Wanted::Stopped, at: now }]
}

/// `guest` is the one whose own machine this is.
fn stop(instance: &Instance, guest: Option<&Guest>, now: Time) -> Vec<Change> {
    let mut changes =
        vec![Change::InstanceWanted { id: instance.id.clone(), wanted: Wanted::Stopped, at: now }];
    if let Some(guest) = guest {
        changes.extend(guest::machine_stopped(guest, now));
    }
    changes
}
