//! The tests' own outside, and the image of machines that call there: what other tests believe of
//! them is shown here.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use aegis_tests::house::House;
use aegis_tests::outside::{self, Fact, Outside};
use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use serde_json::{Value, json};

/// What curl says of an address that it takes for this name.
fn curl(outside: &Outside, url: &str, words: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new("curl");
    command.args(["-sS", "-m", "20", "--noproxy", "*", "--cacert"]).arg(outside.authority());
    for port in outside::HTTP.into_iter().chain(outside::HTTPS) {
        for name in ["allowed.test", "other.test"] {
            command.args(["--resolve", &format!("{name}:{port}:{}", outside.v4())]);
        }
    }
    let done = command.args(words).arg(url).output().unwrap();
    (done.status.code(), String::from_utf8_lossy(&done.stdout).into_owned())
}

/// Asks the name server.
fn ask(outside: &Outside, name: &str, kind: RecordType, tcp: bool) -> Message {
    let mut message = Message::query();
    message.add_query(Query::query(Name::from_ascii(format!("{name}.")).unwrap(), kind));
    let bytes = message.to_vec().unwrap();
    let mut answer = vec![0; 65_536];
    let n = if tcp {
        let mut stream = TcpStream::connect(outside.resolver()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(&u16::try_from(bytes.len()).unwrap().to_be_bytes()).unwrap();
        stream.write_all(&bytes).unwrap();
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let n = usize::from(u16::from_be_bytes(length));
        stream.read_exact(&mut answer[..n]).unwrap();
        n
    } else {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.connect(outside.resolver()).unwrap();
        socket.send(&bytes).unwrap();
        socket.recv(&mut answer).unwrap()
    };
    let answer = Message::from_vec(&answer[..n]).unwrap();
    assert_eq!(answer.metadata.id, message.metadata.id);
    answer
}

fn addresses(message: &Message) -> Vec<IpAddr> {
    let address = |data: &RData| match data {
        RData::A(a) => Some(IpAddr::V4(a.0)),
        RData::AAAA(a) => Some(IpAddr::V6(a.0)),
        _ => None,
    };
    message.answers.iter().filter_map(|record| address(&record.data)).collect()
}

#[test]
fn the_web_is_there_with_and_without_tls() {
    let outside = Outside::new();
    for (url, says) in [
        ("http://allowed.test/", "outside, as allowed.test\n"),
        ("https://allowed.test/", "outside, as allowed.test\n"),
        ("https://other.test:8443/", "outside, as other.test:8443\n"),
        ("http://allowed.test:8080/status/418", "418\n"),
    ] {
        assert_eq!(curl(&outside, url, &[]), (Some(0), says.to_owned()), "{url}");
    }
    for address in [IpAddr::V4(outside.other()), IpAddr::V6(outside.v6())] {
        let url = format!("https://{}/", SocketAddr::from((address, 443)));
        assert_eq!(curl(&outside, &url, &[]).0, Some(0), "{url}");
    }
    // A name that its certificate is not for is no good to anybody.
    let to = format!("wrong.test:443:{}", outside.v4());
    assert_eq!(curl(&outside, "https://wrong.test/", &["--resolve", &to]).0, Some(60));
    let requests = outside.requests();
    let seen: Vec<_> = requests.iter().map(|r| (r.port, r.sni.as_deref())).collect();
    let none: Option<&str> = Some("");
    let expected = [
        (80, None),
        (443, Some("allowed.test")),
        (8443, Some("other.test")),
        (8080, None),
        (443, none),
        (443, none),
    ];
    assert_eq!(seen, expected);
    assert_eq!(requests[3].path, "/status/418");
    assert_eq!(requests[0].host.as_deref(), Some("allowed.test"));
}

#[test]
fn redirects_lead_wherever_one_says() {
    let outside = Outside::new();
    for to in ["http://127.0.0.1:1/x?y=z", "http://169.254.169.254/latest", "http://[::1]/"] {
        let url = format!("http://allowed.test/redirect?{to}");
        let said = curl(&outside, &url, &["-g", "-o", "/dev/null", "-w", "%{redirect_url}"]);
        assert_eq!(said, (Some(0), to.to_owned()));
    }
    let headers = curl(&outside, "http://allowed.test/headers", &["-H", "X-Some: thing"]).1;
    let headers: Vec<(String, String)> = serde_json::from_str(&headers).unwrap();
    assert!(headers.contains(&("x-some".to_owned(), "thing".to_owned())), "{headers:?}");
}

#[test]
fn what_comes_in_is_counted_to_the_byte() {
    const MOST: u64 = 3_000_001;
    let outside = Outside::new();
    let mut stream = TcpStream::connect(outside.at(outside::SINK)).unwrap();
    for piece in vec![b'y'; MOST as usize].chunks(70_000) {
        stream.write_all(piece).unwrap();
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    assert_eq!(said, format!("{MOST}\n"));
    assert_eq!(outside.received_at(outside::SINK), MOST);

    let socket = UdpSocket::bind("[::]:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    for (n, address) in [IpAddr::V4(outside.other()), outside.v6().into()].into_iter().enumerate() {
        let address = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().into(),
            v6 @ IpAddr::V6(_) => v6,
        };
        socket.send_to(&vec![7; 1000 + n], (address, outside::ECHO)).unwrap();
        let mut answer = [0; 2000];
        let (length, from) = socket.recv_from(&mut answer).unwrap();
        // It is the one that was asked who answers.
        assert_eq!((length, from.ip()), (1000 + n, address));
    }
    assert_eq!(outside.received_at(outside::ECHO), 2001);
    assert_eq!(outside.received(), MOST + 2001);

    let mut echo = TcpStream::connect(outside.at(outside::ECHO)).unwrap();
    echo.write_all(b"there and back").unwrap();
    let mut back = [0; 14];
    echo.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"there and back");
    let mut source = TcpStream::connect(outside.at(outside::SOURCE)).unwrap();
    source.read_exact(&mut vec![0; 1_000_000]).unwrap();
    assert_eq!(outside.connections_at(outside::SOURCE), 1);

    // Of HTTP all counts, TLS and headers too; a large body is nearly all of it.
    let file = outside.files().join("large");
    std::fs::write(&file, vec![b'z'; 1_000_000]).unwrap();
    let data = format!("@{}", file.display());
    for (url, port) in [("http://allowed.test/upload", 80), ("https://allowed.test/upload", 443)] {
        let said = curl(&outside, url, &["--data-binary", &data, "-H", "Expect:"]);
        let body: Value = serde_json::from_str(&said.1).unwrap();
        assert_eq!(body, json!({"bytes": 1_000_000}));
        let counted = outside.received_at(port);
        assert!((1_000_000..1_010_000).contains(&counted), "{port}: {counted}");
    }
    let words = ["-o", "/dev/null", "-w", "%{size_download}"];
    let said = curl(&outside, "http://allowed.test:8080/bytes/5000000", &words);
    assert_eq!(said, (Some(0), "5000000".to_owned()));
}

