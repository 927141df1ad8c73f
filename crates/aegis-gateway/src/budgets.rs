//! What one machine may make its gateway hold, and how fast.

use std::time::{Duration, Instant};

/// Bounds for one machine. The defaults serve a busy build; none of them can be passed by a guest,
/// whatever it sends.
#[derive(Clone, Debug)]
pub struct Budgets {
    /// TCP flows at a time, those that are still being connected included.
    pub tcp_flows: usize,
    /// UDP flows at a time.
    pub udp_flows: usize,
    /// New flows per second, over a longer time.
    pub new_flows_per_second: u32,
    /// New flows at once.
    pub new_flows_burst: u32,
    /// Largest buffer of one TCP flow in one direction, bytes.
    pub flow_buffer_max: usize,
    /// Buffers of all TCP flows together, bytes.
    pub buffers_max: usize,
    /// DNS questions that wait for an answer from outside.
    pub dns_in_flight: usize,
    /// DNS questions per second, over a longer time; others get no answer.
    pub questions_per_second: u32,
    /// DNS questions at once.
    pub questions_burst: u32,
    /// Names that are remembered with the addresses that were their answer.
    pub names_remembered: usize,
    /// A TCP flow over which nothing goes is reset after this.
    pub tcp_idle: Duration,
    /// A UDP flow over which nothing goes is forgotten after this.
    pub udp_idle: Duration,
    /// As `udp_idle`, at port 53.
    pub udp_dns_idle: Duration,
    /// A server outside has this long to accept a connection, and so has the guest to finish its
    /// handshake.
    pub connect: Duration,
    /// What a DNS question may take, all tries together.
    pub dns: Duration,
}

impl Default for Budgets {
    fn default() -> Budgets {
        Budgets {
            tcp_flows: 1024,
            udp_flows: 256,
            new_flows_per_second: 200,
            new_flows_burst: 400,
            flow_buffer_max: 1024 * 1024,
            buffers_max: 64 * 1024 * 1024,
            dns_in_flight: 64,
            questions_per_second: 500,
            questions_burst: 1000,
            names_remembered: 4096,
            tcp_idle: Duration::from_secs(15 * 60),
            udp_idle: Duration::from_secs(60),
            udp_dns_idle: Duration::from_secs(10),
            connect: Duration::from_secs(10),
            dns: Duration::from_secs(5),
        }
    }
}

/// The smallest buffer of a flow in one direction, bytes.
pub(crate) const BUFFER_MIN: usize = 8 * 1024;
/// A new flow takes at most this part of what is left of all buffers.
const SHARE: usize = 64;
/// Descriptors that this process needs for other things.
const DESCRIPTORS_OTHER: u64 = 256;

impl Budgets {
    /// The same, as far as this process may have descriptors; it gets more if it can. A guest must
    /// not use up those that its machine is ruled by.
    pub(crate) fn within_descriptors(mut self) -> Budgets {
        use rustix::process::{Resource, getrlimit, setrlimit};
        let others = self.udp_flows + self.dns_in_flight;
        let needed = (self.tcp_flows + others) as u64 + DESCRIPTORS_OTHER;
        let mut limit = getrlimit(Resource::Nofile);
        if limit.current.is_some_and(|current| current < needed) {
            limit.current = Some(limit.maximum.map_or(needed, |most| most.min(needed)));
            if let Err(error) = setrlimit(Resource::Nofile, limit) {
                tracing::warn!(%error, "no more descriptors are to be had");
            }
        }
        if let Some(current) = getrlimit(Resource::Nofile).current {
            let left = usize::try_from(current.saturating_sub(DESCRIPTORS_OTHER));
            let left = left.unwrap_or(usize::MAX).saturating_sub(others);
            self.tcp_flows = self.tcp_flows.min(left.max(1));
        }
        self
    }
}

impl Budgets {
    /// The buffer of a new flow in one direction, bytes: plenty for the first ones, less and less for
    /// more, so that there is always something left. `flows` are there with it, and have `used`.
    pub(crate) fn buffer(&self, flows: usize, used: usize) -> usize {
        // What every flow has at least is set aside.
        let aside = 2 * BUFFER_MIN * self.tcp_flows.saturating_sub(flows.saturating_sub(1));
        let left = self.buffers_max.saturating_sub(aside).saturating_sub(used);
        let share = BUFFER_MIN + left / SHARE;
        share.min(self.flow_buffer_max).max(BUFFER_MIN) / 4096 * 4096
    }
}

/// Something that happens: so many at once, so many per second after that.
pub(crate) struct Bucket {
    per_second: f64,
    burst: f64,
    left: f64,
    filled: Instant,
}

impl Bucket {
    pub fn new(per_second: u32, burst: u32, now: Instant) -> Bucket {
        let burst = f64::from(burst);
        Bucket { per_second: per_second.into(), burst, left: burst, filled: now }
    }

    /// Takes one, if there is one.
    pub fn take(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.left = (self.left + passed * self.per_second).min(self.burst);
        self.filled = now;
        let there = self.left >= 1.0;
        if there {
            self.left -= 1.0;
        }
        there
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_buffers_together_have_their_bound() {
        let budgets = Budgets::default();
        let mut buffers: Vec<usize> = Vec::new();
        let mut used = 0;
        for flows in 1..=budgets.tcp_flows {
            let buffer = budgets.buffer(flows, used);
            used += 2 * buffer;
            buffers.push(buffer);
            assert!(used <= budgets.buffers_max, "{flows} flows have {used} bytes");
        }
        assert!(buffers.is_sorted_by(|a, b| a >= b));
        assert!(buffers[0] >= 512 * 1024 && buffers[budgets.tcp_flows - 1] >= BUFFER_MIN);
        // No matter in which order they go and come.
        let mut flows = std::collections::VecDeque::from(buffers);
        for _ in 0..10 * budgets.tcp_flows {
            used -= 2 * flows.pop_front().unwrap();
            let buffer = budgets.buffer(flows.len() + 1, used);
            flows.push_back(buffer);
            used += 2 * buffer;
            assert!(used <= budgets.buffers_max);
        }
    }

    #[test]
    fn a_burst_then_a_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(200, 400, start);
        let mut take = |millis| {
            let now = start + Duration::from_millis(millis);
            (0..1000).filter(|_| bucket.take(now)).count()
        };
        assert_eq!((take(0), take(500), take(60_000)), (400, 100, 400));
    }
}
