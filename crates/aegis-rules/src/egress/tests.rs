use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proptest::prelude::*;

use super::*;

fn list(texts: &[&str]) -> AllowList {
    let texts: Vec<String> = texts.iter().map(|t| (*t).to_owned()).collect();
    AllowList::parse(&texts, "egressAllow").unwrap()
}

fn open(lists: &[&[&str]]) -> Policy {
    Policy {
        internet: true,
        lists: lists.iter().map(|texts| list(texts)).collect(),
        ..Policy::default()
    }
}

fn name(text: &str) -> HostName {
    text.parse().unwrap()
}

fn to(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn rule_of<T: std::fmt::Debug>(result: Result<T, Denied>) -> &'static str {
    result.unwrap_err().rule
}

#[test]
fn entries_have_one_spelling() {
    for (given, kept) in [
        ("Example.COM", "example.com"),
        (" *.Example.com ", "*.example.com"),
        ("example.com:443", "example.com:443"),
        ("_srv.xn--bcher-kva.example", "_srv.xn--bcher-kva.example"),
        ("203.0.113.0/24", "203.0.113.0/24"),
        ("203.0.113.5", "203.0.113.5"),
        ("203.0.113.5/32", "203.0.113.5"),
        ("203.0.113.5:22", "203.0.113.5:22"),
        ("203.0.113.0/24:443", "203.0.113.0/24:443"),
        ("0.0.0.0/0", "0.0.0.0/0"),
        ("2001:DB8::/32", "2001:db8::/32"),
        ("2001:db8::1", "2001:db8::1"),
        ("[2001:db8::1]", "2001:db8::1"),
        ("[2001:db8::1]:443", "[2001:db8::1]:443"),
        ("[2001:db8::/32]:443", "[2001:db8::/32]:443"),
        ("*", "*"),
        ("*:443", "*:443"),
    ] {
        let parsed = list(&[given]);
        assert_eq!(parsed.texts(), [kept], "{given}");
        assert_eq!(AllowList::try_from(parsed.texts()).unwrap(), parsed);
    }
    assert_eq!(list(&["a.example", "A.example", "a.example:1"]).texts().len(), 2);
}

#[test]
fn what_is_no_entry_is_refused_with_its_field() {
    for bad in [
        "",
        " ",
        ".",
        "example.com.",
        "*.",
        "**.example.com",
        "a*.example.com",
        "*.*.example.com",
        "example.com:",
        "example.com:0",
        "example.com:65536",
        "example.com:+1",
        "example.com:01",
        "http://example.com",
        "example.com/path",
        "user@example.com",
        "bücher.example",
        "a b.c",
        "a..b",
        "203.0.113.5/24",
        "203.0.113.0/33",
        "203.0.113.0/+8",
        "203.0.113.0/024",
        "203.0.113",
        "1",
        "0x7f.1",
        "0x7f000001",
        "2130706433",
        "0177.0.0.1",
        "*.1",
        "a.0x1",
        "[203.0.113.5]",
        "[203.0.113.5]:1",
        "[2001:db8::1",
        "[2001:db8::1]443",
        "2001:db8::/32:443",
        "::ffff:203.0.113.5",
        "64:ff9b::203.0.113.5",
        "::ffff:203.0.113.0/120",
        "fe80::1%eth0",
    ] {
        let refusal = AllowList::parse(&["*".to_owned(), bad.to_owned()], "the field").unwrap_err();
        assert_eq!(refusal.field.as_deref(), Some("the field"), "{bad}");
    }
    let many: Vec<String> = (0..=ENTRIES_MAX).map(|n| format!("h{n}.example")).collect();
    assert!(AllowList::parse(&many, "f").is_err());
    assert!(AllowList::parse(&many[1..], "f").unwrap().with(&list(&["h1.example"])).is_ok());
    assert!(AllowList::parse(&many[1..], "f").unwrap().with(&list(&["h0.example"])).is_err());
}

