//! Envelopes: what is *left* (design 3). What is *permitted* is said by [`crate::capability`].
//!
//! They are nested limits. Each instance carries the most that it and all of its descendants
//! together may hold and spend; what they do hold and spend is read from their records, in the
//! transaction that would add to it. So no counter can drift, an end gives back what was held by
//! being recorded, and a crash between two steps changes nothing.

use crate::allowance;
use crate::capacity::Capacity;
use crate::instance::{Instance, InstanceState, Spec, ancestors, find, subtree};
use crate::refusal::{Code, Refusal};
use crate::words::{
    CpuMillis, DiskBytes, DurationMs, EgressBytes, InstanceId, Limit, Limits, LlmTokens, MemoryMb,
    Number, Time,
};

/// What a subtree holds now (CPU, memory, disk) and has spent for good (egress, tokens).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Draw {
    /// Thousandths of a core.
    pub cpu_millis: u64,
    /// MiB.
    pub memory_mb: u64,
    /// Bytes.
    pub disk_bytes: u64,
    /// Bytes.
    pub egress_bytes: u64,
    /// LLM tokens.
    pub tokens: u64,
}

impl Draw {
    /// What one instance draws by itself.
    pub fn of(instance: &Instance) -> Draw {
        // A stopped one that is wanted to run holds its machine already.
        let live = instance.is_live() || !instance.is_ending();
        let kept = instance.state != InstanceState::Gone;
        let usage = instance.usage().and(instance.usage_below);
        Draw {
            cpu_millis: if live { instance.spec.cpu.0.into() } else { 0 },
            memory_mb: if live { instance.spec.memory.0.into() } else { 0 },
            disk_bytes: if kept { instance.spec.disk.0 } else { 0 },
            egress_bytes: usage.egress.0.saturating_add(allowance::unsent(instance)),
            tokens: usage.tokens.0.saturating_add(instance.tokens_reserved),
        }
    }

    /// What a new machine of this kind would draw.
    pub fn of_new(spec: &Spec) -> Draw {
        Draw { disk_bytes: spec.disk.0, ..Draw::of_start(spec) }
    }

    /// What a machine on a disk that is there already would draw.
    pub fn of_start(spec: &Spec) -> Draw {
        Draw { cpu_millis: spec.cpu.0.into(), memory_mb: spec.memory.0.into(), ..Draw::default() }
    }

    /// Both together.
    pub fn and(self, other: Draw) -> Draw {
        Draw {
            cpu_millis: self.cpu_millis.saturating_add(other.cpu_millis),
            memory_mb: self.memory_mb.saturating_add(other.memory_mb),
            disk_bytes: self.disk_bytes.saturating_add(other.disk_bytes),
            egress_bytes: self.egress_bytes.saturating_add(other.egress_bytes),
            tokens: self.tokens.saturating_add(other.tokens),
        }
    }

    /// Whether this is within the limits.
    pub fn fits(&self, limits: &Limits) -> bool {
        self.cpu_millis <= u64::from(limits.cpu.0)
            && self.memory_mb <= u64::from(limits.memory.0)
            && self.disk_bytes <= limits.disk.0
            && self.egress_bytes <= limits.egress.0
            && self.tokens <= limits.tokens.0
    }

    /// As limits, for showing; the time is the caller's to say.
    fn shown(&self, duration: DurationMs) -> Limits {
        let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        Limits {
            cpu: CpuMillis(small(self.cpu_millis)),
            memory: MemoryMb(small(self.memory_mb)),
            disk: DiskBytes(self.disk_bytes),
            egress: EgressBytes(self.egress_bytes),
            duration,
            tokens: LlmTokens(self.tokens),
        }
    }
}

/// What the subtree of this instance holds and has spent.
pub fn drawn(family: &[Instance], id: &InstanceId) -> Draw {
    subtree(family, id).into_iter().fold(Draw::default(), |sum, i| sum.and(Draw::of(i)))
}

/// What is held and was spent, and the time since the instance was made, as limits are shown: bytes
/// that may be sent and were not are not spent.
pub fn spent(family: &[Instance], id: &InstanceId, now: Time) -> Limits {
    let age = find(family, id).map_or(DurationMs(0), |i| now.since(i.created_at));
    drawn(&unleased(family), id).shown(age)
}

/// What is left for the subtree of an instance to hold and spend, for showing: what it may send
/// already is still to be spent.
pub fn room(family: &[Instance], id: &InstanceId, now: Time) -> Limits {
    left(&unleased(family), id, now)
}

/// The same records, of which none may send more than it has.
fn unleased(family: &[Instance]) -> Vec<Instance> {
    let mut family = family.to_vec();
    family.iter_mut().for_each(|i| i.egress_allowed = i.usage_boot.egress);
    family
}

