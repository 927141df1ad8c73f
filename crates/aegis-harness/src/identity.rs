//! `identify`: what makes a clone itself. No user code runs before it is done.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::Duration;

use aegis_wire::channel::rpc::{CODE_INTERNAL, CODE_PARAMS, RpcError};
use aegis_wire::channel::{Identified, Identify};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::time::{ClockId, Timespec};

use crate::disks::Disks;
use crate::machine::Machine;
use crate::names::{Names, Opened};
use crate::note::note;
use crate::{disks, root, sys};

/// How long the host's new size of the disk may take to arrive.
const DISK_DEADLINE: Duration = Duration::from_secs(10);
/// Linux's own limit for a host name, bytes.
const HOSTNAME_MAX: usize = 64;

/// Why a clone did not become itself.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    /// The host asked for what can't be.
    #[error("{0}")]
    Params(&'static str),
    /// The disk did not get its size.
    #[error("the disk shows {shown} bytes instead of {wanted}")]
    Disk {
        /// Bytes.
        shown: u64,
        /// Bytes.
        wanted: u64,
    },
    /// Both disks are not there.
    #[error("a disk is missing")]
    NoDisk,
    /// The kernel refused.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What came of it.
        source: io::Error,
    },
}

impl Failed {
    /// As the host hears it.
    pub fn answer(&self) -> RpcError {
        let code = match self {
            Failed::Params(_) => CODE_PARAMS,
            _ => CODE_INTERNAL,
        };
        RpcError::new(code, self.to_string())
    }
}

fn system(what: &'static str) -> impl Fn(io::Error) -> Failed {
    move |source| Failed::System { what, source }
}

/// Sets the clock to the host's.
pub fn set_clock(unix_ns: i64) -> io::Result<()> {
    let time = Timespec {
        tv_sec: unix_ns.div_euclid(1_000_000_000),
        tv_nsec: unix_ns.rem_euclid(1_000_000_000),
    };
    Ok(rustix::time::clock_settime(ClockId::Realtime, time)?)
}

/// Gives the machine clock, randomness, names and disk of its own.
///
/// `based` are the disks, when they were found and the base was mounted before.
pub async fn take(
    machine: &Arc<Machine>,
    ask: Identify,
    based: Option<Disks>,
) -> Result<(Identified, OwnedFd), Failed> {
    tell_kernel(machine, &ask)?;
    let new_base = based.is_none();
    let found = match based {
        Some(disks) => disks,
        None => machine.uevents.until(DISK_DEADLINE, disks::find).await.ok_or(Failed::NoDisk)?,
    };
    let wanted = ask.disk_bytes;
    let grown = || (found.own.bytes() == wanted).then_some(());
    if machine.uevents.until(DISK_DEADLINE, grown).await.is_none() {
        return Err(Failed::Disk { shown: found.own.bytes(), wanted });
    }
    let identified = identified(&ask);
    let assemble = move || {
        if new_base {
            root::mount_base(&found)?;
        }
        let names = Names { hostname: &ask.hostname, machine_id: &ask.machine_id };
        root::assemble(&found, &names)
    };
    let own = machine.hands.run(assemble).await.and_then(|done| done).map_err(system("root"))?;
    Ok((identified, own))
}

/// Gives a machine that is a copy of another one clock, randomness and names of its own.
pub async fn change(
    machine: &Arc<Machine>,
    ask: Identify,
    files: Opened,
) -> Result<Identified, Failed> {
    tell_kernel(machine, &ask)?;
    // Its processes may know the other one's, and make names of it; for a machine that begins, whose
    // card is alone on its link, it would only take time.
    if let Some(Err(e)) = machine.marks.card.as_ref().map(|card| card.set_address(ask.mac)) {
        note(&format!("address of the card: {e}"));
    }
    let identified = identified(&ask);
    let rename = move || {
        files.change(&Names { hostname: &ask.hostname, machine_id: &ask.machine_id });
    };
    machine.hands.run(rename).await.map_err(system("names"))?;
    Ok(identified)
}

fn identified(ask: &Identify) -> Identified {
    Identified {
        boot_id: ask.boot_id.clone(),
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
    }
}

/// All of an identity that the kernel holds.
fn tell_kernel(machine: &Arc<Machine>, ask: &Identify) -> Result<(), Failed> {
    let entropy = check(ask)?;
    set_clock(ask.unix_ns).map_err(system("clock"))?;
    sys::reseed(&machine.marks.random, &entropy).map_err(system("randomness"))?;
    rustix::system::sethostname(ask.hostname.as_bytes())
        .map_err(|e| system("host name")(e.into()))?;
    if let Some(file) = machine.marks.boot_id.as_ref() {
        // All are of one length: nothing of an earlier one is left.
        file.write_all_at(format!("{}\n", ask.boot_id).as_bytes(), 0).map_err(system("boot id"))?;
    }
    Ok(())
}

fn check(ask: &Identify) -> Result<[u8; sys::ENTROPY_LEN], Failed> {
    let name = ask.hostname.as_bytes();
    let plain = |b: &u8| b.is_ascii_alphanumeric() || *b == b'-' || *b == b'.';
    if name.is_empty() || name.len() > HOSTNAME_MAX || !name.iter().all(plain) {
        return Err(Failed::Params("a host name has 1 to 64 letters, digits, dots and dashes"));
    }
    let hex = ask.machine_id.bytes().all(|b| b.is_ascii_hexdigit());
    if ask.machine_id.len() != 32 || !hex {
        return Err(Failed::Params("a machine id has 32 hex digits"));
    }
    let uuid = ask.boot_id.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    if ask.boot_id.len() != 36 || !uuid {
        return Err(Failed::Params("a boot id is a UUID"));
    }
    let entropy = STANDARD.decode(&ask.entropy).ok().and_then(|bytes| bytes.try_into().ok());
    entropy.ok_or(Failed::Params("entropy is 64 bytes in base64"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask() -> Identify {
        Identify {
            unix_ns: 0,
            entropy: STANDARD.encode([7; 64]),
            hostname: "box-1.example".to_owned(),
            machine_id: "0123456789abcdef0123456789abcdef".to_owned(),
            boot_id: "0c0ffee0-0000-4000-8000-000000000001".to_owned(),
            disk_bytes: 0,
            mac: [2, 0, 0, 0, 0, 1],
        }
    }

    #[test]
    fn what_is_written_to_files_has_no_surprises() {
        assert_eq!(check(&ask()).unwrap(), [7; 64]);
        let bad: [fn(&mut Identify); 7] = [
            |a| a.hostname = String::new(),
            |a| a.hostname = "a".repeat(65),
            |a| a.hostname = "a\nb".to_owned(),
            |a| a.machine_id.push('0'),
            |a| a.machine_id = "g".repeat(32),
            |a| a.boot_id = "\n".repeat(36),
            |a| a.entropy = STANDARD.encode([7; 63]),
        ];
        for spoil in bad {
            let mut ask = ask();
            spoil(&mut ask);
            assert!(check(&ask).is_err(), "{ask:?}");
        }
    }
}