#[test]
fn names_are_answered_as_they_are_said() {
    let outside = Outside::new();
    let (v4, other, v6) = (outside.v4().into(), outside.other().into(), IpAddr::V6(outside.v6()));
    let a = |name: &str| addresses(&ask(&outside, name, RecordType::A, false));
    let aaaa = |name: &str| addresses(&ask(&outside, name, RecordType::AAAA, false));
    assert_eq!((a("allowed.test"), aaaa("ALLOWED.test")), (vec![v4], vec![v6]));
    assert_eq!((a("deep.down.allowed.test"), a("other.test")), (vec![v4], vec![other]));
    assert_eq!((a("v6only.test").len(), aaaa("v6only.test").len()), (0, 1));
    assert_eq!((a("many.test").len(), aaaa("many.test").len()), (10, 5));
    assert_eq!((a("chain.test"), a("loop.test")), (vec![v4], vec![]));
    assert!(a("rebind.test").contains(&"169.254.169.254".parse().unwrap()));
    assert!(aaaa("mapped.test").contains(&"::ffff:127.0.0.1".parse().unwrap()));
    assert_eq!(a("turns.test"), [v4]);
    for _ in 0..2 {
        assert_eq!(a("turns.test"), ["127.0.0.1".parse::<IpAddr>().unwrap()]);
    }
    for (name, code) in [
        ("unknown.test", ResponseCode::NXDomain),
        ("failing.test", ResponseCode::ServFail),
        ("allowed.test", ResponseCode::NoError),
    ] {
        let said = ask(&outside, name, RecordType::MX, false).metadata.response_code;
        assert_eq!(said, code, "{name}");
    }
    // What is too long for a datagram is cut, and whole by TCP.
    let cut = ask(&outside, "text.test", RecordType::TXT, false);
    assert!(cut.metadata.truncation && cut.answers.is_empty());
    let whole = ask(&outside, "text.test", RecordType::TXT, true);
    assert!(!whole.metadata.truncation && whole.to_vec().unwrap().len() > 3000);
    assert_eq!(addresses(&ask(&outside, "allowed.test", RecordType::A, true)), [v4]);
    outside.name("new.test", Fact::Is(vec![other]));
    assert_eq!(a("new.test"), [other]);
    let questions = outside.questions();
    assert!(questions.iter().any(|q| q.name == "text.test" && q.kind == "TXT" && q.tcp));
    assert!(questions.iter().any(|q| q.name == "allowed.test" && q.kind == "AAAA" && !q.tcp));
    // No question is payload.
    assert_eq!(outside.received(), 0);
}

