//! The LLM door, over the sockets of real machines, with a double behind it: what goes through, and
//! what ends it (contracts/couch.md 6). What it costs is in `budget`.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use aegis_tests::house::House;
use aegis_tests::http::{Answer, Client};
use aegis_tests::vendor::{Manners, Vendor};
use aegis_tests::wait_until;
use aegis_wire::door::Knock;
use serde_json::{Value, json};

use super::{secrets, tree};

const OPENAI_KEY: &str = "sk-host-4f1c0e7a-openai";
pub(super) const ANTHROPIC_KEY: &str = "sk-host-91d3b2c8-anthropic";
pub(super) const CHAT: &str = "/openai/v1/chat/completions";
pub(super) const RESPONSES: &str = "/openai/v1/responses";
pub(super) const MESSAGES: &str = "/anthropic/v1/messages";
/// A state that follows from something is there after this.
pub(super) const SOON: Duration = Duration::from_secs(20);

/// A house with a vendor behind its door, and a guest with a budget.
pub(super) struct Scene {
    pub(super) house: House,
    pub(super) vendor: Vendor,
    pub(super) guest: String,
    pub(super) machine: String,
}

pub(super) fn scene(budget: u64, more: Value) -> Scene {
    let vendor = Vendor::start();
    let house = House::new(&format!("{}[rate_limit]\nper_second = 0\n", vendor.settings()));
    let keep = |name: &str, value: &str| {
        house.socket().put(&format!("/v1/secrets/{name}"), &json!({"value": value})).expect(200)
    };
    keep("OPENAI_API_KEY", OPENAI_KEY);
    keep("ANTHROPIC_API_KEY", ANTHROPIC_KEY);
    let mut invite = json!({"resourceLimits": {
        "maxCpuCores": 1, "maxMemoryMB": 512, "maxDiskGB": 1, "maxTokenBudget": budget}});
    // What is spent is shut, and the machine goes on to be asked about it.
    invite["onLimit"] = json!("throttle");
    for (name, value) in more.as_object().unwrap() {
        invite[name] = value.clone();
    }
    let guest = house.guest(invite);
    let guest = tree::text(&guest, "guestId").to_owned();
    let machine = tree::text(&house.until(&guest, "running"), "vmId").to_owned();
    Scene { house, vendor, guest, machine }
}

pub(super) fn chat(output: u64, stream: bool) -> Value {
    json!({"model": "gpt-5", "max_completion_tokens": output, "stream": stream,
           "messages": [{"role": "user", "content": "hi"}]})
}

pub(super) fn messages(output: u64, stream: bool) -> Value {
    json!({"model": "claude-sonnet-4", "max_tokens": output, "stream": stream,
           "messages": [{"role": "user", "content": "hi"}]})
}

/// Data of the events of a stream.
pub(super) fn events(answer: &Answer) -> Vec<Value> {
    let text = String::from_utf8(answer.body.to_vec()).unwrap();
    text.lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .filter(|data| *data != "[DONE]")
        .map(|data| serde_json::from_str(data).unwrap())
        .collect()
}

impl Scene {
    pub(super) fn door(&self) -> Client {
        self.house.knock(&self.machine, &Knock::Llm)
    }

    #[track_caller]
    pub(super) fn post(&self, path: &str, body: &Value) -> Answer {
        self.door().post(path, body)
    }

    /// Asks for a stream, and reads only where it begins.
    #[track_caller]
    pub(super) fn stream(&self, body: &Value) -> UnixStream {
        let mut stream = UnixStream::connect(self.house.hatch(&self.machine)).unwrap();
        let text = body.to_string();
        write!(
            stream,
            "{{\"door\":\"llm\"}}\nPOST {CHAT} HTTP/1.1\r\nHost: llm.aegis\r\nContent-Length: {}\r\n\r\n{text}",
            text.len()
        )
        .unwrap();
        stream.read_exact(&mut [0; 200]).unwrap();
        stream
    }

    #[track_caller]
    pub(super) fn spent(&self) -> u64 {
        self.house.guest_status(&self.guest)["resourceUsage"]["tokensUsed"].as_u64().unwrap()
    }

    /// What a call must have added to what was spent.
    #[track_caller]
    pub(super) fn costs(&self, tokens: u64, call: impl FnOnce()) {
        let before = self.spent();
        call();
        let settled = self.calls().len();
        let enough = || self.spent() >= before + tokens;
        wait_until(&format!("{tokens} more than {before}, {settled} settled"), SOON, enough);
        assert_eq!(self.spent(), before + tokens);
    }

