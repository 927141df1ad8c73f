//! The machine's only link, and the gateway at its other end.
//!
//! The gateway stands from the worker's start, closed; what the machine may reach and send is set
//! before its first packet, and said anew whenever it changes. What it has to tell is kept here as a
//! level or bounded list until aegisd listens, so that no word is lost with a daemon.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};

use aegis_gateway::{Budgets, Config, Gateway, News, ViaHatch};
use aegis_wire::channel::rpc::RpcError;
use aegis_wire::words::EgressBytes;
use aegis_wire::worker::{Egress, EgressNews, Trimmed, run_dir};
use anyhow::Context as _;
use tokio::sync::{Notify, mpsc};

use crate::life::{conflict, lock};

/// Denials that wait for a daemon; the oldest go first.
const DENIALS_MAX: usize = 64;

/// The gateway of one machine, and what it has to tell.
pub struct Net {
    gateway: Gateway,
    // Hosts that the machine's own authority signs for: those of its launch.
    certified: Mutex<Option<Vec<String>>>,
    heard: Mutex<Heard>,
    told: Mutex<Told>,
    news: Notify,
}

/// The last word about what may be sent.
#[derive(Default)]
struct Heard {
    version: u64,
    // It took back: only a later one gives again.
    trimmed: bool,
}

#[derive(Default)]
struct Told {
    // Low or spent, until another word about what may be sent comes; numbered, from 1.
    need: Option<(u64, EgressNews)>,
    needs: u64,
    denials: VecDeque<EgressNews>,
}

impl Told {
    fn need(&mut self, need: EgressNews) {
        self.needs += 1;
        self.need = Some((self.needs, need));
    }
}

impl Net {
    /// Starts the gateway of the machine whose run directory this is.
    pub fn start(run_dir: &Path) -> anyhow::Result<Arc<Net>> {
        let path = run_dir.join(run_dir::EGRESS);
        let book = File::options().create(true).truncate(true).write(true).open(&path);
        let book = book.with_context(|| format!("can't make {}", path.display()))?;
        let config = Config {
            door: run_dir.join(run_dir::DOOR),
            resolvers: Vec::new(),
            budgets: Budgets::default(),
            book: Some(book),
        };
        let gateway = Gateway::start(config).context("can't start the gateway")?;
        let news = gateway.news().context("the gateway's news are taken")?;
        let net = Arc::new(Net {
            gateway,
            certified: Mutex::default(),
            heard: Mutex::default(),
            told: Mutex::default(),
            news: Notify::new(),
        });
        tokio::spawn(listen(Arc::clone(&net), news));
        Ok(net)
    }

    /// Takes the other end of a machine's link.
    pub fn plug(&self, link: OwnedFd) {
        self.gateway.plug(link);
    }

    /// The machine has no process any more; nothing that it had open stays.
    pub fn unplug(&self) {
        self.gateway.unplug();
    }

    /// Cuts the machine off, for good.
    pub fn cut(&self) {
        self.gateway.cut();
    }

    /// The run directory was renamed.
    pub fn follow(&self, run_dir: &Path) {
        self.gateway.set_door(run_dir.join(run_dir::DOOR));
    }

    /// What the machine may reach and send from now on.
    pub fn set(&self, terms: &Egress) {
        self.gateway.set_resolvers(terms.resolvers.clone());
        let via_hatch = via_hatch(terms, &mut lock(&self.certified));
        self.gateway.set_policy(terms.policy.clone(), via_hatch);
        let mut heard = lock(&self.heard);
        // An older word about what may be sent came late.
        if terms.version < heard.version || (terms.version == heard.version && heard.trimmed) {
            return;
        }
        if terms.version > heard.version {
            lock(&self.told).need = None;
        }
        *heard = Heard { version: terms.version, trimmed: false };
        self.gateway.set_allowance(terms.ceiling.0, terms.last);
    }