#[test]
fn repositories_are_cloned_and_pushed_to() {
    let outside = Outside::new();
    let (path, commit) = outside.repository();
    let work = outside.files().join("clone");
    let git = |words: &[&str]| {
        let done = Command::new("git")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_SSL_CAINFO", outside.authority())
            .args(["-c", "http.proxy=", "-c", "user.name=x", "-c", "user.email=x@test"])
            .args(words)
            .output()
            .unwrap();
        let (out, err) =
            (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert!(done.status.success(), "{words:?}: {out}{err}");
        out.trim().to_owned()
    };
    let work = work.to_str().unwrap();
    git(&["clone", "-q", &format!("https://{}{path}", outside.at(443)), work]);
    assert_eq!(git(&["-C", work, "rev-parse", "HEAD"]), commit);
    git(&["-C", work, "commit", "-q", "--allow-empty", "-m", "second"]);
    git(&["-C", work, "push", "-q", &format!("http://{}{path}", outside.at(80)), "main"]);
    let bare = outside.repository_directory();
    let head = git(&["-C", bare.to_str().unwrap(), "rev-parse", "main"]);
    assert_eq!(head, git(&["-C", work, "rev-parse", "HEAD"]));
    assert_ne!(head, commit);
}

#[test]
fn several_are_there_at_once_and_nothing_stays() {
    let link_of = |outside: &Outside| {
        let host = outside.host().to_string();
        let done = Command::new("ip").args(["-o", "-4", "addr"]).output().unwrap();
        let text = String::from_utf8(done.stdout).unwrap();
        let line = text.lines().find(|line| line.contains(&format!(" {host}/")));
        line.map(|line| line.split_whitespace().nth(1).unwrap().to_owned())
    };
    let (one, two) = (Outside::new(), Outside::new());
    assert!(one.v4() != two.v4() && one.v6() != two.v6() && one.other() != two.other());
    assert_eq!(curl(&one, "http://allowed.test/", &[]).0, Some(0));
    assert_eq!(curl(&two, "http://allowed.test/", &[]).0, Some(0));
    assert_eq!((one.requests().len(), two.requests().len()), (1, 1));
    let link = link_of(&one).unwrap();
    let there = || std::path::Path::new("/sys/class/net").join(&link).exists();
    assert!(there());
    // It hears itself at the host's end too.
    let inside = two.within(|| UdpSocket::bind((two.v4(), 0)).unwrap());
    let host = UdpSocket::bind((two.host(), 0)).unwrap();
    host.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    inside.send_to(b"inwards", host.local_addr().unwrap()).unwrap();
    let mut heard = [0; 16];
    assert_eq!(host.recv_from(&mut heard).unwrap(), (7, inside.local_addr().unwrap()));
    drop(one);
    assert!(!there());
    assert_eq!(curl(&two, "http://allowed.test/", &[]).0, Some(0));
}

#[test]
fn the_clients_image_has_what_calls_outside() {
    let house = House::new("");
    let body = json!({
        "handle": "caller", "command": ["sleep", "infinity"], "image_ref": "clients",
        "memory_mb": 256, "disk_gb": 0.3,
    });
    house.socket().post("/v1/instances", &body).expect(201);
    house.until_instance("caller", "running");
    for client in [
        "curl --version",
        "git --version",
        "git ls-remote --get-url https://allowed.test/",
        "python3 -m pip --version",
        "python3 -c 'import ssl, socket, asyncio'",
        "dig -v",
        "openssl version",
        "ip -V",
        "command -v nc",
        "test -s /etc/ssl/certs/ca-certificates.crt",
    ] {
        let ran = house.sh("caller", client);
        assert_eq!(ran.code, Some(0), "{client}: {}", String::from_utf8_lossy(&ran.err));
    }
}
