//! Who may come in, and what a bad request gets (contracts/couch.md 1 and 9).

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;

use aegis_tests::house::{House, MANUAL};
use aegis_tests::http::Client;
use bytes::Bytes;
use hyper::Method;
use hyper::header::{HOST, ORIGIN};
use serde_json::{Value, json};

/// Every route of the host.
const HOST_ROUTES: [(Method, &str); 47] = [
    (Method::POST, "/couch/invites"),
    (Method::GET, "/couch/invites"),
    (Method::DELETE, "/couch/invites/x"),
    (Method::GET, "/couch/guests"),
    (Method::GET, "/couch/guests/x/status"),
    (Method::DELETE, "/couch/guests/x"),
    (Method::POST, "/couch/guests/x/activate"),
    (Method::PUT, "/couch/guests/x/usage"),
    (Method::POST, "/couch/guests/x/freeze"),
    (Method::POST, "/couch/guests/x/thaw"),
    (Method::GET, "/couch/events?follow=false"),
    (Method::GET, "/v1/status"),
    (Method::POST, "/v1/instances"),
    (Method::GET, "/v1/instances"),
    (Method::POST, "/v1/instances/prune"),
    (Method::GET, "/v1/instances/x"),
    (Method::DELETE, "/v1/instances/x"),
    (Method::POST, "/v1/instances/x/start"),
    (Method::POST, "/v1/instances/x/restart"),
    (Method::POST, "/v1/instances/x/stop"),
    (Method::POST, "/v1/instances/x/disable"),
    (Method::POST, "/v1/instances/x/pause"),
    (Method::POST, "/v1/instances/x/resume"),
    (Method::POST, "/v1/instances/x/exec"),
    (Method::GET, "/v1/instances/x/exec"),
    (Method::GET, "/v1/instances/x/logs"),
    (Method::GET, "/v1/instances/x/logs?follow=true"),
    (Method::GET, "/v1/instances/x/envelope"),
    (Method::POST, "/v1/instances/x/expose"),
    (Method::DELETE, "/v1/instances/x/expose/80"),
    (Method::GET, "/v1/audit"),
    (Method::GET, "/metrics"),
    (Method::GET, "/couch/guests/x/egress"),
    (Method::PUT, "/couch/guests/x/egress"),
    (Method::PUT, "/couch/guests/x/limits"),
    (Method::GET, "/couch/guests/x/denials"),
    (Method::GET, "/couch/guests/x/requests"),
    (Method::POST, "/couch/guests/x/requests/1/grant"),
    (Method::POST, "/couch/guests/x/requests/1/deny"),
    (Method::PUT, "/v1/instances/x/secrets"),
    (Method::POST, "/v1/vers/key"),
    (Method::GET, "/v1/secrets"),
    (Method::GET, "/v1/secrets/X"),
    (Method::PUT, "/v1/secrets/X"),
    (Method::DELETE, "/v1/secrets/X"),
    (Method::GET, "/v1/workspaces"),
    (Method::DELETE, "/v1/workspaces/x"),
];

#[test]
fn every_host_route_asks_for_the_hosts_token() {
    let house = House::new(MANUAL);
    let guest = house.guest(json!({}));
    let token = house.token();
    let strangers = [
        house.anybody(),
        house.anybody().bearer(guest["authToken"].as_str().unwrap()),
        house.anybody().bearer(&token[..token.len() - 1]),
        house.anybody().bearer(&format!("{token}x")),
        house.anybody().bearer(""),
    ];
    for (method, path) in HOST_ROUTES {
        for stranger in &strangers {
            let answer = stranger.ask(method.clone(), path, None).unwrap();
            answer.refused(401, "");
            assert!(answer.headers.contains_key("www-authenticate"), "{method} {path}");
        }
        // A token in the query opens nothing here.
        let query = format!("{path}{}token={token}", if path.contains('?') { '&' } else { '?' });
        house.anybody().ask(method.clone(), &query, None).unwrap().refused(401, "");
        let known = house.host().ask(method.clone(), path, None).unwrap().status;
        assert!(known != 401 && known != 405 && known < 500, "{method} {path}: {known}");
    }
}

