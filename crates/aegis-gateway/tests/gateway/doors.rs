//! Doors: the LLM's, the host's services, plain HTTP that the hatch looks into.

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::net::{UnixListener, UnixStream};

use aegis_gateway::{Policy, ViaHatch};
use aegis_wire::door::Knock;
use aegis_wire::egress::rule;
use hickory_proto::op::ResponseCode::{NXDomain, NoError};
use hickory_proto::rr::RecordType::{A, AAAA};

use crate::policy::hello;
use crate::support::names::{ask, serve};
use crate::support::{PATIENCE, World, internet, read_all};

fn doors(services: &[&str], llm: bool) -> Policy {
    let services = services.iter().map(|name| name.parse().unwrap()).collect();
    Policy { services, llm, ..Policy::default() }
}

/// Takes one knock; what it says, and the bytes behind it.
fn knocked(hatch: &UnixListener) -> (Knock, BufReader<UnixStream>) {
    let (stream, _) = hatch.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    (serde_json::from_str(&line).unwrap(), stream)
}

#[test]
fn doors_lead_to_the_hatch_and_are_not_metered() {
    let mut world = World::open();
    let hatch = UnixListener::bind(world.door()).unwrap();
    world.set_policy(doors(&["ollama", "git"], true));
    assert_eq!(ask(&world, "llm.aegis.", AAAA), (NoError, vec![]));
    assert_eq!(ask(&world, "git.aegis.", A), (NXDomain, vec![]));
    for (name, expected) in [
        ("llm.aegis", Knock::Llm),
        ("ollama.host.aegis", Knock::Service { name: "ollama".to_owned() }),
        ("git.host.aegis", Knock::Service { name: "git".to_owned() }),
    ] {
        let (code, records) = ask(&world, &format!("{name}."), A);
        assert_eq!((code, records.len()), (NoError, 1));
        let mut inside = world.connect(&format!("{}:80", records[0])).unwrap();
        inside.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        inside.shutdown(std::net::Shutdown::Write).unwrap();
        let (knock, mut stream) = knocked(&hatch);
        assert_eq!(knock, expected);
        let mut said = String::new();
        stream.read_to_string(&mut said).unwrap();
        assert_eq!(said, "GET / HTTP/1.1\r\n\r\n");
        stream.get_mut().write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
        drop(stream);
        assert_eq!(read_all(&mut inside).unwrap(), b"HTTP/1.1 200 OK\r\n\r\n");
        world.refused(&format!("{}:81", records[0]));
    }
    assert_eq!(world.counts().egress_bytes, 0);
    // A door that was closed is reset, also where it is used.
    let mut inside = world.connect("172.16.0.3:80").unwrap();
    world.set_policy(doors(&["git"], false));
    assert_eq!(read_all(&mut inside).unwrap_err().kind(), ErrorKind::ConnectionReset);
    world.refused("172.16.0.3:80");
    assert_eq!(world.denial().rule, rule::LLM);
    world.refused("172.16.1.1:80");
    assert_eq!(world.denial().rule, rule::SERVICE);
    assert_eq!(ask(&world, "ollama.host.aegis.", A).0, NXDomain);
}

#[test]
fn a_hatch_that_is_away_refuses() {
    let world = World::open();
    world.set_policy(doors(&[], true));
    world.refused("172.16.0.3:80");
    let elsewhere = world.directory.path().join("claimed.sock");
    let hatch = UnixListener::bind(&elsewhere).unwrap();
    world.gateway.set_door(elsewhere);
    let _inside = world.connect("172.16.0.3:80").unwrap();
    assert_eq!(knocked(&hatch).0, Knock::Llm);
}

#[test]
fn a_hatch_with_a_full_queue_is_waited_for() {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
    let world = World::open();
    world.set_policy(doors(&[], true));
    let hatch = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    bind(&hatch, &SocketAddrUnix::new(world.door()).unwrap()).unwrap();
    listen(&hatch, 0).unwrap();
    let hatch = UnixListener::from(hatch);
    std::thread::scope(|scope| {
        let connects: Vec<_> =
            (0..8).map(|_| scope.spawn(|| world.connect("172.16.0.3:80").unwrap())).collect();
        for _ in &connects {
            assert_eq!(knocked(&hatch).0, Knock::Llm);
        }
    });
}

