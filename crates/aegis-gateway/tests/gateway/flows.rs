//! Connections and datagrams: opened, passed on, ended.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;

use crate::support::{PATIENCE, World, echo, internet, read_all};

#[test]
fn bytes_go_both_ways_and_each_way_ends_by_itself() {
    let world = World::open();
    for at in ["203.0.113.5:7000", "[2001:db8::5]:7000"] {
        let listener = world.listen(at);
        let (mut inside, mut outside) = world.pair(&listener);
        inside.write_all(b"question").unwrap();
        inside.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_all(&mut outside).unwrap(), b"question");
        // The other way is open still.
        outside.write_all(b"answer").unwrap();
        drop(outside);
        assert_eq!(read_all(&mut inside).unwrap(), b"answer");

        let (mut inside, mut outside) = world.pair(&listener);
        outside.write_all(b"greeting").unwrap();
        outside.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_all(&mut inside).unwrap(), b"greeting");
        inside.write_all(b"thanks").unwrap();
        drop(inside);
        assert_eq!(read_all(&mut outside).unwrap(), b"thanks");
    }
    let counts = world.counts();
    assert_eq!((counts.flows, counts.denied), (4, 0));
    assert_eq!(counts.egress_bytes, 2 * (8 + 6));
    assert_eq!(counts.ingress_bytes, 2 * (6 + 8));
}

#[test]
fn much_arrives_whole() {
    const MUCH: usize = 64 << 20;
    let world = World::open();
    let listener = world.listen("203.0.113.5:7000");
    let (inside, outside) = world.pair(&listener);
    let pattern: Vec<u8> = (0..1 << 16).map(|n: u32| (n % 251) as u8).collect();
    std::thread::scope(|scope| {
        for (mut from, to) in [(&inside, &outside), (&outside, &inside)] {
            let pattern = &pattern;
            scope.spawn(move || {
                for _ in 0..MUCH / pattern.len() {
                    from.write_all(pattern).unwrap();
                }
                from.shutdown(Shutdown::Write).unwrap();
            });
            scope.spawn(move || {
                let mut to = to.try_clone().unwrap();
                let mut part = vec![0; pattern.len()];
                for _ in 0..MUCH / pattern.len() {
                    to.read_exact(&mut part).unwrap();
                    assert!(part == *pattern);
                }
                assert_eq!(to.read(&mut part).unwrap(), 0);
            });
        }
    });
    let counts = world.counts();
    assert_eq!((counts.egress_bytes, counts.ingress_bytes), (MUCH as u64, MUCH as u64));
}

#[test]
fn who_is_not_there_refuses() {
    let world = World::open();
    world.refused("203.0.113.5:7001");
    world.refused("[2001:db8::5]:7001");
    // Nobody has this address: the host's kernel says so after its own time.
    let error = world.connect("203.0.113.99:7001").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_reset_is_passed_on() {
    let world = World::open();
    let listener = world.listen("203.0.113.5:7000");
    let linger = |stream: &std::net::TcpStream| {
        rustix::net::sockopt::set_socket_linger(stream, Some(std::time::Duration::ZERO)).unwrap();
    };
    let (mut inside, outside) = world.pair(&listener);
    linger(&outside);
    drop(outside);
    assert_eq!(read_all(&mut inside).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let (inside, mut outside) = world.pair(&listener);
    linger(&inside);
    drop(inside);
    assert_eq!(read_all(&mut outside).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn datagrams_go_both_ways() {
    let world = World::open();
    for (at, from) in [("203.0.113.5:7000", "0.0.0.0:0"), ("[2001:db8::5]:7000", "[::]:0")] {
        let outside = world.outside.run(|| std::net::UdpSocket::bind(at).unwrap());
        let inside = world.guest.run(|| std::net::UdpSocket::bind(from).unwrap());
        for socket in [&inside, &outside] {
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
        }
        inside.connect(at).unwrap();
        let mut bytes = vec![0; 65_536];
        for size in [0, 1, 1400, 60_000] {
            inside.send(&vec![7; size]).unwrap();
            let (length, from) = outside.recv_from(&mut bytes).unwrap();
            assert_eq!(length, size);
            outside.send_to(&vec![8; size], from).unwrap();
            assert_eq!(inside.recv(&mut bytes).unwrap(), size);
        }
    }
    assert_eq!(world.counts().egress_bytes, 2 * (1 + 1400 + 60_000));
    // Nobody is there, and that is told.
    let socket = world.udp();
    socket.connect("203.0.113.5:7001").unwrap();
    socket.send(b"anybody").unwrap();
    assert_eq!(socket.recv(&mut [0; 9]).unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn the_gateway_echoes_for_itself_only() {
    let world = World::open();
    for here in ["172.16.0.1", "fd61:6567:6973::1", "172.16.0.3"] {
        let answer = echo(&world, here.parse().unwrap(), b"anybody there").unwrap();
        assert_eq!(answer, b"anybody there", "{here}");
    }
    // The answer to what is not answered can take the form of an error only once it is connected.
    assert_eq!(echo(&world, "203.0.113.5".parse().unwrap(), b"outside"), None);
    assert_eq!(world.counts().egress_bytes, 0);
}

#[test]
fn nat64_leads_to_ipv4() {
    let world = World::open();
    let listener = world.listen("203.0.113.5:7000");
    let mut inside = world.connect("[64:ff9b::203.0.113.5]:7000").unwrap();
    let (mut outside, _) = listener.accept().unwrap();
    outside.write_all(b"v4").unwrap();
    drop(outside);
    assert_eq!(read_all(&mut inside).unwrap(), b"v4");
    world.refused("[64:ff9b::10.1.2.3]:7000");
}

#[test]
fn another_link_begins_anew() {
    let mut world = World::open();
    let listener = world.listen("203.0.113.5:7000");
    let (mut inside, mut outside) = world.pair(&listener);
    inside.write_all(b"before").unwrap();
    outside.read_exact(&mut [0; 6]).unwrap();
    world.plug();
    assert!(read_all(&mut outside).is_err());
    // What the guest knew of is not known any more.
    inside.write_all(b"after").unwrap();
    assert_eq!(read_all(&mut inside).unwrap_err().kind(), ErrorKind::ConnectionReset);
    let (mut inside, mut outside) = world.pair(&listener);
    inside.write_all(b"again").unwrap();
    drop(inside);
    assert_eq!(read_all(&mut outside).unwrap(), b"again");
}

#[test]
fn a_cut_is_for_good() {
    let world = World::open();
    let listener = world.listen("203.0.113.5:7000");
    let (mut inside, mut outside) = world.pair(&listener);
    world.gateway.cut();
    assert_eq!(read_all(&mut inside).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(read_all(&mut outside).is_err());
    world.gateway.set_allowance(1 << 50, false);
    world.set_policy(internet(&[]));
    world.refused("203.0.113.5:7000");
}
