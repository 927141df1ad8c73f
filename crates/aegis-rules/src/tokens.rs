//! LLM tokens: the most that a call may cost is reserved before it, what it did cost is settled
//! after it (contracts/couch.md 6).
//!
//! What is reserved counts as spent until it is settled, so that calls which run side by side, or a
//! daemon that dies in between, can't spend more than there is. A call never counts for more than
//! was reserved for it.

use crate::change::Change;
use crate::envelope;
use crate::guest::Guest;
use crate::instance::{Instance, Wanted, ancestors, find};
use crate::refusal::{Code, Refusal};
use crate::words::{InstanceId, LlmTokens, Time};

/// What a message takes beside its text: roles and separators.
const PER_MESSAGE: u64 = 16;
/// What a vendor may add to any prompt by itself.
const HIDDEN: u64 = 256;
/// What a vendor may add where there are tools: instructions of its own.
const HIDDEN_WITH_TOOLS: u64 = 1024;
/// The most that one picture takes with any model: its bytes say nothing about it.
const PER_IMAGE: u64 = 50_000;

/// What a call asks for, as far as it costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Length of the request's body, bytes.
    pub bytes: u64,
    /// Messages in it.
    pub messages: u64,
    /// Pictures in it.
    pub images: u64,
    /// Whether it names tools.
    pub tools: bool,
    /// The most that each choice may put out; what is put out when it says nothing is in it too.
    pub output: u64,
    /// Choices that are put out.
    pub choices: u64,
    /// The least output that the vendor takes as a limit.
    pub least_output: u64,
}

impl Ask {
    /// The most that the prompt can take. A token stands for at least one byte, and JSON is never
    /// shorter than the text in it; the rest is what no byte of the request stands for.
    pub fn prompt(&self) -> u64 {
        let hidden = if self.tools { HIDDEN_WITH_TOOLS } else { HIDDEN };
        self.bytes
            .saturating_add(self.messages.saturating_mul(PER_MESSAGE))
            .saturating_add(self.images.saturating_mul(PER_IMAGE))
            .saturating_add(hidden)
    }
}

/// What was reserved for a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// All of it.
    pub amount: u64,
    /// The most that each choice may put out: what was asked for, or less.
    pub output: u64,
}

/// A budget, and what is left of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// All of it.
    pub budget: u64,
    /// Spent for good.
    pub spent: u64,
    /// Reserved by calls that run.
    pub reserved: u64,
}

impl Room {
    /// What may still be reserved.
    pub fn left(&self) -> u64 {
        self.budget.saturating_sub(self.spent).saturating_sub(self.reserved)
    }
}

/// Why a call may not begin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Short {
    /// The machine is served no more.
    Ended(Refusal),
    /// It does not fit in what is left, and won't.
    Exhausted(Refusal),
    /// It would fit if calls that run now took less than was reserved for them.
    Busy(Refusal),
}

/// Whether the hatch serves an instance: it is wanted to run, and its time is not over.
///
/// # Errors
/// Why not.
pub fn is_served(instance: &Instance, guest: Option<&Guest>, now: Time) -> Result<(), Refusal> {
    let guest_lives = match (&instance.guest, guest) {
        (None, _) => true,
        (Some(id), Some(guest)) => *id == guest.id && guest.status_at(now).is_live(),
        (Some(_), None) => false,
    };
    if !guest_lives || instance.is_over(now) {
        return Err(Refusal::denied("exp", "the time of this instance's envelope is over"));
    }
    // A machine that sleeps asks for nothing; what it asked before it may still get.
    let runs = matches!(instance.wanted, Wanted::Running | Wanted::Paused) && instance.is_live();
    if !runs {
        let refusal = Refusal::new(Code::InstanceState, "this instance is not running");
        return Err(refusal.rule("state").amounts(instance.wanted.word(), "running"));
    }
    Ok(())
}

