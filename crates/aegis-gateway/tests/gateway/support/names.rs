//! A resolver outside with a table of answers, and a client that asks from inside.

use std::collections::HashMap;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::str::FromStr as _;
use std::sync::{Arc, Mutex};

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, Record, RecordType, rdata};

use super::{RESOLVER, World};

/// What the resolver outside was asked.
pub type Heard = Arc<Mutex<Vec<String>>>;

/// Starts a resolver that knows these names: each with what it leads to, an address or a name.
/// Names that begin with `big.` are only answered over TCP.
pub fn serve(world: &World, table: &[(&str, &[&str])]) -> Heard {
    let table: HashMap<String, Vec<String>> = table
        .iter()
        .map(|(name, to)| (format!("{name}."), to.iter().map(|t| (*t).to_owned()).collect()))
        .collect();
    let heard = Heard::default();
    let udp = world.outside.run(|| UdpSocket::bind(RESOLVER).unwrap());
    let tcp = world.outside.run(|| TcpListener::bind(RESOLVER).unwrap());
    let (tables, ears) = ((table.clone(), table), (heard.clone(), heard.clone()));
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        loop {
            let (length, from) = udp.recv_from(&mut bytes).unwrap();
            let answer = answer(&bytes[..length], &tables.0, &ears.0, true);
            udp.send_to(&answer, from).unwrap();
        }
    });
    std::thread::spawn(move || {
        for stream in tcp.incoming() {
            let mut stream = stream.unwrap();
            let mut length = [0; 2];
            stream.read_exact(&mut length).unwrap();
            let mut bytes = vec![0; usize::from(u16::from_be_bytes(length))];
            stream.read_exact(&mut bytes).unwrap();
            let answer = answer(&bytes, &tables.1, &ears.1, false);
            stream.write_all(&(answer.len() as u16).to_be_bytes()).unwrap();
            stream.write_all(&answer).unwrap();
        }
    });
    heard
}

fn answer(
    bytes: &[u8],
    table: &HashMap<String, Vec<String>>,
    heard: &Heard,
    datagram: bool,
) -> Vec<u8> {
    let question = Message::from_vec(bytes).unwrap();
    let query = question.queries[0].clone();
    let (name, kind) = (query.name().to_ascii().to_lowercase(), query.query_type());
    let way = if datagram { "udp" } else { "tcp" };
    heard.lock().unwrap().push(format!("{kind} {name} {way}"));
    let mut message = Message::response(question.metadata.id, OpCode::Query);
    message.add_query(query);
    if datagram && name.starts_with("big.") {
        message.metadata.truncation = true;
        return message.to_vec().unwrap();
    }
    match table.get(&name) {
        None => message.metadata.response_code = ResponseCode::NXDomain,
        Some(to) => {
            let mut owner = Name::from_str(&name).unwrap();
            for to in to {
                let data = match to.parse::<IpAddr>() {
                    Ok(IpAddr::V4(v4)) => RData::A(rdata::A(v4)),
                    Ok(IpAddr::V6(v6)) => RData::AAAA(rdata::AAAA(v6)),
                    Err(_) => RData::CNAME(rdata::CNAME(Name::from_str(to).unwrap())),
                };
                let record = Record::from_rdata(owner.clone(), 300, data.clone());
                if let RData::CNAME(target) = &data {
                    owner = target.0.clone();
                    message.add_answer(record);
                } else if record.record_type() == kind {
                    message.add_answer(record);
                }
            }
        }
    }
    message.to_vec().unwrap()
}

/// An answer as the guest has it: the code, and what its records say.
pub type Said = (ResponseCode, Vec<String>);

/// Asks the gateway from inside.
pub fn ask(world: &World, name: &str, kind: RecordType) -> Said {
    let socket = world.udp();
    socket.send_to(&question(name, kind), "172.16.0.1:53").unwrap();
    let mut bytes = [0; 4096];
    let (length, _) = socket.recv_from(&mut bytes).unwrap();
    said(&bytes[..length])
}

/// Asks the gateway from inside, over TCP.
pub fn ask_over_tcp(world: &World, name: &str, kind: RecordType) -> Said {
    let mut stream = world.connect("172.16.0.1:53").unwrap();
    let question = question(name, kind);
    stream.write_all(&(question.len() as u16).to_be_bytes()).unwrap();
    stream.write_all(&question).unwrap();
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut bytes = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut bytes).unwrap();
    said(&bytes)
}

pub fn question(name: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::new(0x1234, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message.to_vec().unwrap()
}

fn said(bytes: &[u8]) -> Said {
    let message = Message::from_vec(bytes).unwrap();
    assert_eq!(message.metadata.id, 0x1234);
    let records = message.answers.iter().map(|record| record.data.to_string()).collect();
    (message.metadata.response_code, records)
}