#[test]
fn plain_http_to_hosts_with_secrets_goes_through_the_hatch() {
    let mut world = World::open();
    let hatch = UnixListener::bind(world.door()).unwrap();
    serve(
        &world,
        &[
            ("api.example", &["203.0.113.5"]),
            ("web.example", &["203.0.113.5"]),
            ("other.example", &["203.0.113.6"]),
        ],
    );
    let via_hatch = ViaHatch { http: vec!["api.example".to_owned()], ..ViaHatch::default() };
    world.gateway.set_policy(internet(&[]), via_hatch);
    for name in ["api.example.", "web.example.", "other.example."] {
        ask(&world, name, A);
    }
    let request = |host: &str| format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes();
    let mut inside = world.connect("203.0.113.5:80").unwrap();
    let sent = world.counts().egress_bytes;
    inside.write_all(&request("API.example")).unwrap();
    let (knock, mut stream) = knocked(&hatch);
    let to = "203.0.113.5:80".parse().unwrap();
    assert_eq!(knock, Knock::Http { to, host: "api.example".to_owned() });
    let mut said = vec![0; request("API.example").len()];
    stream.read_exact(&mut said).unwrap();
    assert_eq!(said, request("API.example"));
    // It goes outside, so it counts.
    assert_eq!(world.counts().egress_bytes - sent, said.len() as u64);
    // Another name of the same address is passed on as such; what never led there is refused.
    let mut inside = world.connect("203.0.113.5:80").unwrap();
    inside.write_all(&request("web.example")).unwrap();
    assert!(matches!(knocked(&hatch).0, Knock::Http { host, .. } if host == "web.example"));
    for bad in [request("other.example"), b"SSH-2.0-x\r\n".to_vec()] {
        let mut inside = world.connect("203.0.113.5:80").unwrap();
        inside.write_all(&bad).unwrap();
        assert_eq!(read_all(&mut inside).unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(world.denial().rule, rule::HOST);
    }
    // A host without secrets is reached as ever.
    let listener = world.listen("203.0.113.6:80");
    let mut inside = world.connect("203.0.113.6:80").unwrap();
    inside.write_all(&request("api.example")).unwrap();
    let (mut outside, _) = listener.accept().unwrap();
    outside.read_exact(&mut said).unwrap();
}

/// A world in which the TLS of `api.example` goes through the hatch; who listens at its address, where
/// others are too.
fn secret_at_443() -> (World, UnixListener, TcpListener) {
    let world = World::open();
    let hatch = UnixListener::bind(world.door()).unwrap();
    let at = &["203.0.113.5"];
    serve(&world, &[("api.example", at), ("web.example", at), ("key.example", &["203.0.113.6"])]);
    let https = vec!["api.example".to_owned(), "key.example".to_owned()];
    world.gateway.set_policy(internet(&[]), ViaHatch { http: vec![], https });
    ask(&world, "api.example.", A);
    ask(&world, "web.example.", A);
    let listener = world.listen("203.0.113.5:443");
    (world, hatch, listener)
}

#[test]
fn a_hello_for_a_host_with_secrets_goes_through_the_hatch() {
    let (world, hatch, listener) = secret_at_443();
    let sent = world.counts().egress_bytes;
    let mut inside = world.connect("203.0.113.5:443").unwrap();
    let said = hello(Some("API.example"));
    // In two pieces: nothing goes anywhere before the name is known.
    inside.write_all(&said[..20]).unwrap();
    let (mut outside, _) = listener.accept().unwrap();
    inside.write_all(&said[20..]).unwrap();
    let (knock, mut stream) = knocked(&hatch);
    let to = "203.0.113.5:443".parse().unwrap();
    assert_eq!(knock, Knock::Https { to, host: "api.example".to_owned() });
    let mut heard = vec![0; said.len()];
    stream.read_exact(&mut heard).unwrap();
    assert_eq!(heard, said);
    // Who was dialled hears of the connection, and nothing of what is said in it.
    let mut nothing = Vec::new();
    outside.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(outside.read_to_end(&mut nothing).unwrap(), 0);
    // What goes on from there counts, both ways.
    stream.get_mut().write_all(b"from the hatch").unwrap();
    let mut back = [0; 14];
    inside.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"from the hatch");
    assert_eq!(world.counts().egress_bytes - sent, said.len() as u64);
    drop(stream);
    assert_eq!(read_all(&mut inside).unwrap(), b"");
    // An allow-list that admits it by name does, too, and says no to others.
    let https = vec!["api.example".to_owned()];
    let by_name = ViaHatch { http: vec![], https };
    world.gateway.set_policy(internet(&[&["api.example:443"]]), by_name);
    let mut inside = world.connect("203.0.113.5:443").unwrap();
    inside.write_all(&said).unwrap();
    assert!(matches!(knocked(&hatch).0, Knock::Https { .. }));
    let mut inside = world.connect("203.0.113.5:443").unwrap();
    inside.write_all(&hello(Some("web.example"))).unwrap();
    assert_eq!(read_all(&mut inside).unwrap_err().kind(), ErrorKind::ConnectionReset);
    // Nobody there: as everywhere.
    drop(listener);
    world.refused("203.0.113.5:443");
}

