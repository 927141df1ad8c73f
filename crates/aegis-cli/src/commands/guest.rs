//! `aegis guest …`: who redeemed an invite.

use clap::Subcommand;
use serde_json::{Value, json};

use super::invite::more;
use super::reach::{self, ReachCommand};
use super::{Ask, items, maybe, text, when};
use crate::failure::{EXIT_OTHER, Failure, Result};
use crate::human;
use crate::output::{fields, plain, say, table};
use aegis_wire::path::escape;

/// What can be asked of guests.
#[derive(Subcommand, Debug)]
pub enum GuestCommand {
    /// List them, newest first
    #[command(visible_alias = "ls")]
    List {
        /// Only those in this state
        #[arg(long, value_name = "STATUS", value_parser = ["provisioning", "running", "frozen", "stopped", "expired", "revoked"])]
        status: Option<String>,
    },
    /// Show what one used, and may use
    Status {
        /// Its id
        id: String,
    },
    /// End it: revoked, machines destroyed, proven gone
    #[command(after_help = "\
The guest's token dies first, then its machines are frozen and destroyed, and only what was \
verified gone is on the receipt. Exit code 1 when the proof is still missing: the daemon goes on.")]
    Kill {
        /// Its id
        id: String,
    },
    /// Hold its machines
    Freeze {
        /// Its id
        id: String,
    },
    /// Let its machines go on
    Thaw {
        /// Its id
        id: String,
    },
    #[command(flatten)]
    Reach(ReachCommand),
    /// Say where its machine is (for `provisioner = "manual"`)
    Activate {
        /// Its id
        id: String,
        /// Id of the machine that was made for it
        #[arg(long, value_name = "ID")]
        vm_id: String,
        /// Where its agent answers
        #[arg(long, value_name = "URL")]
        agent_endpoint: String,
    },
}

/// Asks.
pub async fn run(ask: &Ask, command: GuestCommand) -> Result<()> {
    let path = |id: &str| format!("/couch/guests/{}", escape(id));
    match command {
        GuestCommand::List { status } => list(ask, status).await,
        GuestCommand::Status { id } => {
            let guest = ask.client.get(&format!("{}/status", path(&id))).await?;
            ask.format.answer(&guest, || status_fields(&guest))
        }
        GuestCommand::Kill { id } => {
            let killed = ask.client.delete(&path(&id)).await?;
            ask.format.answer(&killed, || killed_words(&killed))?;
            if killed.get("destroying").and_then(Value::as_bool) == Some(true) {
                say(
                    "revoked, but not all is proven gone yet; the daemon goes on: aegis guest status",
                );
                return Err(Failure::Exit(EXIT_OTHER));
            }
            Ok(())
        }
        GuestCommand::Freeze { id } => {
            let guest = ask.client.post(&format!("{}/freeze", path(&id)), None).await?;
            ask.format.answer(&guest, || format!("{}\n", text(&guest, "status")))
        }
        GuestCommand::Thaw { id } => {
            let guest = ask.client.post(&format!("{}/thaw", path(&id)), None).await?;
            ask.format.answer(&guest, || format!("{}\n", text(&guest, "status")))
        }
        GuestCommand::Reach(command) => reach::run(ask, command).await,
        GuestCommand::Activate { id, vm_id, agent_endpoint } => {
            let body = json!({ "vmId": vm_id, "agentEndpoint": agent_endpoint });
            let guest = ask.client.post(&format!("{}/activate", path(&id)), Some(body)).await?;
            ask.format.answer(&guest, || status_fields(&guest))
        }
    }
}

async fn list(ask: &Ask, status: Option<String>) -> Result<()> {
    let query = status.map(|s| format!("?status={}", escape(&s))).unwrap_or_default();
    let answer = ask.client.get(&format!("/couch/guests{query}")).await?;
    ask.format.answer(&answer, || {
        let rows = items(&answer, "guests").iter().map(|guest| {
            vec![
                text(guest, "id"),
                text(guest, "name"),
                text(guest, "status"),
                maybe(guest, "agentEndpoint"),
                cpu(guest),
                used(guest, "memoryPeakMB", "maxMemoryMB", "MB"),
                used(guest, "diskUsedGB", "maxDiskGB", "GB"),
                when(guest, "expiresAt"),
            ]
        });
        let head = ["id", "name", "status", "agent", "cpu", "memory", "disk", "expires"];
        table(&head, rows.collect()) + &more(&answer)
    })
}

