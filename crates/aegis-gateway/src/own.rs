//! The host's own addresses: nothing that listens on the host is reached from inside.

use std::net::IpAddr;
use std::time::{Duration, Instant};

/// How old what is known may be.
const FRESH: Duration = Duration::from_secs(1);

#[derive(Default)]
pub(crate) struct OwnAddresses {
    read: Option<Instant>,
    addresses: Vec<IpAddr>,
}

impl OwnAddresses {
    /// The host's addresses, read anew at most once a second.
    pub fn at(&mut self, now: Instant) -> &[IpAddr] {
        if self.read.is_none_or(|read| now.duration_since(read) >= FRESH) {
            match nix::ifaddrs::getifaddrs() {
                Ok(interfaces) => {
                    self.addresses.clear();
                    self.addresses.extend(interfaces.filter_map(|interface| {
                        let address = interface.address?;
                        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
                        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
                    }));
                    self.read = Some(now);
                }
                // What was known holds; a connection that ends on this host is noticed by its two
                // ends being the same.
                Err(error) => tracing::warn!(%error, "the host's addresses can't be read"),
            }
        }
        &self.addresses
    }
}
