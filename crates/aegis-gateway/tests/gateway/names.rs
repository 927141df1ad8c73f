//! Names: asked, refused, answered.

use aegis_gateway::Policy;
use aegis_wire::egress::rule;
use hickory_proto::op::ResponseCode::{NXDomain, NoError, ServFail};
use hickory_proto::rr::RecordType::{A, AAAA, CNAME, HTTPS, PTR};

use crate::support::names::{Said, ask, ask_over_tcp, serve};
use crate::support::{World, internet, read_all};

fn yes(records: &[&str]) -> Said {
    (NoError, records.iter().map(|r| (*r).to_owned()).collect())
}

fn no() -> Said {
    (NXDomain, Vec::new())
}

#[test]
fn names_are_asked_over_udp_and_tcp() {
    let world = World::open();
    let heard = serve(
        &world,
        &[
            ("web.example", &["203.0.113.5", "2001:db8::5"]),
            ("alias.example", &["web.example.", "203.0.113.5"]),
            ("big.example", &["203.0.113.5"]),
        ],
    );
    for ask in [ask, ask_over_tcp] {
        assert_eq!(ask(&world, "web.example.", A), yes(&["203.0.113.5"]));
        assert_eq!(ask(&world, "WEB.example.", AAAA), yes(&["2001:db8::5"]));
        assert_eq!(ask(&world, "alias.example.", A), yes(&["web.example.", "203.0.113.5"]));
        assert_eq!(ask(&world, "alias.example.", CNAME), yes(&["web.example."]));
        assert_eq!(ask(&world, "nobody.example.", A), no());
        // It did not fit a datagram outside.
        assert_eq!(ask(&world, "big.example.", A), yes(&["203.0.113.5"]));
        // Records that would lead past the checks are not asked for.
        assert_eq!(ask(&world, "web.example.", HTTPS), yes(&[]));
    }
    let heard = heard.lock().unwrap().clone();
    assert!(heard.contains(&"A big.example. tcp".to_owned()), "{heard:?}");
    assert!(!heard.iter().any(|question| question.contains("HTTPS")), "{heard:?}");
    assert_eq!(world.counts().dns_queries, 14);
}

#[test]
fn questions_count_as_egress() {
    let world = World::open();
    serve(&world, &[("web.example", &["203.0.113.5"])]);
    ask(&world, "web.example.", A);
    // Header, name, kind and class; and what says how large an answer may be.
    assert_eq!(world.counts().egress_bytes, 12 + 13 + 4 + 11);
}

#[test]
fn names_that_no_list_admits_do_not_exist() {
    let mut world = World::open();
    let heard = serve(&world, &[("a.example", &["203.0.113.5"]), ("b.example", &["203.0.113.5"])]);
    world.set_policy(internet(&[&["*.example"], &["a.example", "c.example"]]));
    assert_eq!(ask(&world, "a.example.", A), yes(&["203.0.113.5"]));
    for ask in [ask, ask_over_tcp] {
        assert_eq!(ask(&world, "B.example.", A), no());
    }
    let denied = world.denial();
    assert_eq!((denied.rule, denied.requested.as_str()), (rule::ALLOW, "b.example"));
    assert_eq!(ask(&world, "secret-data.evil.test.", A), no());
    assert_eq!(world.denial().requested, "secret-data.evil.test");
    // Networks admit no names.
    world.set_policy(internet(&[&["203.0.113.0/24"]]));
    assert_eq!(ask(&world, "a.example.", A), no());
    world.set_policy(Policy::default());
    assert_eq!(ask(&world, "a.example.", A), no());
    assert_eq!(world.denial().rule, rule::ALLOW);
    assert_eq!(world.denial().rule, rule::INTERNET);
    // Nothing of it was asked outside.
    assert_eq!(*heard.lock().unwrap(), ["A a.example. udp"]);
    assert_eq!(world.counts().denied, 5);
}