#[test]
fn addresses_in_any_spelling_are_no_names() {
    for literal in [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f.1",
        "0x7f000001",
        "0177.0.0.1",
        "0x7f.0.0.0x1",
        "1.2.3.4.",
        "0X7F.1",
        "[::1]",
        "::1",
        "foo.0x",
        "foo.1",
        "",
        ".",
        "a..b",
        "a b",
    ] {
        assert!(literal.parse::<HostName>().is_err(), "{literal}");
    }
    assert_eq!(name("WWW.Example.COM.").as_str(), "www.example.com");
    assert!("x".repeat(64).parse::<HostName>().is_err());
    assert!(format!("{}e", "x.".repeat(126)).parse::<HostName>().is_ok());
    assert!(format!("{}e", "x.".repeat(127)).parse::<HostName>().is_err());
}

#[test]
fn names_match_as_written() {
    let l = list(&["example.com", "*.below.example:443"]);
    for (text, port, expected) in [
        ("example.com", 80, true),
        ("www.example.com", 80, false),
        ("notexample.com", 80, false),
        ("below.example", 443, false),
        ("a.below.example", 443, true),
        ("a.b.below.example", 443, true),
        ("a.below.example", 80, false),
        ("abelow.example", 443, false),
    ] {
        assert_eq!(l.admits_name_at(&name(text), port), expected, "{text}:{port}");
    }
    assert!(l.admits_name(&name("a.below.example")));
}

#[test]
fn a_closed_policy_answers_nothing() {
    for policy in [Policy::default(), Policy { internet: false, ..open(&[&["*"]]) }] {
        assert_eq!(rule_of(policy.ask(&name("example.com"))), rule::INTERNET);
        assert_eq!(rule_of(policy.connect(to("203.0.113.5:80"), [], &[])), rule::INTERNET);
        assert_eq!(rule_of(policy.service("ollama")), rule::SERVICE);
    }
    let empty = open(&[&[]]);
    assert_eq!(rule_of(empty.ask(&name("example.com"))), rule::ALLOW);
    assert_eq!(rule_of(empty.connect(to("203.0.113.5:80"), [], &[])), rule::ALLOW);
}

#[test]
fn connections_pass_by_address_or_by_name() {
    let n = name("git.example");
    let net = open(&[&["203.0.113.0/24:443"]]);
    assert_eq!(net.connect(to("203.0.113.9:443"), [], &[]), Ok(Admitted::ByAddress));
    assert_eq!(net.connect(to("[64:ff9b::203.0.113.9]:443"), [], &[]), Ok(Admitted::ByAddress));
    assert_eq!(rule_of(net.connect(to("203.0.113.9:80"), [&n], &[])), rule::ALLOW);
    assert_eq!(rule_of(net.ask(&n)), rule::ALLOW);

    let named = open(&[&["git.example:22", "*.example:443"]]);
    assert_eq!(named.connect(to("203.0.113.9:22"), [&n], &[]), Ok(Admitted::ByName));
    assert_eq!(rule_of(named.connect(to("203.0.113.9:22"), [], &[])), rule::ALLOW);
    assert_eq!(rule_of(named.connect(to("203.0.113.9:80"), [&n], &[])), rule::ALLOW);
    assert_eq!(named.spoken(to("203.0.113.9:443"), Some(&name("b.example")), rule::SNI), Ok(()));
    let elsewhere = name("evil.test");
    assert_eq!(
        rule_of(named.spoken(to("203.0.113.9:443"), Some(&elsewhere), rule::SNI)),
        rule::SNI
    );
    assert_eq!(rule_of(named.spoken(to("203.0.113.9:443"), None, rule::HOST)), rule::HOST);

    // One by address, the other by name; and two names that have nothing in common.
    let mixed = open(&[&["203.0.113.0/24"], &["git.example"]]);
    assert_eq!(mixed.connect(to("203.0.113.9:22"), [&n], &[]), Ok(Admitted::ByName));
    let apart = open(&[&["a.example"], &["b.example"]]);
    let both = [name("a.example"), name("b.example")];
    assert_eq!(rule_of(apart.connect(to("203.0.113.9:22"), &both, &[])), rule::ALLOW);
}

