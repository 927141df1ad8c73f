//! DNS messages: questions as they are taken, answers as they are given. Nothing from outside is
//! passed on as it came; an answer is built anew of the records that answer the question.

use std::net::{IpAddr, Ipv4Addr};

use aegis_wire::egress::HostName;
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, RData, Record, RecordType, rdata};

/// What a guest may ask over UDP without saying more (RFC 1035, 4.2.1), bytes.
const PLAIN_MAX: usize = 512;
/// The largest answer over UDP, whatever a guest says, bytes.
const DATAGRAM_MAX: usize = 32 * 1024;
/// What we take from a resolver over UDP, bytes (the DNS flag day's measure).
const FORWARD_MAX: u16 = 1232;
/// Names that one answer may lead through.
const CHAIN_MAX: usize = 16;
/// Records that one answer has.
const RECORDS_MAX: usize = 128;
/// The longest that an answer holds, seconds.
const TTL_MAX: u32 = 3600;
/// How long what the gateway itself says holds, seconds.
const TTL_OWN: u32 = 60;

/// A question that can be answered.
#[derive(Clone, Debug)]
pub(super) struct Question {
    id: u16,
    query: Query,
    recursion_desired: bool,
    /// What the guest takes in a datagram, if it said so.
    payload: Option<u16>,
    /// The name, if it is one that can be in a list.
    pub host: Option<HostName>,
}

/// An answer on its way to the guest.
#[derive(Debug, Default)]
pub(super) struct Answer {
    code: ResponseCode,
    records: Vec<Record>,
    authority: Vec<Record>,
}

/// What a resolver said.
#[derive(Debug)]
pub(super) struct Outcome {
    pub answer: Answer,
    /// Addresses in it, with the seconds that they hold.
    pub addresses: Vec<(IpAddr, u32)>,
    /// There were addresses, and none that may be given.
    pub rebinding: bool,
    /// It says nothing about the question but that its name has nothing of that kind.
    pub nothing: bool,
}

/// Parses a question; the bytes of an answer if it is none that can be asked, or nothing if
/// whatever it is has no answer.
pub(super) fn parse(bytes: &[u8]) -> Result<Question, Option<Vec<u8>>> {
    let id = bytes.first_chunk().map(|id| u16::from_be_bytes(*id)).ok_or(None)?;
    let error = |code| Message::error_msg(id, OpCode::Query, code).to_vec().ok();
    // An answer to an answer could go on for ever.
    if bytes.get(2).is_none_or(|flags| flags & 0x80 != 0) {
        return Err(None);
    }
    let mut message = Message::from_vec(bytes).map_err(|_| error(ResponseCode::FormErr))?;
    if message.metadata.op_code != OpCode::Query {
        return Err(error(ResponseCode::NotImp));
    }
    let (Some(query), true) = (message.queries.pop(), message.queries.is_empty()) else {
        return Err(error(ResponseCode::FormErr));
    };
    if query.query_class() != DNSClass::IN {
        return Err(error(ResponseCode::Refused));
    }
    Ok(Question {
        id,
        host: query.name().to_ascii().parse().ok(),
        query,
        recursion_desired: message.metadata.recursion_desired,
        payload: message.edns.as_ref().map(Edns::max_payload),
    })
}

impl Question {
    /// Whether records of this kind are given at all. What else there is carries addresses or keys
    /// past the checks (HTTPS, SVCB), or nothing that a machine needs.
    pub fn is_served(&self) -> bool {
        matches!(
            self.query.query_type(),
            RecordType::A
                | RecordType::AAAA
                | RecordType::CNAME
                | RecordType::MX
                | RecordType::TXT
                | RecordType::SRV
                | RecordType::NS
                | RecordType::SOA
                | RecordType::PTR
        )
    }

    pub fn is_v4(&self) -> bool {
        self.query.query_type() == RecordType::A
    }

    /// The address that a reverse question is about.
    pub fn reverse(&self) -> Option<IpAddr> {
        self.query.name().parse_arpa_name().ok().map(|net| net.addr())
    }

    /// The same question about IPv6 addresses.
    pub fn for_v6(&self) -> Question {
        let mut other = self.clone();
        other.query.set_query_type(RecordType::AAAA);
        other
    }

    /// The question as a resolver is asked.
    pub fn forward(&self, id: u16) -> Option<Vec<u8>> {
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        message.add_query(self.query.clone());
        let mut edns = Edns::new();
        edns.set_max_payload(FORWARD_MAX);
        message.set_edns(edns);
        message.to_vec().ok()
    }

    /// What a resolver said, if it is said to this question; `Err` if it did not fit a datagram.
    pub fn hear(&self, id: u16, bytes: &[u8]) -> Option<Result<Message, Truncated>> {
        let message = Message::from_vec(bytes).ok()?;
        let meta = &message.metadata;
        let [query] = &message.queries[..] else { return None };
        let mine = meta.id == id
            && meta.message_type == MessageType::Response
            && query.name().eq_ignore_root(self.query.name())
            && query.query_type() == self.query.query_type()
            && query.query_class() == DNSClass::IN;
        if !mine {
            return None;
        }
        Some(if meta.truncation { Err(Truncated) } else { Ok(message) })
    }

