//! Machines in another cloud, inside of their records' rows.

use aegis_rules::remote::Remote;
use aegis_wire::words::{Time, Uuid};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
pub(super) struct RemoteRow {
    vm: Option<Uuid>,
    intended_at: Option<i64>,
    unclear: Option<(i64, i64)>,
}

impl From<&Remote> for RemoteRow {
    fn from(r: &Remote) -> RemoteRow {
        RemoteRow {
            vm: r.vm.clone(),
            intended_at: r.intended_at.map(|t| t.0),
            unclear: r.unclear.map(|(first, last)| (first.0, last.0)),
        }
    }
}

impl From<RemoteRow> for Remote {
    fn from(r: RemoteRow) -> Remote {
        Remote {
            vm: r.vm,
            intended_at: r.intended_at.map(Time),
            unclear: r.unclear.map(|(first, last)| (Time(first), Time(last))),
        }
    }
}