    pub(super) fn calls(&self) -> Vec<Value> {
        let trail = tree::trail(&self.house);
        let calls = trail.iter().filter(|e| e["kind"] == "llm.call");
        calls.map(|e| serde_json::from_str(tree::text(e, "data")).unwrap()).collect()
    }

    /// What a call with this output reserves, as the vendor's view of it shows.
    pub(super) fn reserved_by(&self, path: &str, body: &Value) -> u64 {
        self.vendor.behave(Manners { mute: true, ..Manners::default() });
        let before = self.spent();
        assert_eq!(self.post(path, body).status, 200);
        self.vendor.behave(Manners::default());
        self.spent() - before
    }
}

#[test]
fn calls_go_through_with_the_hosts_key_and_are_counted() {
    let scene = scene(1_000_000, json!({"llmModels": ["gpt-5*", "claude-*"]}));
    let Scene { house, vendor, .. } = &scene;

    // Each API, in one piece and as events: 10 tokens in, 5 out.
    let long = json!({"model": "gpt-5", "input": "hi", "max_output_tokens": 100, "store": true});
    for (path, body) in
        [(CHAT, chat(100, false)), (RESPONSES, long), (MESSAGES, messages(100, false))]
    {
        scene.costs(15, || {
            let answer = scene.post(path, &body).expect(200);
            assert_eq!(answer.to_string().matches("word ").count(), 5, "{answer}");
        });
        let mut streamed = body;
        streamed["stream"] = true.into();
        scene.costs(15, || {
            let answer = scene.post(path, &streamed);
            assert_eq!(answer.status, 200);
            let seen = events(&answer);
            let words = Value::from(seen.clone()).to_string().matches("\"word \"").count();
            assert_eq!(words, 5, "{path}: {seen:?}");
            if path == CHAT {
                // Nobody asked for what the door asked for.
                assert!(seen.iter().all(|e| e["usage"].is_null()), "{seen:?}");
                assert!(answer.body.ends_with(b"data: [DONE]\n\n"));
            }
        });
    }
    let mut shown = chat(100, true);
    shown["stream_options"] = json!({"include_usage": true});
    let told = events(&scene.post(CHAT, &shown));
    assert_eq!(told.last().unwrap()["usage"]["total_tokens"], 15);

    // The vendor saw the host's key, the limit, and nothing that was the client's.
    let client = scene.door().bearer("mine").with("x-api-key".parse().unwrap(), "mine");
    let client = client.with("cookie".parse().unwrap(), "mine");
    let client = client.with("openai-organization".parse().unwrap(), "mine");
    vendor.take();
    client.post(CHAT, &chat(100, false)).expect(200);
    let answer = client.post(MESSAGES, &messages(100, false));
    let got = vendor.take();
    let header = |n: usize, name: &str| {
        got[n].headers.get(name).map(|v| v.to_str().unwrap().to_owned()).unwrap_or_default()
    };
    assert_eq!(header(0, "authorization"), format!("Bearer {OPENAI_KEY}"));
    assert_eq!(header(1, "x-api-key"), ANTHROPIC_KEY);
    assert_eq!(header(1, "anthropic-version"), "2023-06-01");
    for got in &got {
        assert!(!format!("{:?}", got.headers).contains("mine"), "{:?}", got.headers);
    }
    assert_eq!(got[0].body["max_completion_tokens"], 100);
    for hidden in ["set-cookie", "openai-organization"] {
        assert!(!answer.headers.contains_key(hidden), "{:?}", answer.headers);
    }
    assert_eq!(answer.headers["request-id"], "req_1");
    // The shorter paths are the same doors.
    scene.post("/v1/chat/completions", &chat(9, false)).expect(200);
    scene.post("/v1/messages", &messages(9, false)).expect(200);
    let stored =
        scene.post("/v1/responses", &json!({"model": "gpt-5", "input": "x", "store": true}));
    stored.expect(200);
    let last = vendor.take().pop().unwrap();
    assert_eq!(
        (&last.body["store"], &last.body["max_output_tokens"]),
        (&json!(false), &json!(16_384))
    );

    // Several choices cost several times.
    let mut twice = chat(100, false);
    twice["n"] = 2.into();
    scene.costs(20, || {
        scene.post(CHAT, &twice).expect(200);
    });

    // Models: what the provider has, its settings offer, and the invite allows.
    let ids = |path: &str| -> Vec<String> {
        let listed = scene.door().get(path).expect(200);
        let data = listed["data"].as_array().unwrap().iter();
        data.map(|m| tree::text(m, "id").to_owned()).collect()
    };
    assert_eq!(ids("/openai/v1/models"), ["gpt-5", "gpt-5-mini"]);
    assert_eq!(ids("/anthropic/v1/models"), ["claude-sonnet-4"]);
    for (path, model) in
        [(CHAT, "o3"), (CHAT, "gpt-4"), (CHAT, "claude-sonnet-4"), (MESSAGES, "o3")]
    {
        let mut body = if path == CHAT { chat(9, false) } else { messages(9, false) };
        body["model"] = model.into();
        let refused = scene.post(path, &body).expect(404);
        let message = tree::text(&refused["error"], "message");
        assert!(message.contains(model), "{refused}");
    }
    // What is none of the served routes is refused in the vendor's shape, and nobody is asked.
    vendor.take();
    let refused = scene.post("/openai/v1/files", &json!({})).expect(404);
    assert_eq!(refused["error"]["type"], "invalid_request_error");
    let refused = scene.post("/anthropic/v1/messages/batches", &json!({})).expect(404);
    assert_eq!(
        (&refused["type"], &refused["error"]["type"]),
        (&json!("error"), &json!("not_found_error"))
    );
    let mut unknowable = json!({"model": "gpt-5", "input": "x", "previous_response_id": "resp_1"});
    let refused = scene.post(RESPONSES, &unknowable).expect(400);
    assert_eq!(refused["error"]["param"], "previous_response_id", "{refused}");
    unknowable["input"] = "y".repeat(16 * 1024 * 1024).into();
    scene.post(RESPONSES, &unknowable).expect(413);
    let many = format!("[{}1]", "1,".repeat(300_000));
    let sent = scene.door().send(hyper::Method::POST, CHAT, many.into()).unwrap();
    assert_eq!(sent.status, 413);
    assert_eq!(vendor.take().len(), 0);

    // Inside, everything is there but the key.
    let env = house.sh(&scene.machine, "env").text();
    for line in [
        "AEGIS_LLM_URL=http://llm.aegis",
        "OPENAI_BASE_URL=http://llm.aegis/openai/v1",
        "ANTHROPIC_BASE_URL=http://llm.aegis/anthropic",
        "OPENAI_API_KEY=aegis",
        "ANTHROPIC_API_KEY=aegis",
    ] {
        assert!(env.lines().any(|l| l == line), "{line} not in {env}");
    }

    // Each call is in the trail, without a word of what was said.
    let calls = scene.calls();
    assert!(calls.len() >= 10, "{calls:?}");
    assert_eq!(calls[0]["tokens"], "15");
    assert_eq!((&calls[0]["provider"], &calls[0]["model"]), (&json!("openai"), &json!("gpt-5")));
    assert!(calls.iter().all(|c| c["end"] == "ok"), "{calls:?}");

    for (name, key) in [("openai", OPENAI_KEY), ("anthropic", ANTHROPIC_KEY)] {
        assert!(!house.log().contains(key), "the {name} key is in the log");
        for directory in ["data", "run", "instances"] {
            secrets::nowhere_below(&house.home().join(directory), key);
        }
    }
}