#[test]
fn the_never_reachable_are_never_reached() {
    let own = ["203.0.113.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
    let all = open(&[&["*", "0.0.0.0/0", "::/0"]]);
    for bad in [
        "0.0.0.0",
        "0.255.255.255",
        "10.1.2.3",
        "100.64.0.1",
        "100.127.255.255",
        "127.0.0.1",
        "127.255.0.1",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.8",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.19.255.255",
        "224.0.0.1",
        "239.1.1.1",
        "240.0.0.1",
        "255.255.255.255",
        "203.0.113.1",
    ] {
        let v4: Ipv4Addr = bad.parse().unwrap();
        let turned = Ipv4Addr::from(!u32::from(v4));
        let [a, b, c, d] = v4.octets();
        for spelling in [
            bad.to_owned(),
            format!("::ffff:{bad}"),
            format!("::{bad}"),
            format!("::ffff:0:{bad}"),
            format!("64:ff9b::{bad}"),
            format!("64:ff9b:1::{bad}"),
            format!(
                "2002:{:x}:{:x}::1",
                u16::from(a) << 8 | u16::from(b),
                u16::from(c) << 8 | u16::from(d)
            ),
            format!(
                "2001:0:{:x}:{:x}::{}",
                u16::from(a) << 8 | u16::from(b),
                u16::from(c) << 8 | u16::from(d),
                "1"
            ),
            format!("2001:0:cb00:7105::{turned}"),
        ] {
            let ip: IpAddr = spelling.parse().unwrap();
            let result = all.connect(SocketAddr::new(ip, 443), [], &own);
            assert_eq!(rule_of(result), rule::NEVER, "{spelling}");
        }
    }
    for bad in [
        "::",
        "::1",
        "fc00::1",
        "fd61:6567:6973::1",
        "fe80::1",
        "fec0::1",
        "ff02::1",
        "100::1",
        "4000::1",
        "2001:db8::1",
    ] {
        let ip: IpAddr = bad.parse().unwrap();
        assert_eq!(rule_of(all.connect(SocketAddr::new(ip, 443), [], &own)), rule::NEVER, "{bad}");
    }
    for good in [
        "203.0.113.5",
        "192.0.2.1",
        "198.51.100.7",
        "1.1.1.1",
        "2001:db8::5",
        "2606:4700::1",
        "::ffff:203.0.113.5",
        "64:ff9b::203.0.113.5",
        "2002:cb00:7105::1",
        "100.128.0.1",
        "172.32.0.1",
        "198.20.0.1",
    ] {
        let ip: IpAddr = good.parse().unwrap();
        assert_eq!(
            all.connect(SocketAddr::new(ip, 443), [], &own),
            Ok(Admitted::ByAddress),
            "{good}"
        );
    }
}

fn texts() -> impl Strategy<Value = Vec<String>> {
    let entry = prop_oneof![
        Just("*".to_owned()),
        Just("*:443".to_owned()),
        "(\\*\\.)?[ab]{1,2}(\\.[ab]){0,2}(:443|:80)?",
        (0u32..8, 24u8..=32, prop::option::of(Just(443))).prop_map(|(low, prefix, port)| {
            let net =
                ipnet::Ipv4Net::new(Ipv4Addr::from(0xcb00_7100 | low), prefix).unwrap().trunc();
            match port {
                Some(port) => format!("{net}:{port}"),
                None => net.to_string(),
            }
        }),
        Just("2001:db8::/64".to_owned()),
        Just("0.0.0.0/0".to_owned()),
        Just("::/0".to_owned()),
    ];
    prop::collection::vec(entry, 0..4)
}

fn lists() -> impl Strategy<Value = Vec<AllowList>> {
    prop::collection::vec(texts(), 0..3)
        .prop_map(|lists| lists.iter().map(|l| AllowList::parse(l, "f").unwrap()).collect())
}

fn target() -> impl Strategy<Value = SocketAddr> {
    let ip = prop_oneof![
        (0u32..16).prop_map(|low| IpAddr::V4(Ipv4Addr::from(0xcb00_7100 | low))),
        (0u16..4).prop_map(|low| IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, low, 0, 0, 0, 1))),
        any::<u32>().prop_map(|any| IpAddr::V4(any.into())),
        any::<u128>().prop_map(|any| IpAddr::V6(any.into())),
    ];
    (ip, prop_oneof![Just(80u16), Just(443)]).prop_map(|(ip, port)| SocketAddr::new(ip, port))
}