fn usage(guest: &Value, field: &str) -> f64 {
    guest.pointer(&format!("/resourceUsage/{field}")).and_then(Value::as_f64).unwrap_or(0.0)
}

fn cpu(guest: &Value) -> String {
    human::seconds(usage(guest, "cpuSeconds"))
}

/// `used/limit unit`
fn used(guest: &Value, usage_field: &str, limit_field: &str, unit: &str) -> String {
    let used = (usage(guest, usage_field) * 1000.0).round() / 1000.0;
    let limit = guest.pointer(&format!("/resourceLimits/{limit_field}")).map(plain);
    format!("{used}/{} {unit}", limit.unwrap_or_else(|| "-".into()))
}

/// What a guest is and used.
pub fn status_fields(guest: &Value) -> String {
    let mut words = fields(&[
        ("Guest", format!("{}{}", maybe(guest, "id"), maybe(guest, "guestId"))),
        ("Name", maybe(guest, "name")),
        ("Status", text(guest, "status")),
        ("Machine", maybe(guest, "vmId")),
        ("Agent", maybe(guest, "agentEndpoint")),
        ("Problem", maybe(guest, "provisionError")),
        (
            "CPU",
            format!(
                "{} used, {} cores at most",
                cpu(guest),
                guest.pointer("/resourceLimits/maxCpuCores").map_or("-".into(), plain)
            ),
        ),
        ("Memory", used(guest, "memoryPeakMB", "maxMemoryMB", "MB at most so far")),
        ("Disk", used(guest, "diskUsedGB", "maxDiskGB", "GB")),
        ("Egress", used(guest, "networkEgressGB", "maxNetworkEgressGB", "GB")),
        ("Tokens", used(guest, "tokensUsed", "maxTokenBudget", "")),
        ("Up", human::seconds(usage(guest, "uptimeSeconds"))),
        ("Exceeded", items(guest, "violations").iter().map(plain).collect::<Vec<_>>().join(", ")),
        ("Expires", when(guest, "expiresAt")),
        ("Stopped", when(guest, "stoppedAt")),
    ]);
    if let Some(receipt) = guest.get("receipt").filter(|receipt| !receipt.is_null()) {
        words += &receipt_words(receipt);
    }
    words
}

fn killed_words(killed: &Value) -> String {
    let mut words = fields(&[
        ("Guest", text(killed, "id")),
        ("Status", text(killed, "status")),
        ("Stopped", maybe(killed, "stoppedAt")),
    ]);
    if let Some(receipt) = killed.get("receipt").filter(|receipt| !receipt.is_null()) {
        words += &receipt_words(receipt);
    }
    words
}

fn receipt_words(receipt: &Value) -> String {
    let rows = items(receipt, "machines").iter().map(|machine| {
        vec![
            text(machine, "id"),
            text(machine, "frozenAt"),
            text(machine, "destroyedAt"),
            text(machine, "verified"),
        ]
    });
    let machines = table(&["machine", "frozen", "destroyed", "verified gone"], rows.collect());
    let end = fields(&[
        ("Took", format!("{} ms", text(receipt, "elapsedMs"))),
        ("Receipt hash", text(receipt, "hash")),
    ]);
    format!("\nReceipt\n{machines}{end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receipt_shows_what_was_verified() {
        let killed = json!({ "id": "g", "status": "revoked", "stoppedAt": "2026-02-18T00:00:00.000Z",
            "receipt": { "machines": [{ "id": "inst-1", "frozenAt": null,
                "destroyedAt": "2026-02-18T00:00:00.000Z",
                "verified": ["process", "cgroup", "network", "disk"] }],
                "elapsedMs": 41, "hash": "abc" } });
        let words = killed_words(&killed);
        for part in ["revoked", "process, cgroup, network, disk", "41 ms", "abc"] {
            assert!(words.contains(part), "{part} in {words}");
        }
    }

    #[test]
    fn usage_stands_beside_its_limit() {
        let guest = json!({ "resourceUsage": { "diskUsedGB": 0.123456 },
            "resourceLimits": { "maxDiskGB": 2 } });
        assert_eq!(used(&guest, "diskUsedGB", "maxDiskGB", "GB"), "0.123/2 GB");
    }
}
