//! The name server: names below `.test`, some of them liars.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, PoisonError};

use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::net::Place;
use super::seen::{Question, Seen};

/// Most that an answer by UDP has, bytes; what is longer is asked for by TCP.
const UDP_MAX: usize = 512;
/// How long an answer holds, seconds.
const TTL: u32 = 60;

/// What is known of a name.
#[derive(Clone, Debug)]
pub enum Fact {
    /// Its addresses.
    Is(Vec<IpAddr>),
    /// Its addresses, another list for each question of either type; the last one again and again.
    Turns(Vec<Vec<IpAddr>>),
    /// Another name's.
    Alias(String),
    /// A text of so many bytes.
    Text(usize),
    /// Nothing is answered, ever.
    Silence,
    /// The server fails.
    Failure,
}

/// All names, and how often each was asked for.
pub(super) struct Zone {
    facts: Mutex<BTreeMap<String, (Fact, usize)>>,
    seen: Arc<Seen>,
}

impl Zone {
    pub(super) fn new(place: &Place, seen: Arc<Seen>) -> Zone {
        let zone = Zone { facts: Mutex::default(), seen };
        for (name, fact) in names(place) {
            zone.set(name, fact);
        }
        zone
    }

    /// Says something of a name, from now on; `*.name` is of all below it that are not known.
    pub(super) fn set(&self, name: &str, fact: Fact) {
        self.facts().insert(name.to_owned(), (fact, 0));
    }

    fn facts(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, (Fact, usize)>> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fact(&self, name: &str) -> Option<Fact> {
        let mut facts = self.facts();
        let wild = || {
            let mut rest = name;
            while let Some((_, above)) = rest.split_once('.') {
                let key = format!("*.{above}");
                if facts.contains_key(&key) {
                    return Some(key);
                }
                rest = above;
            }
            None
        };
        let key = if facts.contains_key(name) { name.to_owned() } else { wild()? };
        let (fact, asked) = facts.get_mut(&key)?;
        let now = *asked;
        *asked += 1;
        Some(match fact {
            Fact::Turns(lists) => Fact::Is(lists.get(now).or(lists.last())?.clone()),
            fact => fact.clone(),
        })
    }

    /// The answer to a message; none where there is silence, or what came is no question.
    fn answer(&self, bytes: &[u8], tcp: bool) -> Option<Vec<u8>> {
        let question = Message::from_vec(bytes).ok()?;
        let query = question.queries.first()?.clone();
        let name = query.name().to_lowercase().to_utf8();
        let name = name.trim_end_matches('.').to_owned();
        self.seen.question(Question {
            name: name.clone(),
            kind: query.query_type().to_string(),
            tcp,
        });
        let mut answer = Message::response(question.metadata.id, question.metadata.op_code);
        answer.metadata.message_type = MessageType::Response;
        answer.metadata.recursion_desired = question.metadata.recursion_desired;
        answer.metadata.recursion_available = true;
        answer.add_query(query.clone());
        answer.metadata.response_code =
            self.records(&name, query.query_type(), &mut answer.answers)?;
        let whole = answer.to_vec().ok()?;
        if tcp || whole.len() <= UDP_MAX { Some(whole) } else { answer.truncate().to_vec().ok() }
    }

    /// What is said of a name, and of those that it is an alias of.
    fn records(
        &self,
        name: &str,
        kind: RecordType,
        answers: &mut Vec<Record>,
    ) -> Option<ResponseCode> {
        let mut name = name.to_owned();
        // A loop ends too.
        for _ in 0..8 {
            let owner = Name::from_ascii(format!("{name}.")).ok()?;
            let mut say = |data| answers.push(Record::from_rdata(owner.clone(), TTL, data));
            match (self.fact(&name), kind) {
                (None, _) => return Some(ResponseCode::NXDomain),
                (Some(Fact::Silence), _) => return None,
                (Some(Fact::Failure), _) => return Some(ResponseCode::ServFail),
                (Some(Fact::Alias(of)), _) => {
                    say(RData::CNAME(CNAME(Name::from_ascii(format!("{of}.")).ok()?)));
                    name = of;
                    continue;
                }
                (Some(Fact::Is(addresses)), RecordType::A | RecordType::AAAA) => {
                    for address in addresses {
                        match address {
                            IpAddr::V4(v4) if kind == RecordType::A => say(RData::A(A(v4))),
                            IpAddr::V6(v6) if kind == RecordType::AAAA => {
                                say(RData::AAAA(AAAA(v6)));
                            }
                            _ => {}
                        }
                    }
                }
                (Some(Fact::Text(length)), RecordType::TXT) => {
                    let part = |n: usize| "x".repeat(n.min(200));
                    let parts = (0..length).step_by(200).map(|at| part(length - at));
                    say(RData::TXT(TXT::new(parts.collect())));
                }
                (Some(_), _) => {}
            }
            return Some(ResponseCode::NoError);
        }
        Some(ResponseCode::NoError)
    }

    /// Answers by UDP, for ever.
    pub(super) async fn serve_udp(self: Arc<Zone>, socket: UdpSocket) -> io::Result<()> {
        let mut bytes = [0; 4096];
        loop {
            let (n, from) = socket.recv_from(&mut bytes).await?;
            if let Some(answer) = self.answer(&bytes[..n], false) {
                // Who asked may be gone.
                let _ = socket.send_to(&answer, from).await;
            }
        }
    }

    /// Answers by TCP, for ever.
    pub(super) async fn serve_tcp(self: Arc<Zone>, listener: TcpListener) -> io::Result<()> {
        loop {
            let (stream, _) = listener.accept().await?;
            tokio::spawn(Arc::clone(&self).converse(stream));
        }
    }

    async fn converse(self: Arc<Zone>, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let length = stream.read_u16().await?;
            let mut bytes = vec![0; length.into()];
            stream.read_exact(&mut bytes).await?;
            if let Some(answer) = self.answer(&bytes, true) {
                let length = u16::try_from(answer.len()).map_err(io::Error::other)?;
                stream.write_u16(length).await?;
                stream.write_all(&answer).await?;
            }
        }
    }
}