fn host() -> impl Strategy<Value = HostName> {
    "[ab]{1,2}(\\.[ab]){0,3}".prop_map(|text| text.parse().unwrap())
}

proptest! {
    /// What a narrower policy lets through, the wider one does; also what is said on it.
    #[test]
    fn no_list_that_is_added_widens(
        lists in lists(), more in texts(), to in target(), names in prop::collection::vec(host(), 0..3),
        said in host(), internet: bool,
    ) {
        let wide = Policy { internet, lists, ..Policy::default() };
        let mut narrow = wide.clone();
        narrow.lists.push(AllowList::parse(&more, "f").unwrap());
        if narrow.ask(&said).is_ok() {
            prop_assert!(wide.ask(&said).is_ok());
        }
        match (narrow.connect(to, &names, &[]), wide.connect(to, &names, &[])) {
            (Ok(_), Err(denied)) => prop_assert!(false, "{denied}"),
            // By address alone there would be more freedom in the narrower one.
            (Ok(Admitted::ByAddress), Ok(wide)) => prop_assert_eq!(wide, Admitted::ByAddress),
            _ => {}
        }
        if narrow.spoken(to, Some(&said), rule::SNI).is_ok() {
            prop_assert!(wide.spoken(to, Some(&said), rule::SNI).is_ok());
        }
    }

    /// No list admits what is never reachable.
    #[test]
    fn nothing_admits_the_never_reachable(
        lists in lists(), to in target(), names in prop::collection::vec(host(), 0..3), own: bool,
    ) {
        let policy = Policy { internet: true, lists, ..Policy::default() };
        let own = if own { vec![plain(to.ip())] } else { vec![] };
        if never(to.ip(), &own).is_some() {
            prop_assert_eq!(rule_of(policy.connect(to, &names, &own)), rule::NEVER);
        }
    }

    /// A union admits what one of its parts does, and no more.
    #[test]
    fn a_union_admits_what_either_does(a in texts(), b in texts(), to in target(), said in host()) {
        let (a, b) = (AllowList::parse(&a, "f").unwrap(), AllowList::parse(&b, "f").unwrap());
        let both = a.with(&b).unwrap();
        prop_assert_eq!(both.admits_address(to), a.admits_address(to) || b.admits_address(to));
        prop_assert_eq!(both.admits_name(&said), a.admits_name(&said) || b.admits_name(&said));
        let at = |l: &AllowList| l.admits_name_at(&said, to.port());
        prop_assert_eq!(at(&both), at(&a) || at(&b));
        prop_assert_eq!(AllowList::try_from(both.texts()).unwrap(), both);
    }

    /// Hostile texts are refused or understood, and what is understood is stable.
    #[test]
    fn any_text_is_parsed_or_refused(text in "[a-z0-9.*:/\\[\\] -]{0,24}|\\PC{0,16}") {
        if let Ok(list) = AllowList::parse(&[text], "f") {
            prop_assert_eq!(AllowList::try_from(list.texts()).unwrap(), list);
        }
    }
}
