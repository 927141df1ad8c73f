//! What one machine may make its gateway hold, and how fast.

use std::time::Duration;

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
    /// Addresses that are remembered with the names they were the answer for.
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
            names_remembered: 4096,
            tcp_idle: Duration::from_secs(15 * 60),
            udp_idle: Duration::from_secs(60),
            udp_dns_idle: Duration::from_secs(10),
            connect: Duration::from_secs(10),
            dns: Duration::from_secs(5),
        }
    }
}
