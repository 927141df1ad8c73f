//! Machines by name, over one port of the host (contracts/aegis.md 9).

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use aegis_tests::house::House;
use aegis_tests::wait_until;
use serde_json::{Value, json};

/// Says its own name, and speaks something else after an upgrade.
const SERVER: &str = r#"
import http.server, socketserver, sys
class H(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        if self.headers.get("Upgrade"):
            self.send_response(101)
            self.send_header("Upgrade", "shout")
            self.send_header("Connection", "upgrade")
            self.end_headers()
            self.wfile.flush()
            while True:
                line = self.rfile.readline()
                if not line:
                    break
                self.wfile.write(line.upper())
                self.wfile.flush()
            self.close_connection = True
            return
        text = (sys.argv[1] + " " + str(self.headers.get("X-Aegis-Instance"))).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def log_message(self, *a):
        pass
class S(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
S(("127.0.0.1", int(sys.argv[2])), H).serve_forever()
"#;

fn start(house: &House, handle: &str, port: u16) -> String {
    let body = json!({"handle": handle, "vcpus": 1, "memory_mb": 256, "disk_gb": 0.3,
        "command": ["python3", "-c", SERVER, handle, port.to_string()], "exposes": [port]});
    let made = house.socket().post("/v1/instances", &body).expect(201);
    let id = made["id"].as_str().unwrap().to_owned();
    house.until_instance(&id, "running");
    id
}

/// One request on a connection that may be used again: status and body.
fn get(stream: &mut BufReader<TcpStream>, headers: &str) -> (u16, String) {
    stream.get_mut().write_all(format!("GET / HTTP/1.1\r\n{headers}\r\n").as_bytes()).unwrap();
    let mut line = String::new();
    stream.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).unwrap().parse().unwrap();
    let mut length = 0;
    loop {
        let mut header = String::new();
        stream.read_line(&mut header).unwrap();
        let header = header.trim_end().to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        if let Some(value) = header.strip_prefix("content-length: ") {
            length = value.parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    (status, String::from_utf8(body).unwrap())
}

fn connect(house: &House) -> BufReader<TcpStream> {
    let status = house.socket().get("/v1/status").expect(200);
    let at: SocketAddr = status["router"].as_str().unwrap().parse().unwrap();
    let stream = TcpStream::connect(at).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    BufReader::new(stream)
}

#[test]
fn machines_are_reached_by_name_and_woken() {
    let house = House::new(
        "[router]\nlisten = \"127.0.0.1:0\"\n[idle]\npause_after_secs = 2\n\
         suspend_after_secs = 2\n[rate_limit]\nper_second = 0\n",
    );
    let mut to = connect(&house);
    assert_eq!(get(&mut to, "Host: localhost\r\n").0, 404, "there is none");
    let a = start(&house, "a", 8080);
    // The program may take a moment after its machine runs.
    wait_until("the only one needs no name", Duration::from_secs(30), || {
        get(&mut connect(&house), "Host: localhost\r\n").1 == "a None"
    });
    let b = start(&house, "b", 9000);
    wait_until("b answers", Duration::from_secs(30), || {
        get(&mut connect(&house), "Host: b.localhost\r\n").1 == "b None"
    });
    // On one connection, each request by its own name.
    let mut to = connect(&house);
    for (headers, answer) in [
        ("Host: a.localhost:8099\r\n".to_owned(), "a None"),
        ("Host: b.localhost\r\n".to_owned(), "b None"),
        ("Host: 9000.b.localhost\r\n".to_owned(), "b None"),
        (format!("Host: {}.localhost\r\n", a.to_lowercase()), "a None"),
        ("Host: x\r\nX-Aegis-Instance: b\r\n".to_owned(), "b None"),
        (format!("Host: x\r\nX-Aegis-Instance: {b}\r\n"), "b None"),
    ] {
        assert_eq!(get(&mut to, &headers), (200, answer.to_owned()), "{headers}");
    }
    for headers in [
        "Host: nobody.localhost\r\n",
        "Host: localhost\r\n",
        "Host: 9000.a.localhost\r\n",
        "Host: 22.b.localhost\r\n",
        "Host: x\r\nX-Aegis-Instance: ../a\r\n",
    ] {
        let (status, body) = get(&mut connect(&house), headers);
        assert_eq!(status, 404, "{headers}: {body}");
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(body["code"], "instance_not_found");
    }

    // Something else than HTTP, after both agreed.
    let upgrade = "Host: b.localhost\r\nConnection: Upgrade\r\nUpgrade: shout\r\n";
    let mut to = connect(&house);
    assert_eq!(get(&mut to, upgrade).0, 101);
    let mut line = String::new();
    to.get_mut().write_all(b"hello\n").unwrap();
    to.read_line(&mut line).unwrap();
    assert_eq!(line, "HELLO\n");

    // Nobody uses a: its memory goes to disk. Who asks for it waits until it goes on. The one that
    // is spoken with stays.
    let memory = house.home().join("run").join(&a).join("memory");
    wait_until("a sleeps", Duration::from_secs(90), || memory.exists());
    assert_eq!(house.socket().get(&format!("/v1/instances/{b}")).expect(200)["state"], "running");
    let mut asleep = connect(&house);
    assert_eq!(get(&mut asleep, "Host: a.localhost\r\n"), (200, "a None".to_owned()));
    // Disabled is not there.
    house.socket().post(&format!("/v1/instances/{a}/disable"), &json!({})).expect(200);
    assert_eq!(get(&mut connect(&house), "Host: a.localhost\r\n").0, 404);
}