/// What one envelope has left by itself.
fn left_of(limits: &Limits, drawn: &Draw) -> Draw {
    Draw {
        cpu_millis: u64::from(limits.cpu.0).saturating_sub(drawn.cpu_millis),
        memory_mb: u64::from(limits.memory.0).saturating_sub(drawn.memory_mb),
        disk_bytes: limits.disk.0.saturating_sub(drawn.disk_bytes),
        egress_bytes: limits.egress.0.saturating_sub(drawn.egress_bytes),
        tokens: limits.tokens.0.saturating_sub(drawn.tokens),
    }
}

/// What is left below this instance: the least over its own envelope and all of those above it.
/// A guest sees no more than this of what others hold.
pub fn left(family: &[Instance], id: &InstanceId, now: Time) -> Limits {
    let least = ancestors(family, id)
        .map(|i| left_of(&i.envelope, &drawn(family, &i.id)))
        .reduce(|a, b| Draw {
            cpu_millis: a.cpu_millis.min(b.cpu_millis),
            memory_mb: a.memory_mb.min(b.memory_mb),
            disk_bytes: a.disk_bytes.min(b.disk_bytes),
            egress_bytes: a.egress_bytes.min(b.egress_bytes),
            tokens: a.tokens.min(b.tokens),
        })
        .unwrap_or_default();
    let time = find(family, id).map_or(DurationMs(0), |i| match i.ends_at {
        Some(end) => end.since(now),
        None => i.envelope.duration,
    });
    least.shown(time)
}

/// An envelope as it is asked for; what is absent is the parent's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "as in Limits")]
pub struct EnvelopeAsk {
    pub cpu: Option<CpuMillis>,
    pub memory: Option<MemoryMb>,
    pub disk: Option<DiskBytes>,
    pub egress: Option<EgressBytes>,
    pub duration: Option<DurationMs>,
    pub tokens: Option<LlmTokens>,
}

/// The envelope within another one: no field is wider than there.
pub fn narrow(parent: &Limits, ask: &EnvelopeAsk) -> Limits {
    fn least<T: Ord + Copy>(most: T, asked: Option<T>) -> T {
        asked.map_or(most, |asked| asked.min(most))
    }
    Limits {
        cpu: least(parent.cpu, ask.cpu),
        memory: least(parent.memory, ask.memory),
        disk: least(parent.disk, ask.disk),
        egress: least(parent.egress, ask.egress),
        duration: least(parent.duration, ask.duration),
        tokens: least(parent.tokens, ask.tokens),
    }
}

/// Says whether an envelope holds at least the machine whose envelope it is.
pub fn holds(envelope: &Limits, spec: &Spec) -> Result<(), Refusal> {
    if Draw::of_new(spec).fits(envelope) {
        return Ok(());
    }
    Err(Refusal::field("envelope", "no smaller than the instance's own machine"))
}

/// All that a host can give: the envelope of its own instances where it names none.
pub fn of_host(capacity: &Capacity) -> Limits {
    let cores = capacity.vcpus.saturating_mul(capacity.machines);
    let most = |limit: Limit| limit.range().1;
    Limits {
        cpu: CpuMillis(cores.saturating_mul(1000)),
        memory: capacity.memory,
        disk: capacity.disk,
        egress: EgressBytes((most(Limit::Egress) * 1e9) as u64),
        duration: DurationMs((most(Limit::Duration) * DurationMs::HOUR as f64) as u64),
        tokens: LlmTokens(most(Limit::Tokens) as u64),
    }
}

/// Says whether `more` may be drawn by this instance, or below it: its own envelope and all of those
/// above it must hold it. A refusal names what is short, and how much would pass.
pub fn admit(family: &[Instance], id: &InstanceId, more: &Draw) -> Result<(), Refusal> {
    for instance in ancestors(family, id) {
        let free = left_of(&instance.envelope, &drawn(family, &instance.id));
        let amounts: [(&'static str, &str, u64, u64, f64, &str); 5] = [
            ("envelope.vcpus", "CPU cores", more.cpu_millis, free.cpu_millis, 1e3, ""),
            ("envelope.memory_mb", "memory", more.memory_mb, free.memory_mb, 1.0, "MB"),
            ("envelope.disk_gb", "disk", more.disk_bytes, free.disk_bytes, 1e9, "GB"),
            ("envelope.egress_gb", "egress", more.egress_bytes, free.egress_bytes, 1e9, "GB"),
            ("envelope.tokens", "LLM tokens", more.tokens, free.tokens, 1.0, ""),
        ];
        for (rule, what, asked, free, unit, name) in amounts {
            if asked > free {
                // Rounded down: what is shown as allowed does pass.
                let free = (free as f64 / unit * 1e4).floor() / 1e4;
                let asked = Number(asked as f64 / unit);
                return Err(Refusal::new(
                    Code::EnvelopeExhausted,
                    format!("the envelope has not enough {what} left for this"),
                )
                .rule(rule)
                .amounts(format!("{asked}{name}"), format!("{}{name}", Number(free)))
                .hint("ask for less, or end a child first; GET /v1/self shows what is left"));
            }
        }
    }
    Ok(())
}
