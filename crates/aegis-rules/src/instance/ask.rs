//! What a host may ask of an instance, as a table: (state, wanted, verb) → yes | already so | no.

use super::{Instance, InstanceState, Wanted};
use crate::change::Change;
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
}

impl Verb {
    /// All of them.
    pub const ALL: [Verb; 7] = [
        Verb::Start,
        Verb::Stop,
        Verb::Disable,
        Verb::Pause,
        Verb::Resume,
        Verb::Delete,
        Verb::Exec,
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

/// Judges a host's verb. `guest` is the instance's guest, where it has one.
pub fn ask(
    instance: &Instance,
    guest: Option<&Guest>,
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
    let guest_lives = guest.is_some_and(|g| g.status_at(now).is_live());
    match (verb, instance.wanted) {
        (Verb::Delete, Wanted::Gone) => Ok(Asked::Already),
        (_, Wanted::Gone) => refuse("it is being destroyed"),

        (Verb::Delete, _) if guest_lives => {
            refuse("it belongs to a living guest; kill the guest instead")
        }
        (Verb::Delete, _) => want(Wanted::Gone),

        (Verb::Start, Wanted::Stopped) if guest.is_some() => {
            refuse("its guest has ended; invite again")
        }
        (Verb::Start, Wanted::Stopped) if instance.state == InstanceState::Stopped => {
            Ok(Asked::Yes(vec![Change::InstanceStarts { id: instance.id.clone(), at: now }]))
        }
        (Verb::Start, Wanted::Stopped) => refuse("it is stopping; ask again when it is stopped"),
        (Verb::Start, Wanted::Running) => refuse("it is running already"),
        (Verb::Start, Wanted::Paused) => want(Wanted::Running),
        (Verb::Start, Wanted::Frozen) => refuse("it is frozen; thaw it"),

        (Verb::Stop, Wanted::Stopped) => Ok(Asked::Already),
        (Verb::Stop, Wanted::Running | Wanted::Paused | Wanted::Frozen) => {
            Ok(Asked::Yes(stop(instance, guest, now)))
        }
        (Verb::Disable, wanted) => {
            let mut changes = vec![Change::InstanceDisabled { id: instance.id.clone(), at: now }];
            if wanted != Wanted::Stopped {
                changes.extend(stop(instance, guest, now));
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

fn stop(instance: &Instance, guest: Option<&Guest>, now: Time) -> Vec<Change> {
    let mut changes =
        vec![Change::InstanceWanted { id: instance.id.clone(), wanted: Wanted::Stopped, at: now }];
    if let Some(guest) = guest {
        changes.extend(guest::machine_stopped(guest, now));
    }
    changes
}