#[test]
fn all_other_hellos_go_straight_on() {
    let (world, hatch, listener) = secret_at_443();
    hatch.set_nonblocking(true).unwrap();
    // Another name there, one that never led there, none, and what is no TLS.
    for said in [
        hello(Some("web.example")),
        hello(Some("key.example")),
        hello(None),
        b"SSH-2.0-x\r\n".to_vec(),
        b"GET / HTTP/1.1\r\nHost: api.example\r\n\r\n".to_vec(),
    ] {
        let mut inside = world.connect("203.0.113.5:443").unwrap();
        inside.write_all(&said).unwrap();
        let (mut outside, _) = listener.accept().unwrap();
        let mut heard = vec![0; said.len()];
        outside.set_read_timeout(Some(PATIENCE)).unwrap();
        outside.read_exact(&mut heard).unwrap();
        assert_eq!(heard, said);
        assert_eq!(hatch.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    }
    // An address that no name led to, and a port that is not TLS's.
    for to in ["203.0.113.6:443", "203.0.113.5:7000"] {
        let listener = world.listen(to);
        let mut inside = world.connect(to).unwrap();
        inside.write_all(&hello(Some("api.example"))).unwrap();
        let (mut outside, _) = listener.accept().unwrap();
        outside.set_read_timeout(Some(PATIENCE)).unwrap();
        outside.read_exact(&mut [0; 20]).unwrap();
        assert_eq!(hatch.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    }
}

#[test]
fn a_hello_waits_for_a_hatch_with_a_full_queue() {
    let (world, hatch, _listener) = secret_at_443();
    let hatch = rustix::fd::OwnedFd::from(hatch);
    rustix::net::listen(&hatch, 0).unwrap();
    let hatch = UnixListener::from(hatch);
    let mut inside: Vec<_> = (0..4)
        .map(|_| {
            let mut inside = world.connect("203.0.113.5:443").unwrap();
            inside.write_all(&hello(Some("api.example"))).unwrap();
            inside
        })
        .collect();
    for _ in &inside {
        assert!(matches!(knocked(&hatch).0, Knock::Https { .. }));
    }
    // One that is away refuses.
    drop(hatch);
    let mut late = world.connect("203.0.113.5:443").unwrap();
    late.write_all(&hello(Some("api.example"))).unwrap();
    assert_eq!(read_all(&mut late).unwrap_err().kind(), ErrorKind::ConnectionReset);
    inside.clear();
}