    /// Takes back what may be sent and was not; says what was sent.
    pub async fn trim(&self, version: u64) -> Result<Trimmed, RpcError> {
        {
            let mut heard = lock(&self.heard);
            if version < heard.version {
                return Err(conflict("it was allowed something else meanwhile"));
            }
            *heard = Heard { version, trimmed: true };
        }
        let sent = self.gateway.trim().await;
        let sent = sent.ok_or_else(|| conflict("its gateway has ended"))?;
        Ok(Trimmed { ceiling: EgressBytes(sent) })
    }

    /// Payload bytes that were sent outside, and that came from there.
    pub fn carried(&self) -> (EgressBytes, u64) {
        let counts = self.gateway.counts();
        (EgressBytes(counts.egress_bytes), counts.ingress_bytes)
    }

    /// The next word for aegisd; `heard` is the number of the last need that this listener was told,
    /// 0 at first. Cancel-safe.
    pub async fn word(&self, heard: &mut u64) -> EgressNews {
        loop {
            {
                let mut told = lock(&self.told);
                if let Some((number, need)) = &told.need
                    && *number > *heard
                {
                    *heard = *number;
                    return need.clone();
                }
                if let Some(denied) = told.denials.pop_front() {
                    return denied;
                }
            }
            self.news.notified().await;
        }
    }
}

/// What goes through the hatch. A certificate that a machine has does not change while it runs: of its
/// first hosts some may be taken away, and others' TLS it would not trust.
fn via_hatch(terms: &Egress, certified: &mut Option<Vec<String>>) -> ViaHatch {
    let said = if terms.via_door_tls { terms.via_door.clone() } else { Vec::new() };
    let certified = certified.get_or_insert_with(|| said.clone());
    let https = said.into_iter().filter(|host| certified.contains(host)).collect();
    ViaHatch { http: terms.via_door.clone(), https }
}

async fn listen(net: Arc<Net>, mut news: mpsc::Receiver<News>) {
    while let Some(said) = news.recv().await {
        {
            let mut told = lock(&net.told);
            match said {
                News::Low => told.need(EgressNews::Low),
                News::Exhausted => told.need(EgressNews::Spent),
                News::Denied { denied, count } => {
                    if told.denials.len() >= DENIALS_MAX {
                        told.denials.pop_front();
                    }
                    told.denials.push_back(EgressNews::Denied {
                        rule: denied.rule.to_owned(),
                        requested: denied.requested,
                        allowed: denied.allowed,
                        count,
                    });
                }
            }
        }
        net.news.notify_one();
    }
}

/// What a machine of this run directory has sent; unknown where its book can't be read. Where there
/// is none, there never was a gateway.
pub fn sent(run_dir: &Path) -> Option<EgressBytes> {
    use std::os::unix::fs::FileExt as _;
    let mut bytes = [0; 8];
    let book = match File::open(run_dir.join(run_dir::EGRESS)) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Some(EgressBytes(0)),
        opened => opened.ok()?,
    };
    if book.metadata().ok()?.len() == 0 {
        return Some(EgressBytes(0));
    }
    book.read_exact_at(&mut bytes, 0).ok()?;
    Some(EgressBytes(u64::from_le_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_tls_is_taken_over_for_which_a_machine_has_no_certificate() {
        let terms = |hosts: &[&str], tls| Egress {
            policy: Default::default(),
            ceiling: EgressBytes(0),
            last: false,
            version: 0,
            via_door: hosts.iter().map(ToString::to_string).collect(),
            via_door_tls: tls,
            resolvers: Vec::new(),
        };
        let mut certified = None;
        let mut https = |hosts: &[&str], tls| via_hatch(&terms(hosts, tls), &mut certified).https;
        assert_eq!(https(&["a", "b"], true), ["a", "b"]);
        assert_eq!(https(&["b", "c"], true), ["b"]);
        assert_eq!(https(&["a", "b"], false), [""; 0]);
        assert_eq!(https(&["a"], true), ["a"]);
        // Launched without: whatever the settings say later.
        let mut none = None;
        for tls in [false, true] {
            let via = via_hatch(&terms(&["a"], tls), &mut none);
            assert_eq!((via.http, via.https), (vec!["a".to_owned()], vec![]));
        }
    }
}