/// What is known from the beginning.
fn names(place: &Place) -> Vec<(&'static str, Fact)> {
    let v4 = |n| IpAddr::V4(place.v4(n));
    let other = |n| IpAddr::V4(place.other4(n));
    let v6 = |n| IpAddr::V6(place.v6(n));
    let addresses = |list: &[&str]| Fact::Is(list.iter().map(|a| a.parse().unwrap()).collect());
    let private = ["10.0.0.1", "127.0.0.1", "169.254.169.254", "192.168.1.1", "172.16.0.1"];
    let loopback = vec![IpAddr::V4(Ipv4Addr::LOCALHOST)];
    let alias = |of: &str| Fact::Alias(of.to_owned());
    vec![
        ("allowed.test", Fact::Is(vec![v4(2), v6(2)])),
        ("*.allowed.test", Fact::Is(vec![v4(2), v6(2)])),
        ("git.test", Fact::Is(vec![v4(2), v6(2)])),
        // Another machine, for who looks at addresses alone.
        ("other.test", Fact::Is(vec![other(2), v6(3)])),
        // The same machine, for who looks at names alone.
        ("beside.test", Fact::Is(vec![v4(2), v6(2)])),
        ("v4only.test", Fact::Is(vec![v4(3)])),
        ("v6only.test", Fact::Is(vec![v6(3)])),
        ("many.test", Fact::Is((2..=6).flat_map(|n| [v4(n), other(n), v6(n)]).collect())),
        ("cname.test", alias("allowed.test")),
        ("chain.test", alias("cname.test")),
        ("away.test", alias("other.test")),
        ("loop.test", alias("loop.test")),
        // What leads inwards.
        ("rebind.test", addresses(&private)),
        ("mixed.test", Fact::Is(vec![v4(2), "10.0.0.1".parse().unwrap()])),
        ("inward.test", alias("rebind.test")),
        ("turns.test", Fact::Turns(vec![vec![v4(2)], loopback])),
        (
            "mapped.test",
            addresses(&["::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::1"]),
        ),
        ("unique.test", addresses(&["fd00::1", "fe80::1"])),
        ("host.test", Fact::Is(vec![v4(1), v6(1)])),
        // What is no answer, or a long one.
        ("text.test", Fact::Text(3000)),
        ("silent.test", Fact::Silence),
        ("failing.test", Fact::Failure),
    ]
}
