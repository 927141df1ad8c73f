//! What a scrape shows (`GET /metrics`): counts since the start, and what holds now, read from the
//! ledger in this moment. A guest that ended is not in it any more.

use aegis_rules::instance::InstanceState;
use aegis_wire::bounds::METRICS_GUESTS_MAX;
use prometheus::core::Collector as _;
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, GaugeVec, IntCounter, Opts, TextEncoder};

use super::{App, Error, Host, couch};

/// States that a machine on record can have.
const STATES: [InstanceState; 5] = [
    InstanceState::Starting,
    InstanceState::Running,
    InstanceState::Paused,
    InstanceState::Frozen,
    InstanceState::Stopped,
];

/// All metrics in Prometheus' text format.
pub fn scrape(_: Host, app: &App) -> Result<String, Error> {
    let mut families = now(app)?;
    families.extend(app.ctx.metrics.families());
    families.extend(app.ctx.ledger.tally().families());
    // One without samples is nothing that can be written.
    families.retain(|family| !family.get_metric().is_empty());
    Ok(TextEncoder::new().encode_to_string(&families).map_err(std::io::Error::other)?)
}

fn one(name: &str, help: &str, value: f64) -> Vec<MetricFamily> {
    let gauge = Gauge::new(name, help).expect("a good name");
    gauge.set(value);
    gauge.collect()
}

fn many(name: &str, help: &str, label: &str) -> GaugeVec {
    GaugeVec::new(Opts::new(name, help), &[label]).expect("good names")
}

/// What holds in this moment.
fn now(app: &App) -> Result<Vec<MetricFamily>, Error> {
    let ctx = &app.ctx;
    let time = ctx.now();
    let (instances, guests, (invites_active, guests_live)) = ctx.ledger.read(|f| {
        let guests = f.live_guests(time, METRICS_GUESTS_MAX)?;
        let guests = guests.into_iter().map(|guest| couch::metered(app, f, guest));
        Ok((f.instances()?, guests.collect::<Result<Vec<_>, _>>()?, f.counts(time)?))
    })?;

    let machines = many("aegis_machines", "Machines on record, by state.", "state");
    for state in STATES {
        let count = instances.iter().filter(|i| i.state == state).count();
        machines.with_label_values(&[state.word()]).set(count as f64);
    }

    let tokens = ["aegis_guest_tokens_limit", "aegis_guest_tokens_left"];
    let egress = ["aegis_guest_egress_bytes_limit", "aegis_guest_egress_bytes_left"];
    let of_guests = |[limit, left]: [&str; 2], what: &str| {
        let limit = many(limit, &format!("{what} that a live guest may spend."), "guest");
        (limit, many(left, &format!("{what} that a live guest may still spend."), "guest"))
    };
    let tokens = of_guests(tokens, "LLM tokens");
    let egress = of_guests(egress, "Payload to outside addresses, bytes,");
    for couch::Metered { guest, usage } in &guests {
        for ((all, left), limit, used) in [
            (&tokens, guest.limits.tokens.0, usage.tokens.0),
            (&egress, guest.limits.egress.0, usage.egress.0),
        ] {
            all.with_label_values(&[guest.id.as_str()]).set(limit as f64);
            left.with_label_values(&[guest.id.as_str()]).set(limit.saturating_sub(used) as f64);
        }
    }
    let unlisted = guests_live.saturating_sub(guests.len() as u64);

    let commits = "Groups of writes that the ledger has synced.";
    let commits = IntCounter::new("aegis_ledger_commits_total", commits).expect("a good name");
    commits.inc_by(*ctx.ledger.commits().borrow());
    let build = many("aegis_build_info", "Always 1, for the version of this daemon.", "version");
    build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
    let start = app.started_at.0 as f64 / 1000.0;

    Ok([
        build.collect(),
        one("aegis_start_time_seconds", "When this daemon started, in Unix time.", start),
        machines.collect(),
        one("aegis_invites_active", "Invites that can be redeemed.", invites_active as f64),
        one("aegis_guests_live", "Guests that have not ended.", guests_live as f64),
        one("aegis_guests_unlisted", "Live guests beyond those listed here.", unlisted as f64),
        tokens.0.collect(),
        tokens.1.collect(),
        egress.0.collect(),
        egress.1.collect(),
        commits.collect(),
    ]
    .concat())
}
