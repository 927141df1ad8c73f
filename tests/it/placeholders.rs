//! Placeholders inside of TLS: real clients inside, which trust their machine's own authority, and
//! real servers outside (contracts/couch.md 6).

use std::time::Duration;

use aegis_tests::house::House;
use aegis_tests::outside::{Fact, Outside};
use aegis_tests::wait_until;
use aegis_wire::door::Knock;
use serde_json::{Value, json};

use super::tree;

const SECRET: &str = "hush-c41e77d0-inside-of-tls";

/// A house that trusts the outside's authority as others trust the world's.
fn house(outside: &Outside, settings: &str) -> House {
    let settings = format!(
        "{settings}[rate_limit]\nper_second = 0\n[egress]\nresolvers = [\"{}\"]\n",
        outside.resolver()
    );
    let authority = outside.authority();
    House::with_env(&settings, &[("SSL_CERT_FILE", authority.to_str().unwrap())])
}

/// A machine with this secret; what it sends at first is as it was set.
fn machine(house: &House, hosts: &[&str]) -> String {
    let secret = json!({"value": SECRET, "proxy": true, "hosts": hosts});
    house.socket().put("/v1/secrets/API_KEY", &secret).expect(200);
    start(house, json!(["API_KEY"]))
}

fn start(house: &House, secrets: Value) -> String {
    let body = json!({
        "command": ["sleep", "infinity"], "vcpus": 1, "memory_mb": 256, "disk_gb": 0.3,
        "secrets": secrets,
    });
    let made = house.socket().post("/v1/instances", &body).expect(201);
    let id = tree::text(&made, "id").to_owned();
    house.until_instance(&id, "running");
    id
}

/// What a client inside gets that does not trust who is there: curl's code for that.
#[track_caller]
fn untrusted(house: &House, machine: &str, curl: &str) {
    let ran = house.sh(machine, &format!("curl -sS -o /dev/null {curl} 2>&1"));
    assert_eq!(ran.code, Some(60), "{curl}: {ran:?}");
}

/// The server name and a header of the last request that came in.
fn came(outside: &Outside, header: &str) -> (Option<String>, Option<String>) {
    let last = outside.requests().pop().expect("a request came in");
    let value = last.headers.into_iter().find(|(name, _)| name == header).map(|(_, value)| value);
    (last.sni, value)
}

/// Asks for what is no HTTP any more; says what came back of five bytes.
const SWITCH: &str = r#"
import os, socket, ssl
to = socket.create_connection(("allowed.test", 443), 20)
tls = ssl.create_default_context().wrap_socket(to, server_hostname="allowed.test")
key = os.environ["API_KEY"]
tls.sendall(f"GET /speak HTTP/1.1\r\nHost: allowed.test\r\nX-Key: {key}\r\n"
            "Connection: Upgrade\r\nUpgrade: echo\r\n\r\n".encode())
head = b""
while not head.endswith(b"\r\n\r\n"):
    head += tls.recv(1)
assert head.startswith(b"HTTP/1.1 101"), head
tls.sendall(b"\0ping")
got = b""
while len(got) < 5:
    got += tls.recv(5)
print(got)
"#;

