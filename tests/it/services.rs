//! Host services and placeholders, through the hatches of real machines (contracts/couch.md 6).

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aegis_tests::house::House;
use aegis_wire::door::Knock;
use serde_json::json;

use super::tree;

const SECRET: &str = "hush-52ab9d10-service";

/// A service of the host: it notes the heads that it gets, says `hello`, and speaks something else
/// than HTTP where it is asked to.
struct Service {
    address: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Service {
    fn start() -> Service {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let heads = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&heads);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let noted = Arc::clone(&noted);
                std::thread::spawn(move || converse(stream, &noted));
            }
        });
        Service { address, heads }
    }

    /// The head of the last request.
    fn head(&self) -> String {
        self.heads.lock().unwrap().pop().expect("a request came")
    }
}

fn converse(stream: TcpStream, heads: &Mutex<Vec<String>>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap());
    let mut stream = stream;
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if lines.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        heads.lock().unwrap().push(head.clone());
        if head.starts_with("GET /speak") {
            let switch =
                "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n";
            stream.write_all(switch.as_bytes()).unwrap();
            let mut byte = [0];
            while lines.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
            return;
        }
        let length = head.lines().find_map(|l| {
            let (name, value) = l.split_once(':')?;
            name.eq_ignore_ascii_case("content-length")
                .then(|| value.trim().parse::<u64>().unwrap())
        });
        std::io::copy(&mut (&mut lines).take(length.unwrap_or(0)), &mut std::io::sink()).unwrap();
        let answer =
            "HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: keep-alive\r\n\r\n\"hello\"";
        stream.write_all(answer.as_bytes()).unwrap();
    }
}

fn service(name: &str) -> Knock {
    Knock::Service { name: name.to_owned() }
}

fn settings(services: &[(&str, &Service)]) -> String {
    let sections = services
        .iter()
        .map(|(name, of)| format!("[host_services.{name}]\naddr = \"{}\"\n", of.address));
    sections.collect::<String>() + "[rate_limit]\nper_second = 0\n"
}

#[test]
fn a_guest_reaches_what_its_invite_names_and_nothing_else() {
    let (web, other) = (Service::start(), Service::start());
    let house = House::new(&settings(&[("web", &web), ("other", &other)]));
    let secret = json!({"value": SECRET, "proxy": true, "hosts": ["web.host.aegis"]});
    house.socket().put("/v1/secrets/KEY", &secret).expect(200);
    let limits = json!({"maxCpuCores": 1, "maxMemoryMB": 256, "maxDiskGB": 0.3});
    let guest = house.guest(json!({
        "resourceLimits": limits, "hostServices": ["web", "gone"],
        "permissions": {"canAccessHostServices": true},
    }));
    let guest = tree::text(&guest, "guestId").to_owned();
    let machine = tree::text(&house.until(&guest, "running"), "vmId").to_owned();
    let web_door = house.knock(&machine, &service("web"));

    assert_eq!(web_door.get("/path?x=1").expect(200), "hello");
    let head = web.head();
    assert!(head.starts_with("GET /path?x=1 HTTP/1.1\r\n"), "{head}");
    let host = format!("\r\nhost: {}\r\n", web.address);
    assert!(head.to_lowercase().contains(&host), "{head}");
    let client = web_door.with("connection".parse().unwrap(), "x-mine");
    let client = client.with("x-mine".parse().unwrap(), "1").with("x-theirs".parse().unwrap(), "2");
    client.post("/", &json!({"a": 1})).expect(200);
    let head = web.head();
    assert!(head.contains("x-theirs: 2") && !head.contains("x-mine"), "{head}");

    // What the invite does not name, or the host does not have, is not there.
    for name in ["other", "gone", "never", "web.host.aegis", "../web"] {
        let refused = house.knock(&machine, &service(name)).get("/").refused(403, "");
        assert_eq!(
            (&refused["rule"], &refused["allowed"]),
            (&json!("host_services"), &json!("web"))
        );
    }
    assert!(other.heads.lock().unwrap().is_empty());
    // Nor does the hatch lead into the host by an address.
    for to in ["127.0.0.1:80", "[::1]:80", "169.254.169.254:80", "[::ffff:10.0.0.1]:80"] {
        let knock = Knock::Http { to: to.parse().unwrap(), host: "api.example.com".to_owned() };
        let refused = house.knock(&machine, &knock).get("/").refused(403, "");
        assert_eq!(refused["rule"], "never_reachable", "{to}");
    }
    let knock =
        Knock::Http { to: "203.0.113.5:80".parse().unwrap(), host: "api.example.com".to_owned() };
    let client = house.knock(&machine, &knock).with("host".parse().unwrap(), "evil.example");
    assert_eq!(client.get("/").refused(403, "")["rule"], "http_host");

    // Something else than HTTP goes through, both ways, until the machine is served no more.
    let mut stream = UnixStream::connect(house.hatch(&machine)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let ask = "GET /speak HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n";
    write!(stream, "{{\"door\":\"service\",\"name\":\"web\"}}\n{ask}").unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap());
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        assert_ne!(lines.read_line(&mut head).unwrap(), 0, "{head}");
    }
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    assert!(web.head().to_lowercase().contains("upgrade: echo"));
    stream.write_all(b"\0ping\n").unwrap();
    let mut back = [0; 6];
    lines.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"\0ping\n");
    house.socket().act(&format!("/couch/guests/{guest}/freeze")).expect(200);
    assert_eq!(lines.read(&mut back).unwrap_or(0), 0, "a frozen machine's connections end");
}

