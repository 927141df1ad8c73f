//! The host's doors as processes inside find them: by name, over the machine's own link; and what a
//! machine that means harm does to that link (contracts/couch.md 6).

use std::time::Duration;

use aegis_tests::house::House;
use aegis_tests::outside::{ECHO, Outside};
use aegis_tests::vendor::Vendor;
use aegis_tests::{look, wait_until};
use serde_json::{Value, json};

const KEY: &str = "sk-host-5d0a9c31-only-the-host-has-it";

fn start(house: &House, mut body: Value) -> String {
    body["command"] = json!(["sleep", "infinity"]);
    body["vcpus"] = json!(1);
    body["memory_mb"] = json!(256);
    body["disk_gb"] = json!(0.3);
    let made = house.socket().post("/v1/instances", &body).expect(201);
    let id = made["id"].as_str().unwrap().to_owned();
    house.until_instance(&id, "running");
    id
}

#[test]
fn the_doors_open_by_name_and_the_key_stays_outside() {
    let vendor = Vendor::start();
    let service = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let settings = format!(
        "{}[host_services.tools]\naddr = \"{}\"\n[idle]\npause_after_secs = 1\n\
         suspend_after_secs = 1\n[rate_limit]\nper_second = 0\n",
        vendor.settings(),
        service.local_addr().unwrap()
    );
    let house = House::new(&settings);
    for name in ["OPENAI_API_KEY", "ANTHROPIC_API_KEY"] {
        let path = format!("/v1/secrets/{name}");
        house.socket().put(&path, &json!({"value": KEY})).expect(200);
    }
    // No internet: the host's doors are another thing.
    let id = start(&house, json!({"egress": {"internet": false}, "host_services": ["tools"]}));
    std::thread::spawn(move || {
        use std::io::{Read as _, Write as _};
        for stream in service.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\ntools");
        }
    });
    let body = r#"{"model":"gpt-5","max_completion_tokens":20,"messages":[{"role":"user","content":"hi"}]}"#;
    let chat = format!(
        "curl -sS -f $OPENAI_BASE_URL/chat/completions -H 'Authorization: Bearer x' \
         -H 'Content-Type: application/json' -d '{body}'"
    );
    let answer: Value = serde_json::from_str(&house.ok(&id, &chat)).unwrap();
    assert!(answer["choices"][0]["message"]["content"].is_string(), "{answer}");
    let got = vendor.take();
    assert!(format!("{got:?}").contains(KEY), "the host's key went to the vendor: {got:?}");
    assert_eq!(house.ok(&id, "curl -sS -f http://tools.host.aegis/"), "tools");
    assert_ne!(house.sh(&id, "curl -sS -m 8 http://other.host.aegis/").code, Some(0));
    assert_ne!(house.sh(&id, "curl -sS -m 8 http://example.com/").code, Some(0));
    // Another port of a door, or the host's service by its address, is nothing.
    assert_ne!(house.sh(&id, "curl -sS -m 8 http://llm.aegis:8080/").code, Some(0));
    // None of it was sent outside.
    let info = house.socket().get(&format!("/v1/instances/{id}")).expect(200);
    assert_eq!(info["envelope"]["spent"]["egress_gb"].as_f64(), Some(0.0), "{info}");
    assert!(info["envelope"]["spent"]["tokens"].as_u64().unwrap() > 0, "{info}");

    // All of the machine's memory, as it is when nobody uses it any more.
    house.ok(&id, "MARK=mark-of-$((6*7))-in-memory; echo $MARK > /tmp/mark");
    let memory = house.home().join("run").join(&id).join("memory");
    wait_until("its memory is on disk", Duration::from_secs(60), || memory.exists());
    let dump = std::fs::read(&memory).unwrap();
    let holds = |text: &str| dump.windows(text.len()).any(|w| w == text.as_bytes());
    assert!(holds("mark-of-42-in-memory"), "the whole memory is searched");
    assert!(!holds(KEY), "the key is in the machine's memory");
}

/// Runs inside as root: connections without end, most of which nobody answers, and datagrams.
const FLOOD: &str = r#"
import socket, sys, time, errno
host, port, total = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
opened, refused = [], 0
end = time.time() + 40
for n in range(total):
    s = socket.socket()
    s.setblocking(False)
    try:
        s.connect((host, port if n % 2 else 1 + n % 60000))
    except BlockingIOError:
        pass
    except OSError as e:
        refused += 1
    opened.append(s)
    if len(opened) >= 4000:
        for s in opened[:2000]:
            s.close()
        del opened[:2000]
    if n % 10 == 0:
        u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        u.setblocking(False)
        try:
            u.sendto(b"x" * 100, (host, 1 + n % 60000))
        except OSError:
            pass
        u.close()
    if time.time() > end:
        break
print(n + 1)
"#;

#[test]
fn a_machine_that_floods_its_link_harms_nobody_else() {
    let outside = Outside::new();
    let house = House::new(&format!(
        "[rate_limit]\nper_second = 0\n[egress]\nresolvers = [\"{}\"]\n",
        outside.resolver()
    ));
    let (evil, good) = (start(&house, json!({})), start(&house, json!({})));
    let echo = format!(
        "python3 -c \"import socket as s; k=s.create_connection(('{}',{ECHO}),20); \
         k.sendall(b'x'*100000); n=0\nwhile n<100000: n+=len(k.recv(65536))\nprint(n)\"",
        outside.v4()
    );
    assert_eq!(house.ok(&good, &echo), "100000");
    let run = format!("/run/{evil}");
    let worker = look::processes()
        .into_iter()
        .find(|p| p.command.contains(" machine ") && p.command.trim_end().ends_with(&run));
    let worker = worker.unwrap().pid;
    let before = look::peak_kb(worker).unwrap();
    let tried = std::thread::scope(|scope| {
        let flood = scope.spawn(|| {
            let script = format!(
                "ulimit -n 100000; cat > /tmp/f.py <<'END'\n{FLOOD}\nEND\n\
                 python3 /tmp/f.py {} {ECHO} 100000",
                outside.v4()
            );
            house.sh(&evil, &script)
        });
        while !flood.is_finished() {
            assert_eq!(house.ok(&good, &echo), "100000", "beside the flood");
        }
        let most = look::peak_kb(worker).unwrap();
        assert!(most < before + 200 * 1024, "{before} to {most} KiB");
        flood.join().unwrap()
    });
    assert_eq!(tried.code, Some(0), "{tried:?}");
    assert!(tried.text().parse::<u64>().unwrap() > 5_000, "{tried:?}");
    // It is still served itself, within its budgets.
    wait_until("it is served again", Duration::from_secs(90), || {
        house.sh(&evil, &echo).code == Some(0)
    });
}
