//! A hundred thousand invites: made by many at once, listed page by page, one of them redeemed as
//! quickly as the first (contracts/couch.md 9).

use std::collections::HashSet;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use aegis_tests::house::{House, MANUAL};
use aegis_tests::look;
use serde_json::{Value, json};

const COUNT: usize = 100_000;
const CLIENTS: usize = 50;
/// Requests that a client sends before it reads the answers.
const AHEAD: usize = 20;
/// The most that the daemon may ever have had in memory, KiB.
const PEAK_MAX_KB: u64 = 200 * 1024;
/// No single answer takes longer, however slow the host.
const ANSWER: Duration = Duration::from_secs(5);

/// Makes so many invites over one connection; returns the last one.
fn make(house: &House, count: usize) -> Value {
    let mut stream = TcpStream::connect(house.address()).unwrap();
    let body = r#"{"createdBy":"noah","label":"one of many"}"#;
    let ask = format!(
        "POST /couch/invites HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\nContent-Type: \
         application/json\r\nContent-Length: {}\r\n\r\n{body}",
        house.token(),
        body.len()
    );
    let mut answers = BufReader::new(stream.try_clone().unwrap());
    let mut last = Value::Null;
    for _ in 0..count / AHEAD {
        stream.write_all(ask.repeat(AHEAD).as_bytes()).unwrap();
        for _ in 0..AHEAD {
            last = read(&mut answers);
        }
    }
    last
}

fn read(from: &mut BufReader<TcpStream>) -> Value {
    let (mut length, mut line) = (0, String::new());
    from.read_line(&mut line).unwrap();
    assert!(line.starts_with("HTTP/1.1 201"), "{line}");
    while line != "\r\n" {
        line.clear();
        from.read_line(&mut line).unwrap();
        if let Some(value) = line.strip_prefix("content-length: ") {
            length = value.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body).unwrap();
    serde_json::from_slice(&body).unwrap()
}

#[test]
fn a_hundred_thousand_invites_are_made_listed_and_redeemed() {
    let house = House::new(MANUAL);
    let oldest = house.invite(json!({"label": "the first"}));
    let began = Instant::now();
    let codes: Vec<String> = std::thread::scope(|scope| {
        let makers: Vec<_> =
            (0..CLIENTS).map(|_| scope.spawn(|| make(&house, COUNT / CLIENTS))).collect();
        let made = makers.into_iter().map(|m| m.join().unwrap());
        made.map(|invite| invite["code"].as_str().unwrap().to_owned()).collect()
    });
    let took = began.elapsed();
    eprintln!("{:.0} invites per second", COUNT as f64 / took.as_secs_f64());

    // No page is larger than agreed, asked for or not; together they hold each invite once.
    let mut seen = HashSet::new();
    let mut cursor = String::new();
    let mut pages = 0;
    loop {
        let limit = if pages % 2 == 0 { "" } else { "&limit=700" };
        let began = Instant::now();
        let page = house.host().get(&format!("/couch/invites?status=active{limit}{cursor}"));
        assert!(began.elapsed() < ANSWER, "page {pages} took {:?}", began.elapsed());
        let page = page.expect(200);
        let rows = page["invites"].as_array().unwrap();
        let full = if limit.is_empty() { 1000 } else { 700 };
        assert_eq!(page["count"], rows.len());
        pages += 1;
        for row in rows {
            assert!(seen.insert(row["id"].as_str().unwrap().to_owned()), "twice: {row}");
        }
        match page["nextCursor"].as_str() {
            Some(next) => {
                assert_eq!(rows.len(), full);
                cursor = format!("&cursor={next}");
            }
            None => {
                assert_eq!(rows.last().unwrap()["id"], oldest["id"], "newest first");
                break;
            }
        }
    }
    assert_eq!(seen.len(), COUNT + 1);

    // One among many is found as if it were alone, and so is none.
    for code in codes.iter().map(String::as_str).chain([oldest["code"].as_str().unwrap()]) {
        let began = Instant::now();
        let ask = json!({"code": code, "name": "ty"});
        let guest = house.anybody().post("/couch/redeem", &ask).expect(201);
        house
            .anybody()
            .post("/couch/redeem", &json!({"code": "inv_x", "name": "ty"}))
            .refused(404, "");
        house
            .anybody()
            .bearer(guest["authToken"].as_str().unwrap())
            .get("/couch/status")
            .expect(200);
        assert!(began.elapsed() < ANSWER, "{:?}", began.elapsed());
    }
    let began = Instant::now();
    assert_eq!(
        house.host().get("/couch/invites?status=redeemed").expect(200)["count"],
        CLIENTS + 1
    );
    assert_eq!(house.host().get("/couch/invites?status=revoked").expect(200)["count"], 0);
    let status = house.host().get("/v1/status").expect(200);
    assert_eq!(status["counts"]["invites_active"], COUNT - CLIENTS);
    assert!(began.elapsed() < ANSWER, "{:?}", began.elapsed());
    let peak = look::peak_kb(house.pid().as_raw_nonzero().get()).unwrap();
    assert!(peak <= PEAK_MAX_KB, "{peak} KiB");
    eprintln!("peak {peak} KiB");
}