#[test]
fn answers_never_lead_inside() {
    let mut world = World::open();
    serve(
        &world,
        &[
            (
                "evil.example",
                &["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "::ffff:10.1.2.3"],
            ),
            ("own.example", &["203.0.113.1"]),
            ("alias.example", &["inner.example.", "192.168.0.1"]),
            ("mixed.example", &["10.1.2.3", "203.0.113.5", "2001:db8::5", "fd00::1"]),
        ],
    );
    for name in ["evil.example", "own.example", "alias.example"] {
        assert_eq!(ask(&world, &format!("{name}."), A), no(), "{name}");
        let denied = world.denial();
        assert_eq!((denied.rule, denied.requested.as_str()), (rule::REBINDING, name));
    }
    assert_eq!(ask(&world, "evil.example.", AAAA), no());
    assert_eq!(ask(&world, "mixed.example.", A), yes(&["203.0.113.5"]));
    assert_eq!(ask(&world, "mixed.example.", AAAA), yes(&["2001:db8::5"]));
    // How the host's network names its own.
    assert_eq!(ask(&world, "3.2.1.10.in-addr.arpa.", PTR), no());
}

#[test]
fn a_name_with_ipv6_only_is_reached_over_ipv4() {
    let world = World::open();
    serve(&world, &[("six.example", &["2001:db8::5"]), ("inner.example", &["fd00::1"])]);
    world.set_policy(internet(&[&["six.example"]]));
    let (code, records) = ask(&world, "six.example.", A);
    assert_eq!(code, NoError);
    let listener = world.listen("[2001:db8::5]:7000");
    let mut inside = world.connect(&format!("{}:7000", records[0])).unwrap();
    drop(listener.accept().unwrap());
    assert_eq!(read_all(&mut inside).unwrap(), b"");
    // Addresses that stand for nothing lead nowhere.
    world.refused("198.18.9.9:7000");
}

#[test]
fn a_resolver_that_is_silent_fails_in_time() {
    let budgets =
        aegis_gateway::Budgets { dns: std::time::Duration::from_millis(200), ..Default::default() };
    let world = World::new(budgets);
    world.gateway.set_allowance(1 << 20, false);
    world.set_policy(internet(&[]));
    assert_eq!(ask(&world, "web.example.", A).0, ServFail);
    // Somebody is there who says nothing.
    let silent = world.outside.run(|| std::net::UdpSocket::bind("203.0.113.53:53").unwrap());
    assert_eq!(ask(&world, "web.example.", A).0, ServFail);
    let mut bytes = [0; 512];
    let ids: Vec<[u8; 2]> = (0..2)
        .map(|_| {
            silent.recv(&mut bytes).unwrap();
            [bytes[0], bytes[1]]
        })
        .collect();
    assert_ne!(ids[0], ids[1], "each try has its own number");
    assert_ne!(ids[0], [0x12, 0x34], "never the guest's");
    // Another one knows.
    serve_at(&world);
    world.gateway.set_resolvers(vec!["203.0.113.6:53".parse().unwrap()]);
    assert_eq!(ask(&world, "web.example.", A), yes(&["203.0.113.5"]));
}

/// A second resolver, elsewhere.
fn serve_at(world: &World) {
    let udp = world.outside.run(|| std::net::UdpSocket::bind("203.0.113.6:53").unwrap());
    std::thread::spawn(move || {
        let mut bytes = [0; 512];
        let (length, from) = udp.recv_from(&mut bytes).unwrap();
        let mut message = hickory_proto::op::Message::from_vec(&bytes[..length]).unwrap();
        let name = message.queries[0].name().clone();
        message.metadata.message_type = hickory_proto::op::MessageType::Response;
        let a = hickory_proto::rr::rdata::A("203.0.113.5".parse().unwrap());
        let data = hickory_proto::rr::RData::A(a);
        message.add_answer(hickory_proto::rr::Record::from_rdata(name, 60, data));
        // Lies first: another number, then another question.
        let honest = message.to_vec().unwrap();
        let mut lie = honest.clone();
        lie[0] ^= 1;
        udp.send_to(&lie, from).unwrap();
        udp.send_to(&honest, from).unwrap();
    });
}