#[test]
fn the_hosts_secrets_are_files_of_the_host_alone() {
    use std::os::unix::fs::PermissionsExt as _;
    let house = House::new(MANUAL);
    for name in ["host-token", "aegisd.sock"] {
        let mode = std::fs::metadata(house.home().join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

#[test]
fn bodies_and_routes_that_are_none() {
    let house = House::new(MANUAL);
    let send = |method: Method, path: &str, body: Vec<u8>| {
        house.host().send(method, path, Bytes::from(body)).unwrap()
    };
    let large = format!("{{\"createdBy\":\"{}\"}}", "x".repeat(64 * 1024)).into_bytes();
    send(Method::POST, "/couch/invites", large.clone()).refused(413, "");
    send(Method::POST, "/couch/redeem", large).refused(413, "");
    for bad in ["{", "nonsense", "{\"createdBy\":}", "\u{0}", "{\"createdBy\":\"a\"} trailing"] {
        send(Method::POST, "/couch/invites", bad.into()).refused(400, "");
        send(Method::POST, "/couch/redeem", bad.into()).refused(400, "");
        send(Method::POST, "/v1/instances", bad.into()).refused(400, "");
    }
    send(Method::POST, "/couch/invites", vec![b'{', 0xff, b'}']).refused(400, "");
    for no_object in ["[]", "7", "null", "\"x\"", ""] {
        send(Method::POST, "/couch/invites", no_object.into()).refused(400, "");
        send(Method::POST, "/couch/redeem", no_object.into()).refused(400, "");
    }
    // So deep that a reader without a bound would run out of stack.
    let deep = "[".repeat(30_000).into_bytes();
    send(Method::POST, "/couch/invites", deep).refused(400, "");
    for (method, path) in [(Method::GET, "/"), (Method::GET, "/couch"), (Method::POST, "/v2/x")] {
        send(method, path, Vec::new()).refused(404, "");
    }
    for (method, path) in [
        (Method::GET, "/couch/redeem"),
        (Method::POST, "/couch/status"),
        (Method::PUT, "/couch/invites"),
        (Method::PATCH, "/couch/guests"),
    ] {
        send(method, path, Vec::new()).refused(405, "");
    }
    house.host().get("/v1/status").expect(200);
}

#[test]
fn a_half_request_and_garbage_harm_nobody_else() {
    let house = House::new(MANUAL);
    let mut idle: Vec<TcpStream> =
        (0..50).map(|_| TcpStream::connect(house.address()).unwrap()).collect();
    for stream in &mut idle {
        stream.write_all(b"POST /couch/redeem HTTP/1.1\r\nHost: x\r\nContent-Le").unwrap();
    }
    let mut garbage = TcpStream::connect(house.address()).unwrap();
    garbage.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let _ = garbage.write_all(&[0xff; 4096]);
    let mut answer = Vec::new();
    let _ = garbage.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP/1.1 2"));
    house.guest(json!({}));
}

#[test]
fn public_routes_are_limited_per_address() {
    let house = House::new("provisioner = \"manual\"\n[rate_limit]\nper_second = 1\nburst = 3\n");
    let ask = json!({"code": "inv_x", "name": "ty"});
    let answers: Vec<_> = (0..8).map(|_| house.anybody().post("/couch/redeem", &ask)).collect();
    let statuses: Vec<u16> = answers.iter().map(|a| a.status).collect();
    assert_eq!(statuses[..3], [404; 3]);
    let refused = answers.iter().find(|a| a.status == 429).expect("the eighth is one too many");
    let wait: u64 = refused.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=5).contains(&wait), "{wait}");
    let body = refused.refused(429, "");
    assert!(body["allowed"].as_str().unwrap().contains("per second"), "{body}");
    // The host is not a guest: neither its socket nor its routes are counted.
    for _ in 0..10 {
        house.socket().post("/couch/redeem", &ask).refused(404, "");
        house.host().get("/couch/guests").expect(200);
    }
}

#[test]
fn without_authentication_only_this_machine_is_served() {
    let house = House::without_auth(MANUAL);
    let asks = |client: &Client| client.get("/couch/guests").status;
    let port = house.address().port();
    for host in [format!("localhost:{port}"), format!("127.0.0.1:{port}"), "localhost".into()] {
        assert_eq!(asks(&house.anybody().with(HOST, &host)), 200, "{host}");
    }
    for host in
        ["evil.example", "localhost.evil.example", "10.0.0.1", "127.0.0.1.evil.example:3000"]
    {
        house.anybody().with(HOST, host).get("/couch/guests").refused(403, "");
    }
    for origin in ["http://evil.example", "https://localhost.evil.example", "null", "file://"] {
        house.anybody().with(ORIGIN, origin).get("/couch/guests").refused(403, "");
        let body = json!({"createdBy": "evil"});
        house.anybody().with(ORIGIN, origin).post("/couch/invites", &body).refused(403, "");
    }
    let origin = format!("http://localhost:{port}");
    assert_eq!(asks(&house.anybody().with(ORIGIN, &origin)), 200);
}

#[test]
fn without_authentication_nothing_but_loopback_is_bound() {
    let home = tempfile::Builder::new().prefix("aegis-it-").tempdir_in("/tmp").unwrap();
    for address in ["0.0.0.0:0", "192.0.2.1:0", "[::]:0"] {
        let done = Command::new(aegis_tests::programs().join("aegisd"))
            .args(["--no-auth", "--listen", address, "--home"])
            .arg(home.path())
            .output()
            .unwrap();
        assert!(!done.status.success(), "{address}");
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(said.contains("loopback"), "{said}");
    }
}

#[test]
fn a_second_daemon_in_the_same_home_ends() {
    let house = House::new(MANUAL);
    let done = Command::new(aegis_tests::programs().join("aegisd"))
        .args(["--listen", "127.0.0.1:0", "--home"])
        .arg(house.home())
        .output()
        .unwrap();
    assert!(!done.status.success());
    assert!(String::from_utf8_lossy(&done.stderr).contains("another aegisd"));
    house.host().get("/v1/status").expect(200);
}

#[test]
fn no_secret_reaches_the_log() {
    let house = House::new(MANUAL);
    let invite = house.invite(json!({}));
    let code = invite["code"].as_str().unwrap();
    let guest =
        house.anybody().post("/couch/redeem", &json!({"code": code, "name": "ty"})).expect(201);
    let token = guest["authToken"].as_str().unwrap();
    house.anybody().get(&format!("/couch/status?token={token}")).expect(200);
    house.anybody().get(&format!("/couch/nothing?token={token}")).refused(404, "");
    house.anybody().get(&format!("/couch/status?token={token}&token={token}")).refused(400, "");
    let path = format!("/couch/guests/{}", guest["guestId"].as_str().unwrap());
    house.host().delete(&path).expect(200);
    house.anybody().post("/couch/redeem", &json!({"code": code, "name": "ty"})).refused(409, "");
    let log = house.log();
    assert!(!log.is_empty());
    for secret in [code, token, &house.token()] {
        assert!(!log.contains(secret), "{log}");
    }
}

#[test]
fn the_status_says_what_this_daemon_is() {
    let house = House::new(MANUAL);
    house.guest(json!({}));
    house.invite(json!({}));
    let status: Value = house.host().get("/v1/status").expect(200);
    assert_eq!(status["provisioner"], "manual");
    assert_eq!(status["listen"], house.address().to_string());
    assert_eq!(status["counts"]["invites_active"], 1);
    assert_eq!(status["counts"]["guests_live"], 1);
    assert_eq!(status["counts"]["machines"], 0);
}

/// Sends bytes as they are and reads the head of the answer.
fn raw(house: &House, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(house.address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // Who refuses early may close before all is sent.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    while !answer.windows(4).any(|w| w == b"\r\n\r\n") {
        match stream.read(&mut chunk) {
            Ok(n) if n > 0 => answer.extend_from_slice(&chunk[..n]),
            _ => break,
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn the_largest_body_passes_and_one_byte_more_does_not() {
    let house = House::new(MANUAL);
    let padded = |body: &str, len: usize| {
        let mut bytes = body.as_bytes().to_vec();
        bytes.resize(len, b' ');
        Bytes::from(bytes)
    };
    let couch = 64 * 1024;
    let host = 256 * 1024;
    let invite = r#"{"createdBy":"noah"}"#;
    let send = |path: &str, body: Bytes| house.host().send(Method::POST, path, body).unwrap();
    send("/couch/invites", padded(invite, couch)).expect(201);
    send("/couch/invites", padded(invite, couch + 1)).refused(413, "");
    send("/couch/redeem", padded("{}", couch)).refused(400, "code");
    send("/couch/redeem", padded("{}", couch + 1)).refused(413, "");
    send("/couch/guests/x/activate", padded("{}", couch + 1)).refused(413, "");
    let put = house.host().send(Method::PUT, "/couch/guests/x/usage", padded("{}", couch + 1));
    put.unwrap().refused(413, "");
    send("/v1/instances", padded("{}", host)).refused(400, "command");
    send("/v1/instances", padded("{}", host + 1)).refused(413, "");
    // All that a command reads may be in there.
    let exec = aegis_wire::bounds::EXEC_BODY_MAX;
    send("/v1/instances/x/exec", padded("{}", exec)).refused(400, "");
    send("/v1/instances/x/exec", padded("{}", exec + 1)).refused(413, "");
    // Neither is one of chunks, whose length nobody said, nor one whose length is a lie.
    let mut chunked =
        b"POST /couch/redeem HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    for _ in 0..20 {
        chunked.extend_from_slice(b"1000\r\n");
        chunked.extend(std::iter::repeat_n(b' ', 0x1000));
        chunked.extend_from_slice(b"\r\n");
    }
    assert!(raw(&house, &chunked).starts_with("HTTP/1.1 413"));
    let lie = b"POST /couch/redeem HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{}";
    let said = raw(&house, &[&lie[..], &[b' '; 100_000]].concat());
    assert!(said.starts_with("HTTP/1.1 413"), "{said}");
}

#[test]
fn whatever_the_path_the_answer_is_json() {
    let house = House::new(MANUAL);
    let guest = house.guest(json!({}));
    let id = guest["guestId"].as_str().unwrap();
    for method in [Method::GET, Method::POST, Method::PUT, Method::DELETE, Method::PATCH] {
        for path in [
            "/",
            "/couch",
            "/couch/",
            "/couch/invites/",
            "//couch/guests",
            "/COUCH/guests",
            "/couch/guests/x/y/z",
            "/couch/../couch/guests",
            "/v1",
            "/v1/instances/x/nothing",
            "/couch/redeem/x",
            "/couch/%00",
        ] {
            let answer = house.host().ask(method.clone(), path, None).unwrap();
            assert!([404, 405].contains(&answer.status), "{method} {path}: {}", answer.status);
            answer.refused(answer.status, "");
        }
    }
    // An id that is none is not found, whatever bytes it is made of.
    let long = "x".repeat(3000);
    for odd in
        ["%00", "%ff", "%c3%28", "%20", "..%2f..%2fetc", "'%20OR%201=1", &long, "%F0%9F%92%A9"]
    {
        for (method, path) in [
            (Method::GET, format!("/couch/guests/{odd}/status")),
            (Method::DELETE, format!("/couch/guests/{odd}")),
            (Method::DELETE, format!("/couch/invites/{odd}")),
            (Method::POST, format!("/couch/guests/{odd}/freeze")),
            (Method::GET, format!("/v1/instances/{odd}")),
            (Method::DELETE, format!("/v1/instances/{odd}")),
        ] {
            house.host().ask(method, &path, None).unwrap().refused(404, "");
        }
    }
    for (path, allow) in [
        ("/couch/redeem", "POST"),
        ("/couch/status", "GET"),
        ("/couch/invites", "GET"),
        ("/couch/invites/x", "DELETE"),
        ("/couch/guests", "GET"),
        ("/couch/guests/x", "DELETE"),
        ("/couch/guests/x/status", "GET"),
        ("/couch/guests/x/activate", "POST"),
        ("/couch/guests/x/usage", "PUT"),
        ("/couch/guests/x/freeze", "POST"),
        ("/couch/guests/x/thaw", "POST"),
        ("/v1/status", "GET"),
        ("/v1/instances", "GET"),
        ("/v1/instances/x/exec", "POST"),
        ("/v1/instances/x/logs", "GET"),
    ] {
        let answer = house.host().ask(Method::PATCH, path, None).unwrap();
        answer.refused(405, "");
        let said = answer.headers.get("allow").map(|v| v.to_str().unwrap().to_owned());
        assert!(said.as_ref().is_some_and(|s| s.contains(allow)), "{path}: {said:?}");
    }
    for query in
        ["?status=active&status=revoked", "?limit=%ff", "?limit=-1", "?cursor=x", "?cursor="]
    {
        house.host().get(&format!("/couch/invites{query}")).refused(400, "");
        house.host().get(&format!("/couch/guests{query}")).refused(400, "");
    }
    house.host().get(&format!("/couch/guests?cursor={id}")).expect(200);
}

#[test]
fn malformed_bodies_are_refused_by_every_route_that_takes_one() {
    let house = House::new(MANUAL);
    let guest = house.guest(json!({}));
    let id = guest["guestId"].as_str().unwrap();
    let deep = "[".repeat(30_000);
    let nested = format!("{}1{}", "{\"a\":".repeat(5000), "}".repeat(5000));
    let bad: [&[u8]; 16] = [
        b"{",
        b"nonsense",
        b"{\"code\":}",
        b"{} {}",
        b"\0",
        b"\xff\xfe{\0}\0",
        b"{\"\xc3\x28\":1}",
        b"{\"maxMemoryMB\":NaN}",
        b"{\"n\":1e999}",
        b"{\"n\":0x10}",
        b"{'code':'x'}",
        b"{\"a\":\"\x01\"}",
        b"{\"a\":\"\\ud800\"}",
        b"[{}]",
        deep.as_bytes(),
        nested.as_bytes(),
    ];
    for (method, path) in [
        (Method::POST, "/couch/redeem".to_owned()),
        (Method::POST, "/couch/invites".to_owned()),
        (Method::POST, format!("/couch/guests/{id}/activate")),
        (Method::PUT, format!("/couch/guests/{id}/usage")),
        (Method::POST, "/v1/instances".to_owned()),
        (Method::POST, "/v1/instances/x/exec".to_owned()),
    ] {
        for body in bad {
            let body = Bytes::copy_from_slice(body);
            let answer = house.host().send(method.clone(), &path, body.clone()).unwrap();
            assert_eq!(answer.status, 400, "{method} {path} {body:?}: {:?}", answer.body);
            answer.refused(400, "");
        }
    }
    assert_eq!(house.guest_status(id)["status"], "provisioning");
}

#[test]
fn each_address_has_a_rate_of_its_own_on_every_public_route() {
    let house = House::new("provisioner = \"manual\"\n[rate_limit]\nper_second = 1\nburst = 3\n");
    let port = house.address().port();
    let ask = |from: [u8; 4]| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.bind((std::net::Ipv4Addr::from(from), 0).into()).unwrap();
            let mut stream = socket.connect(([127, 0, 0, 1], port).into()).await.unwrap();
            let text = "GET /couch/status?token=x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
            stream.write_all(text.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer.split(' ').nth(1).unwrap().parse::<u16>().unwrap()
        })
    };
    let first: Vec<u16> = (0..8).map(|_| ask([127, 0, 0, 1])).collect();
    assert!(first[..3].iter().all(|s| *s == 404) && first.contains(&429), "{first:?}");
    // Another address pays nothing for that.
    assert_eq!(ask([127, 0, 0, 2]), 404);
    // Redeems and looks at oneself are counted together.
    let redeem = house.anybody().post("/couch/redeem", &json!({"code": "inv_x", "name": "ty"}));
    assert!([404, 429].contains(&redeem.status), "{}", redeem.status);
}