#[test]
fn a_placeholder_works_inside_of_tls_at_its_hosts_only() {
    let outside = Outside::new();
    outside.name("wrong.test", Fact::Is(vec![outside.v4().into()]));
    let mut house = house(
        &outside,
        "[secrets]\ntls_ca = true\n[idle]\npause_after_secs = 1\nsuspend_after_secs = 1\n",
    );
    let vm = machine(&house, &["allowed.test", "wrong.test", "web.host.aegis"]);
    let ca = std::fs::read_to_string(outside.authority()).unwrap();
    house.ok(&vm, &format!("cat > /root/ca.pem <<'END'\n{ca}END"));
    let placeholder = house.ok(&vm, "printf %s $API_KEY");
    assert!(placeholder.starts_with("aegis-secret-API_KEY-"));

    // By programs with different TLS of their own, as they are.
    let (path, commit) = outside.repository();
    let python = "import os, urllib.request as u; \
                  k = {'Authorization': 'Bearer ' + os.environ['API_KEY']}; \
                  print(u.urlopen(u.Request('https://allowed.test/', headers=k)).status)";
    let sent = (Some("allowed.test".to_owned()), Some(format!("Bearer {SECRET}")));
    let curl = "curl -sSf -o /dev/null -H \"Authorization: Bearer $API_KEY\"";
    for (client, says) in [
        (format!("{curl} https://allowed.test/"), ""),
        (format!("{curl} -6 --http2 https://allowed.test/"), ""),
        (format!("python3 -c \"{python}\""), "200"),
        (
            format!(
                "git -c http.extraHeader=\"Authorization: Bearer $API_KEY\" \
                 ls-remote https://allowed.test{path} HEAD"
            ),
            commit,
        ),
    ] {
        let said = house.ok(&vm, &client);
        assert!(said.starts_with(says), "{client}: {said}");
        assert_eq!(came(&outside, "authorization"), sent, "{client}");
    }
    let switched = house.ok(&vm, &format!("python3 - <<'END'\n{SWITCH}\nEND"));
    assert_eq!(switched, "b'\\x00ping'");
    assert_eq!(came(&outside, "x-key").1.as_deref(), Some(SECRET));
    // Much of it at once, both ways.
    let much = "head -c 3000000 /dev/zero > /tmp/much && curl -sSf https://allowed.test/upload \
                -T /tmp/much && curl -sSf https://allowed.test/bytes/3000000 | wc -c";
    assert_eq!(house.ok(&vm, much), "{\"bytes\":3000000}3000000");

    // Who is behind the hatch is whom this host trusts, for that name.
    let wrong =
        house.ok(&vm, "curl -sS -w ' %{http_code}' -H \"X-Key: $API_KEY\" https://wrong.test/");
    let (body, status) = wrong.rsplit_once(' ').unwrap();
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!((status, &body["code"]), ("502", &json!("untrusted_certificate")), "{body}");
    // Another name asked for inside is none that a secret may go to.
    let other = house
        .ok(&vm, "curl -sS -H 'Host: beside.test' -H \"X-Key: $API_KEY\" https://allowed.test/");
    assert_eq!(serde_json::from_str::<Value>(&other).unwrap()["rule"], "http_host");

    // Its neighbour, at the same address, is reached as ever: by its own certificate, with what was
    // said as it was said. And the machine's authority is nobody else's.
    let theirs = "--cacert /root/ca.pem -H \"X-Key: $API_KEY\"";
    untrusted(&house, &vm, "https://beside.test/");
    untrusted(&house, &vm, &format!("{theirs} https://allowed.test/"));
    house.ok(&vm, &format!("curl -sSf {theirs} https://beside.test/"));
    let plain = (Some("beside.test".to_owned()), Some(placeholder.clone()));
    assert_eq!(came(&outside, "x-key"), plain);
    let port = format!("curl -sSf {theirs} https://allowed.test:8443/");
    house.ok(&vm, &port);
    assert_eq!(came(&outside, "x-key").1, Some(placeholder.clone()));
    let stranger = start(&house, json!([]));
    let none = "env | grep -c CA_BUNDLE; ls /usr/local/share/ca-certificates /etc/aegis 2>&1";
    assert!(house.ok(&stranger, &format!("{none} || true")).starts_with("0\n"));
    house.ok(&stranger, &format!("cat > /tmp/ca.pem <<'END'\n{ca}END"));
    house.ok(&stranger, "curl -sSf --cacert /tmp/ca.pem https://allowed.test/");
    // Nor does a worker lead the daemon to sign for what is no host of the machine's.
    for (machine, host) in [(&stranger, "allowed.test"), (&vm, "beside.test")] {
        let to = (outside.v4(), 443).into();
        house.knocks_in_vain(machine, &Knock::Https { to, host: host.to_owned() });
    }

    // A daemon that was killed goes on with the same authority.
    house.kill9();
    house.start();
    wait_until("it is served again", Duration::from_secs(60), || {
        house.sh(&vm, &format!("{curl} https://allowed.test/")).code == Some(0)
    });
    assert_eq!(came(&outside, "authorization"), sent);

    // All of the machine's memory, as it is when nobody uses it any more.
    house.ok(&vm, "MARK=mark-of-$((6*7))-in-memory; echo $MARK > /tmp/mark");
    let memory = house.home().join("run").join(&vm).join("memory");
    wait_until("its memory is on disk", Duration::from_secs(60), || memory.exists());
    let dump = std::fs::read(&memory).unwrap();
    let holds = |text: &str| memchr::memmem::find(&dump, text.as_bytes()).is_some();
    assert!(holds("mark-of-42-in-memory"), "the whole memory is searched");
    assert!(holds(&placeholder) && !holds(SECRET), "the secret is in the machine's memory");
    assert!(!house.log().contains(SECRET));

    // What is taken away ends at once; another start has no authority.
    let path = format!("/v1/instances/{vm}/secrets");
    house.socket().put(&path, &json!({"secrets": []})).expect(200);
    wait_until("its TLS is its own again", Duration::from_secs(30), || {
        house.sh(&vm, "curl -sSf --cacert /root/ca.pem https://allowed.test/").code == Some(0)
    });
    house.socket().act(&format!("/v1/instances/{vm}/restart")).expect(200);
    house.until_instance(&vm, "running");
    let left = house.ok(&vm, "ls /usr/local/share/ca-certificates /etc/aegis; env");
    assert!(!left.contains("aegis.crt") && !left.contains("bundle"), "{left}");
}

#[test]
fn without_the_option_nobody_looks_into_tls() {
    let outside = Outside::new();
    let house = house(&outside, "");
    let vm = machine(&house, &["allowed.test"]);
    let ca = std::fs::read_to_string(outside.authority()).unwrap();
    house.ok(&vm, &format!("cat > /tmp/ca.pem <<'END'\n{ca}END"));
    let placeholder = house.ok(&vm, "printf %s $API_KEY");
    let send = "-H \"X-Key: $API_KEY\"";
    house.ok(&vm, &format!("curl -sSf --cacert /tmp/ca.pem {send} https://allowed.test/"));
    assert_eq!(came(&outside, "x-key"), (Some("allowed.test".to_owned()), Some(placeholder)));
    // By plain HTTP it works as it did.
    house.ok(&vm, &format!("curl -sSf {send} http://allowed.test/"));
    assert_eq!(came(&outside, "x-key"), (None, Some(SECRET.to_owned())));
    let to = (outside.v4(), 443).into();
    house.knocks_in_vain(&vm, &Knock::Https { to, host: "allowed.test".to_owned() });
    untrusted(&house, &vm, "https://allowed.test/");
    let left = house.ok(&vm, "ls /usr/local/share/ca-certificates; env; ls -d /etc/aegis || true");
    assert!(
        !left.contains("aegis.crt") && !left.contains("CERT") && !left.contains("/etc/aegis\n")
    );
}
