//! What is let through, and what is refused, however it is spelt.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;

use aegis_gateway::Policy;
use aegis_wire::egress::rule;
use hickory_proto::rr::RecordType::A;

use crate::support::names::{ask, serve};
use crate::support::{World, internet, read_all};

/// A TLS hello with this name, or with none.
pub fn hello(name: Option<&str>) -> Vec<u8> {
    let mut extensions = vec![0, 23, 0, 0];
    if let Some(name) = name {
        let length = name.len() as u16;
        extensions.extend([0, 0]);
        extensions.extend((length + 5).to_be_bytes());
        extensions.extend((length + 3).to_be_bytes());
        extensions.push(0);
        extensions.extend(length.to_be_bytes());
        extensions.extend(name.as_bytes());
    }
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0x13, 0x01, 1, 0]);
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    let mut hello = vec![0x16, 3, 1];
    hello.extend((body.len() as u16 + 4).to_be_bytes());
    hello.extend([1, 0]);
    hello.extend((body.len() as u16).to_be_bytes());
    hello.extend(body);
    hello
}

fn request(host: &str) -> Vec<u8> {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes()
}

/// A world where `git.example` at port 7000 is allowed, with the connection that is let through.
fn named() -> (World, std::net::TcpListener) {
    let world = World::open();
    serve(&world, &[("git.example", &["203.0.113.5"]), ("other.example", &["203.0.113.5"])]);
    world.set_policy(internet(&[&["git.example:7000", "*.also.example"]]));
    let listener = world.listen("203.0.113.5:7000");
    (world, listener)
}

#[test]
fn the_never_reachable_are_refused_in_every_spelling() {
    let mut world = World::open();
    // Somebody listens everywhere.
    let _all = world.listen("[::]:7000");
    let _host = world.host.run(|| std::net::TcpListener::bind("[::]:7000").unwrap());
    let mut denied = 0;
    for to in [
        "10.1.2.3:7000",
        "169.254.169.254:7000",
        "203.0.113.1:7000",
        "[2001:db8::1]:7000",
        "[64:ff9b::169.254.169.254]:7000",
        "[64:ff9b::203.0.113.1]:7000",
        "[2002:a01:203::1]:7000",
        "172.16.5.5:7000",
        "198.18.0.9:7000",
    ] {
        world.refused(to);
        denied += 1;
        assert_eq!(world.counts().denied, denied, "{to}");
    }
    assert_eq!(world.counts().egress_bytes, 0);
    assert_eq!(world.denial().rule, rule::NEVER);
    world.connect("203.0.113.5:7000").unwrap();
    world.connect("198.51.100.7:7000").unwrap();
}