#[test]
fn a_kill_or_a_freeze_ends_calls_at_once() {
    let scene = scene(1_000_000, json!({}));
    let Scene { house, vendor, guest, machine } = &scene;
    let endless = chat(10_000, true);
    let begin = || {
        vendor.behave(Manners { forever: true, ignores_limits: true, ..Manners::default() });
        let stream = scene.stream(&endless);
        vendor.until_streaming(1);
        stream
    };
    let over = |mut stream: UnixStream| {
        stream.set_read_timeout(Some(SOON)).unwrap();
        // To its end: nothing more comes.
        let _ = stream.read_to_end(&mut Vec::new());
        vendor.until_streaming(0);
    };
    let running = begin();
    let path = format!("/couch/guests/{guest}");
    house.socket().act(&format!("{path}/freeze")).expect(200);
    over(running);
    // A frozen machine is served no more; thawed it is.
    let knocked = house.knock(machine, &Knock::Llm).ask(hyper::Method::GET, "/v1/models", None);
    assert!(knocked.is_err());
    wait_until("what a freeze cuts is settled", SOON, || scene.spent() >= 10_000);
    let frozen_at = scene.spent();
    house.socket().act(&format!("{path}/thaw")).expect(200);
    house.until_instance(machine, "running");
    house.knock(machine, &Knock::Llm).get("/v1/models").expect(200);

    let running = begin();
    let killed = house.socket().delete(&path).expect(200);
    assert_eq!(killed["status"], "revoked");
    over(running);
    wait_until("it is settled", SOON, || scene.spent() >= frozen_at + 10_000);
    assert!(!house.hatch(machine).exists());
}