    /// Takes from what a resolver said what answers this question and may be given.
    pub fn clean(&self, message: Message, is_never: impl Fn(IpAddr) -> bool) -> Outcome {
        let kind = self.query.query_type();
        let mut name = self.query.name().clone();
        let mut records: Vec<Record> = Vec::new();
        let mut addresses = Vec::new();
        let mut dropped = false;
        for _ in 0..CHAIN_MAX {
            let here = |record: &&Record| {
                record.dns_class == DNSClass::IN && record.name.eq_ignore_root(&name)
            };
            let mut found = false;
            for record in message.answers.iter().filter(here) {
                if record.record_type() != kind || records.len() >= RECORDS_MAX {
                    continue;
                }
                found = true;
                let mut record = record.clone();
                record.ttl = record.ttl.min(TTL_MAX);
                if let Some(address) = address_of(&record.data) {
                    if is_never(address) {
                        dropped = true;
                        continue;
                    }
                    addresses.push((address, record.ttl));
                }
                records.push(record);
            }
            let alias = message.answers.iter().filter(here).find_map(|record| match &record.data {
                RData::CNAME(target) => Some((record.clone(), target.0.clone())),
                _ => None,
            });
            match alias {
                Some((mut record, target)) if !found && records.len() < RECORDS_MAX => {
                    record.ttl = record.ttl.min(TTL_MAX);
                    records.push(record);
                    name = target;
                }
                _ => break,
            }
        }
        let rebinding = dropped && addresses.is_empty();
        let code = match message.metadata.response_code {
            _ if rebinding => ResponseCode::NXDomain,
            code @ (ResponseCode::NoError | ResponseCode::NXDomain) => code,
            ResponseCode::Refused => ResponseCode::Refused,
            _ => ResponseCode::ServFail,
        };
        if code != ResponseCode::NoError {
            records.clear();
            addresses.clear();
        }
        let nothing = code == ResponseCode::NoError
            && !records.iter().any(|record| record.record_type() == kind);
        // How long nothing holds is said there (RFC 2308).
        let authority = message
            .authorities
            .into_iter()
            .filter(|record| (records.is_empty() || nothing) && !rebinding && is_soa(record))
            .take(1)
            .collect();
        let answer = Answer { code, records, authority };
        Outcome { answer, addresses, rebinding, nothing }
    }

    /// The bytes of an answer; in a datagram as far as they fit.
    pub fn answer(&self, answer: Answer, datagram: bool) -> Option<Vec<u8>> {
        let mut message = Message::response(self.id, OpCode::Query);
        message.metadata.recursion_desired = self.recursion_desired;
        message.metadata.recursion_available = true;
        message.metadata.response_code = answer.code;
        message.add_query(self.query.clone());
        message.insert_answers(answer.records);
        message.insert_authorities(answer.authority);
        if self.payload.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(FORWARD_MAX);
            message.set_edns(edns);
        }
        let bytes = message.to_vec().ok()?;
        let most = usize::from(self.payload.unwrap_or(0)).clamp(PLAIN_MAX, DATAGRAM_MAX);
        if !datagram || bytes.len() <= most {
            return Some(bytes);
        }
        message.answers.clear();
        message.authorities.clear();
        message.metadata.truncation = true;
        message.to_vec().ok()
    }

    /// An IPv4 address that the gateway itself knows.
    pub fn own_address(&self, address: Ipv4Addr) -> Answer {
        let data = RData::A(rdata::A(address));
        let record = Record::from_rdata(self.query.name().clone(), TTL_OWN, data);
        Answer { records: vec![record], ..Answer::default() }
    }
}

/// An answer that has to be asked for over TCP.
#[derive(Debug)]
pub(super) struct Truncated;

impl Answer {
    /// No such name.
    pub fn no_name() -> Answer {
        Answer { code: ResponseCode::NXDomain, ..Answer::default() }
    }

    /// The name has nothing of that kind.
    pub fn nothing() -> Answer {
        Answer::default()
    }

    /// Nobody who knows could be asked.
    pub fn failure() -> Answer {
        Answer { code: ResponseCode::ServFail, ..Answer::default() }
    }

    /// It is not asked.
    pub fn refused() -> Answer {
        Answer { code: ResponseCode::Refused, ..Answer::default() }
    }
}

fn address_of(data: &RData) -> Option<IpAddr> {
    match data {
        RData::A(a) => Some(IpAddr::V4(a.0)),
        RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
        _ => None,
    }
}

fn is_soa(record: &Record) -> bool {
    record.record_type() == RecordType::SOA && record.dns_class == DNSClass::IN
}

#[cfg(test)]
mod tests;