#[test]
fn a_closed_policy_lets_nothing_through() {
    let mut world = World::open();
    let _listener = world.listen("203.0.113.5:7000");
    world.set_policy(Policy::default());
    world.refused("203.0.113.5:7000");
    let denied = world.denial();
    assert_eq!((denied.rule, denied.requested.as_str()), (rule::INTERNET, "203.0.113.5:7000"));
    world.set_policy(internet(&[&[]]));
    world.refused("203.0.113.5:7000");
    assert_eq!(world.denial().rule, rule::ALLOW);
    let socket = world.udp();
    socket.connect("203.0.113.5:7000").unwrap();
    socket.send(b"anybody").unwrap();
    assert_eq!(socket.recv(&mut [0; 9]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn addresses_and_ports_are_let_through_by_lists() {
    let world = World::open();
    let _all = [
        world.listen("203.0.113.5:7000"),
        world.listen("203.0.113.6:7000"),
        world.listen("203.0.113.5:7001"),
        world.listen("[2001:db8::5]:7000"),
    ];
    world.set_policy(internet(&[&["203.0.113.4/31:7000", "[2001:db8::/64]:7000"]]));
    world.connect("203.0.113.5:7000").unwrap();
    world.connect("[2001:db8::5]:7000").unwrap();
    world.connect("[64:ff9b::203.0.113.5]:7000").unwrap();
    world.refused("203.0.113.6:7000");
    world.refused("203.0.113.5:7001");
}

#[test]
fn an_address_is_let_through_by_its_name() {
    let (mut world, listener) = named();
    // Not asked yet: an address alone is nobody's.
    world.refused("203.0.113.5:7000");
    assert_eq!(world.denial().rule, rule::ALLOW);
    ask(&world, "git.example.", A);
    let (mut inside, mut outside) = world.pair(&listener);
    // A protocol that says no name; the server speaks first.
    outside.write_all(b"SSH-2.0-Server\r\n").unwrap();
    inside.read_exact(&mut [0; 16]).unwrap();
    inside.write_all(b"SSH-2.0-Client\r\n").unwrap();
    drop(inside);
    assert_eq!(read_all(&mut outside).unwrap(), b"SSH-2.0-Client\r\n");
    let _elsewhere = world.listen("203.0.113.5:7001");
    world.refused("203.0.113.5:7001");
}

/// Says something on a connection that was let through by name; what the other side heard of it.
fn say(world: &World, listener: &std::net::TcpListener, said: &[u8]) -> Result<Vec<u8>, ErrorKind> {
    let (mut inside, outside): (TcpStream, _) = world.pair(listener);
    for part in said.chunks(40) {
        // In parts, as a network may cut it; a reset may come in between.
        if inside.write_all(part).is_err() {
            break;
        }
    }
    let _ = inside.shutdown(std::net::Shutdown::Write);
    let mut outside = outside;
    let heard = read_all(&mut outside).map_err(|e| e.kind());
    drop(outside);
    read_all(&mut inside).map_err(|e| e.kind())?;
    heard
}

#[test]
fn names_that_are_said_must_be_allowed_too() {
    let (mut world, listener) = named();
    ask(&world, "git.example.", A);
    for good in [
        hello(Some("git.example")),
        hello(Some("Other.also.example")),
        request("GIT.example:7000"),
        b"not http at all\r\n".to_vec(),
    ] {
        assert_eq!(say(&world, &listener, &good).unwrap(), good);
    }
    let absolute = b"GET http://evil.test/ HTTP/1.1\r\nHost: git.example\r\n\r\n".to_vec();
    // The same news a second time would be told later.
    for (bad, by, told) in [
        (hello(Some("evil.test")), rule::SNI, true),
        (hello(None), rule::SNI, true),
        (hello(Some("203.0.113.5")), rule::SNI, false),
        (hello(Some("other.example")), rule::SNI, true),
        (request("evil.test"), rule::HOST, true),
        (request("203.0.113.5"), rule::HOST, true),
        (request("0x7f.1"), rule::HOST, false),
        (absolute, rule::HOST, false),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), rule::HOST, false),
    ] {
        let before = world.counts();
        let heard = say(&world, &listener, &bad);
        assert_eq!(heard, Err(ErrorKind::ConnectionReset), "{}", String::from_utf8_lossy(&bad));
        let after = world.counts();
        assert_eq!(after.denied, before.denied + 1);
        assert_eq!(after.egress_bytes, before.egress_bytes, "nothing of it went out");
        if told {
            assert_eq!(world.denial().rule, by);
        }
    }
}

#[test]
fn a_narrower_policy_ends_what_it_does_not_allow() {
    let world = World::open();
    serve(&world, &[("git.example", &["203.0.113.5"])]);
    ask(&world, "git.example.", A);
    let (kept, ended) = (world.listen("203.0.113.5:7000"), world.listen("203.0.113.6:7000"));
    world.set_policy(internet(&[&["git.example", "203.0.113.6"]]));
    let (mut inside_kept, mut outside_kept) = world.pair(&kept);
    let (mut inside_ended, mut outside_ended) = world.pair(&ended);
    let datagrams = world.udp();
    let receiver = world.outside.run(|| std::net::UdpSocket::bind("203.0.113.6:7000").unwrap());
    datagrams.connect("203.0.113.6:7000").unwrap();
    datagrams.send(b"before").unwrap();
    receiver.recv(&mut [0; 9]).unwrap();
    world.set_policy(internet(&[&["*.example"]]));
    assert_eq!(read_all(&mut inside_ended).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(read_all(&mut outside_ended).is_err());
    datagrams.send(b"after").unwrap();
    assert_eq!(datagrams.recv(&mut [0; 9]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    inside_kept.write_all(b"still here").unwrap();
    drop(inside_kept);
    assert_eq!(read_all(&mut outside_kept).unwrap(), b"still here");
}

#[test]
fn quic_hides_its_name_and_is_refused_where_names_count() {
    let mut world = World::open();
    serve(&world, &[("web.example", &["203.0.113.5"])]);
    world.set_policy(internet(&[&["web.example"]]));
    ask(&world, "web.example.", A);
    let socket = world.udp();
    socket.connect("203.0.113.5:443").unwrap();
    socket.send(b"initial").unwrap();
    assert_eq!(socket.recv(&mut [0; 9]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert_eq!(world.denial().rule, rule::SNI);
}