#[test]
fn knocks_that_are_none_are_not_opened() {
    let web = Service::start();
    let house = House::new(&settings(&[("web", &web)]));
    let refused = json!({"command": ["true"], "host_services": ["gone"]});
    house.socket().post("/v1/instances", &refused).refused(400, "host_services");
    let mut body = tree::small(json!({
        "host_services": ["web"], "vcpus": 1, "memory_mb": 256,
        "envelope": {"vcpus": 4, "memory_mb": 1024, "disk_gb": 2},
    }));
    body["capabilities"] = tree::rights(2);
    let root = house.socket().post("/v1/instances", &body).expect(201);
    let root = tree::text(&root, "id").to_owned();
    house.until_instance(&root, "running");
    let long = format!("{{\"door\":\"service\",\"name\":\"{}\"}}\n", "x".repeat(2_000));
    for bad in
        ["\n", "GET / HTTP/1.1\r\n\r\n", "{\"door\":\"shell\"}\n", "{\"door\":\"llm\"\n", &long]
    {
        let mut stream = UnixStream::connect(house.hatch(&root)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // The other side may be gone already.
        let _ = stream.write_all(bad.as_bytes());
        assert_eq!(stream.read(&mut [0; 64]).unwrap_or(0), 0, "{bad}");
    }
    // Who holds all connections keeps nobody else from their own.
    let held: Vec<UnixStream> =
        (0..100).map(|_| UnixStream::connect(house.hatch(&root)).unwrap()).collect();

    // A child has its parent's services, or fewer; never more.
    let child = |more: serde_json::Value| {
        let ask = tree::small(more);
        tree::curl(&house, &root, &format!("-X POST {}/v1/instances -d '{ask}'", tree::API))
    };
    tree::denied(
        &child(json!({"host_services": ["other"]})),
        403,
        "capability_denied",
        "host_services",
    );
    let (status, same) = child(json!({}));
    assert_eq!(status, 201, "{same}");
    let (status, fewer) = child(json!({"host_services": []}));
    assert_eq!(status, 201, "{fewer}");
    for (child, expected) in [(&same, 200), (&fewer, 403)] {
        let id = tree::text(child, "id");
        house.until_instance(id, "running");
        assert_eq!(house.knock(id, &service("web")).get("/").status, expected);
    }
    drop(held);
    house.knock(&root, &service("web")).get("/").expect(200);
}

#[test]
fn a_placeholder_stands_for_its_secret_at_its_hosts_only() {
    let (web, other) = (Service::start(), Service::start());
    let house = House::new(&settings(&[("web", &web), ("other", &other)]));
    let secret = json!({"value": SECRET, "proxy": true, "hosts": ["web.host.aegis"]});
    house.socket().put("/v1/secrets/KEY", &secret).expect(200);
    let machine = |secrets: serde_json::Value| {
        let body = tree::small(json!({"host_services": ["web", "other"], "secrets": secrets}));
        let made = house.socket().post("/v1/instances", &body).expect(201);
        let id = tree::text(&made, "id").to_owned();
        house.until_instance(&id, "running");
        id
    };
    let own = machine(json!(["KEY"]));
    let placeholder = house.sh(&own, "printf %s $KEY").text();
    let ask = |machine: &str, name: &str, header: &str, value: &str| {
        house.knock(machine, &service(name)).with(header.parse().unwrap(), value).get("/")
    };
    ask(&own, "web", "authorization", &format!("Bearer {placeholder}")).expect(200);
    assert!(web.head().contains(&format!("authorization: Bearer {SECRET}\r\n")));
    ask(&own, "web", "x-key", &format!("a {placeholder} b")).expect(200);
    assert!(web.head().contains(&format!("x-key: a {SECRET} b\r\n")));
    let refused = ask(&own, "other", "x-key", &placeholder).refused(403, "");
    assert_eq!(
        (&refused["rule"], &refused["allowed"]),
        (&json!("secret_hosts"), &json!("web.host.aegis"))
    );
    assert!(other.heads.lock().unwrap().is_empty());
    // Elsewhere it is a text like any other, and one that was taken away is too.
    let stranger = machine(json!([]));
    ask(&stranger, "web", "x-key", &placeholder).expect(200);
    assert!(web.head().contains(&placeholder));
    house
        .socket()
        .put(&format!("/v1/instances/{own}/secrets"), &json!({"secrets": []}))
        .expect(200);
    ask(&own, "web", "x-key", &placeholder).expect(200);
    assert!(!web.head().contains(SECRET));
    assert!(!house.log().contains(SECRET));
}