/// The budget with the least left, of those that bind an instance: its envelope, those of all above
/// it, and its guest's limit. `None` for an instance that is not in the family.
pub fn room(family: &[Instance], guest: Option<&Guest>, id: &InstanceId) -> Option<Room> {
    let reserved_below = |id: &InstanceId| -> u64 {
        let subtree = crate::instance::subtree(family, id);
        subtree.into_iter().fold(0, |sum, i| sum.saturating_add(i.tokens_reserved))
    };
    let envelopes = ancestors(family, id).map(|above| {
        let drawn = envelope::drawn(family, &above.id).tokens;
        let reserved = reserved_below(&above.id);
        let spent = drawn.saturating_sub(reserved);
        Room { budget: above.envelope.tokens.0, spent, reserved }
    });
    let of_guest = guest.filter(|_| find(family, id).is_some()).map(|guest| Room {
        budget: guest.limits.tokens.0,
        spent: guest.usage(family).tokens.0,
        reserved: family.iter().fold(0, |sum, i| sum.saturating_add(i.tokens_reserved)),
    });
    envelopes.chain(of_guest).min_by_key(Room::left)
}

/// Reserves the most that a call may cost; its output is cut down to what is left.
///
/// # Errors
/// Why it may not begin.
pub fn reserve(
    family: &[Instance],
    guest: Option<&Guest>,
    id: &InstanceId,
    call: &str,
    ask: &Ask,
    now: Time,
) -> Result<(Change, Reserved), Short> {
    let gone = || Refusal::new(Code::InstanceNotFound, "instance not found");
    let instance = find(family, id).ok_or_else(gone).map_err(Short::Ended)?;
    is_served(instance, guest, now).map_err(Short::Ended)?;
    let room = room(family, guest, id).ok_or_else(gone).map_err(Short::Ended)?;
    let choices = ask.choices.max(1);
    let prompt = ask.prompt();
    let output = (room.left().saturating_sub(prompt) / choices).min(ask.output);
    // A call that asks for less than the least is the vendor's to refuse.
    let least = ask.least_output.min(ask.output).max(1);
    if output < least {
        let needed = prompt.saturating_add(least.saturating_mul(choices));
        let fits_later = needed <= room.left().saturating_add(room.reserved);
        let refusal = short(&room, needed);
        return Err(if fits_later { Short::Busy(refusal) } else { Short::Exhausted(refusal) });
    }
    let amount = prompt.saturating_add(output.saturating_mul(choices));
    let change = Change::TokensReserved {
        id: id.clone(),
        call: call.to_owned(),
        amount: LlmTokens(amount),
        at: now,
    };
    Ok((change, Reserved { amount, output }))
}

fn short(room: &Room, needed: u64) -> Refusal {
    let Room { budget, spent, reserved } = *room;
    let running = match reserved {
        0 => String::new(),
        _ => format!(", {reserved} reserved by calls that run now"),
    };
    let left = room.left();
    Refusal::new(
        Code::EnvelopeExhausted,
        format!(
            "the token budget does not hold this call: {spent} of {budget} tokens are spent{running}, \
             {left} are left, and the call may take {needed} at the least"
        ),
    )
    .rule("envelope.tokens")
    .amounts(needed.to_string(), left.to_string())
}

/// What a call counts for: what the vendor reported, never more than was reserved; all that was
/// reserved where it reported nothing.
pub fn spent(reserved: u64, reported: Option<u64>) -> u64 {
    reported.unwrap_or(reserved).min(reserved)
}

/// Settles whatever calls of a daemon that died had reserved: a vendor may have billed all of it.
pub fn settle_lost(instance: &Instance, now: Time) -> Option<Change> {
    let all = LlmTokens(instance.tokens_reserved);
    (all.0 > 0).then(|| Change::TokensSettled {
        id: instance.id.clone(),
        call: "lost".to_owned(),
        of: None,
        reserved: all,
        spent: all,
        at: now,
    })
}
