//! The daemon's own log: ids everywhere, secrets nowhere.

use aegis_tests::house::{House, MANUAL};
use hyper::header::HeaderName;
use serde_json::{Value, json};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const JSON: &str = "[log]\nformat = \"json\"\nfilter = \"debug\"\n";

/// The lines of a house's log, each of which is a JSON object with a time and a level.
fn lines(house: &House) -> Vec<Value> {
    let log = house.log();
    let parsed = log.lines().map(|line| {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(line["timestamp"].is_string() && line["level"].is_string(), "{line}");
        line
    });
    parsed.collect()
}

/// The field of any span around a line.
fn span<'a>(line: &'a Value, field: &str) -> Option<&'a str> {
    line["spans"].as_array()?.iter().find_map(|span| span[field].as_str())
}

#[test]
fn every_request_has_an_id_and_no_secret_is_in_the_log() {
    let house = House::new(&format!("{MANUAL}{JSON}"));
    let invite = house.invite(json!({}));
    let code = invite["code"].as_str().unwrap();
    let ask = json!({"code": code, "name": "ty"});
    let redeemed = house.anybody().post("/couch/redeem", &ask);
    let guest = redeemed.expect(201);
    let token = guest["authToken"].as_str().unwrap();
    let status = house.anybody().get(&format!("/couch/status?token={token}"));
    status.expect(200);
    let lost = house.anybody().get(&format!("/couch/lost/{code}?token={token}"));
    lost.refused(404, "");
    let secrets = [code, token, &house.token()];
    // Neither as a method's word, nor as an id, nor in any header.
    for secret in secrets {
        let method = hyper::Method::from_bytes(secret.as_bytes()).unwrap();
        let client = house.anybody().with(REQUEST_ID, secret).bearer(secret);
        let answer = client.ask(method, "/couch/guests", None).unwrap();
        assert_ne!(answer.headers[&REQUEST_ID], secret);
        house.anybody().with(REQUEST_ID, secret).get(&format!("/{secret}")).refused(404, "");
    }
    let lines = lines(&house);
    for (answer, method, route, code) in [
        (&redeemed, "POST", "/couch/redeem", 201),
        (&status, "GET", "/couch/status", 200),
        (&lost, "GET", "unknown", 404),
    ] {
        let id = answer.headers[&REQUEST_ID].to_str().unwrap();
        let of: Vec<_> = lines.iter().filter(|l| span(l, "request_id") == Some(id)).collect();
        assert_eq!(of.len(), 1, "{id}: {lines:?}");
        assert_eq!(span(of[0], "method"), Some(method));
        assert_eq!(span(of[0], "route"), Some(route));
        assert_eq!(of[0]["status"], code);
        assert!(of[0]["ms"].as_f64().is_some_and(|ms| ms > 0.0), "{}", of[0]);
    }
    for secret in secrets {
        assert!(!house.log().contains(secret), "{secret}: {}", house.log());
    }
}

#[test]
fn an_id_is_the_clients_own_when_it_is_sane() {
    let house = House::new(&format!("{MANUAL}[log]\nfilter = \"debug\"\n"));
    let asked = |id: &str| {
        let answer = house.host().with(REQUEST_ID, id).get("/v1/status");
        answer.headers[&REQUEST_ID].to_str().unwrap().to_owned()
    };
    for sane in ["a", "4bf92f3577b34da6a3ce929d0e0e4736", "job-7.2"] {
        assert_eq!(asked(sane), sane);
        assert!(house.log().contains(&format!("request_id={sane}")), "{}", house.log());
    }
    for other in ["", "two words", "a\tb", "{}", "a;b", &"x".repeat(65)] {
        let made = asked(other);
        assert!(made != other && made.len() == 36, "{other:?}: {made}");
    }
    assert_ne!(asked(""), asked(""));
}

#[test]
fn what_happens_to_a_machine_bears_its_id_and_its_guests() {
    let house = House::new(JSON);
    let guest = house.guest(json!({"resourceLimits": {"maxMemoryMB": 256, "maxDiskGB": 0.3}}));
    let id = guest["guestId"].as_str().unwrap();
    let instance = house.until(id, "running")["vmId"].as_str().unwrap().to_owned();
    let lines = lines(&house);
    let runs = lines.iter().find(|l| l["message"] == "its machine runs").unwrap();
    assert_eq!(span(runs, "instance"), Some(instance.as_str()));
    assert_eq!(span(runs, "guest"), Some(id));
}

#[test]
fn looks_that_went_well_are_not_in_every_log() {
    let house = House::new(MANUAL);
    let id = |answer: &aegis_tests::http::Answer| {
        answer.headers[&REQUEST_ID].to_str().unwrap().to_owned()
    };
    let looked = id(&house.host().get("/couch/guests"));
    let refused = id(&house.anybody().get("/couch/guests"));
    let acted = id(&house.host().post("/couch/invites", &json!({"createdBy": "noah"})));
    let log = house.log();
    assert!(log.contains(&refused) && log.contains(&acted) && !log.contains(&looked), "{log}");
}

#[test]
fn another_format_is_refused() {
    let house = House::new(MANUAL);
    let done = std::process::Command::new(aegis_tests::programs().join("aegisd"))
        .args(["--listen", "127.0.0.1:0", "--home"])
        .arg(house.home())
        .env("AEGIS_LOG_FORMAT", "xml")
        .output()
        .unwrap();
    assert!(!done.status.success());
    assert!(String::from_utf8_lossy(&done.stderr).contains("xml is not text or json"));
}
