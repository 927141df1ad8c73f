//! What LLM calls cost: no budget is passed, whatever vendors, guests and crashes do
//! (contracts/couch.md 6).

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use aegis_tests::house::House;
use aegis_tests::http::Answer;
use aegis_tests::vendor::{Manners, Vendor};
use aegis_tests::{wait_for, wait_until};
use aegis_wire::door::Knock;
use serde_json::{Value, json};

use super::llm::{ANTHROPIC_KEY, CHAT, MESSAGES, RESPONSES, SOON, chat, events, messages, scene};
use super::tree;

#[test]
fn whatever_a_vendor_does_no_more_is_counted_than_was_reserved() {
    let scene = scene(1_000_000, json!({}));
    let vendor = &scene.vendor;
    let chat_worst = scene.reserved_by(CHAT, &chat(50, false));
    let messages_worst = scene.reserved_by(MESSAGES, &messages(50, true));
    let chat_stream_worst = scene.reserved_by(CHAT, &chat(50, true));
    assert!((250..2_000).contains(&chat_worst), "{chat_worst}");
    let behave = |manners: Manners| vendor.behave(manners);
    let usual = Manners::default;

    // It tells nothing, or too much, or breaks off: all that was reserved.
    for manners in [
        Manners { mute: true, ..usual() },
        Manners { exaggerates: 1_000_000, ..usual() },
        Manners { dies_after: Some(2), ..usual() },
    ] {
        behave(manners.clone());
        scene.costs(chat_worst, || {
            scene.post(CHAT, &chat(50, false));
        });
        behave(manners);
        scene.costs(messages_worst, || {
            let _ = scene.door().ask(hyper::Method::POST, MESSAGES, Some(&messages(50, true)));
        });
    }
    // A refusal costs nothing, and comes as the vendor said it, but for the key.
    for status in [400, 401, 429, 500, 529] {
        behave(Manners { status: Some(status), ..usual() });
        scene.costs(0, || {
            let refused = scene.post(CHAT, &chat(50, true)).expect(status);
            assert_eq!(refused["error"]["type"], "them");
            assert!(refused.to_string().contains("[key]"), "{refused}");
            let refused = scene.post(MESSAGES, &messages(50, false)).expect(status);
            assert!(!refused.to_string().contains(ANTHROPIC_KEY), "{refused}");
        });
    }
    behave(Manners { status: Some(302), ..usual() });
    scene.costs(0, || {
        assert_eq!(scene.post(CHAT, &chat(50, false)).expect(502)["error"]["type"], "server_error");
    });

    // A stream without an end is cut where its reservation ends, in the vendor's own words.
    for (path, worst, body) in
        [(CHAT, chat_stream_worst, chat(50, true)), (MESSAGES, messages_worst, messages(50, true))]
    {
        behave(Manners { forever: true, ignores_limits: true, ..usual() });
        scene.costs(worst, || {
            let answer = scene.post(path, &body);
            assert_eq!(answer.status, 200);
            let text = String::from_utf8_lossy(&answer.body).into_owned();
            assert_eq!(text.matches("\"word \"").count(), 50, "{path}");
            let last = events(&answer).pop().unwrap();
            let message = tree::text(&last["error"], "message");
            assert!(message.contains("reserved"), "{last}");
        });
        vendor.until_streaming(0);
    }
    let body = json!({"model": "gpt-5", "input": "x", "max_output_tokens": 50, "stream": true});
    let answer = scene.post(RESPONSES, &body);
    let last = events(&answer).pop().unwrap();
    assert_eq!((&last["type"], &last["code"]), (&json!("error"), &json!("insufficient_quota")));

    // Who leaves pays all of it, and the vendor is left at once.
    behave(Manners { forever: true, ignores_limits: true, output: 1, ..usual() });
    let endless = chat(50_000, true);
    let stream = scene.stream(&endless);
    vendor.until_streaming(1);
    let before = scene.spent();
    drop(stream);
    vendor.until_streaming(0);
    wait_until("it is settled", SOON, || scene.spent() >= before + 50_000);
    // Whenever somebody leaves, nothing stays reserved.
    let short = chat(20, true).to_string();
    for patience in 0..40 {
        let mut stream = UnixStream::connect(scene.house.hatch(&scene.machine)).unwrap();
        write!(
            stream,
            "{{\"door\":\"llm\"}}\nPOST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{short}",
            short.len()
        )
        .unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(1 + patience / 4))).unwrap();
        let _ = stream.read(&mut [0; 1]);
    }
    let path = format!("/v1/instances/{}/envelope", scene.machine);
    let drawn = || scene.house.socket().get(&path).expect(200)["spent"]["tokens"].clone();
    wait_until("all is settled", SOON, || drawn() == json!(scene.spent()));

    let ends: Vec<String> = scene.calls().iter().map(|c| tree::text(c, "end").to_owned()).collect();
    for end in ["ok", "unreported", "refused", "cut", "broken", "left"] {
        assert!(ends.iter().any(|e| e == end), "{end} in {ends:?}");
    }
}

#[test]
fn a_budget_is_exact_under_parallel_calls_and_crashes() {
    let mut scene = scene(6_000, json!({}));
    let worst = scene.reserved_by(CHAT, &chat(100, false));
    let first = scene.spent();
    assert_eq!(first, worst);

    // Sixteen at once: as many begin as what is left holds at their worst, and no more.
    scene.vendor.behave(Manners { output: 100, prompt: Some(10), ..Manners::default() });
    scene.vendor.answers(false);
    scene.vendor.take();
    let fit = ((6_000 - first) / worst) as usize;
    // One more may begin with less output, if what is left holds its prompt.
    let (statuses, during) = std::thread::scope(|scope| {
        let calls: Vec<_> =
            (0..16).map(|_| scope.spawn(|| scene.post(CHAT, &chat(100, false)))).collect();
        let waiting = wait_for("all were judged", SOON, || {
            let done = calls.iter().filter(|c| c.is_finished()).count();
            let held = calls.len() - done;
            (held == fit || held == fit + 1).then_some(held)
        });
        scene.vendor.until_waiting(waiting);
        let during = scene.spent();
        scene.vendor.answers(true);
        let answers: Vec<Answer> = calls.into_iter().map(|c| c.join().unwrap()).collect();
        (answers.into_iter().map(|a| (a.status, a)).collect::<Vec<_>>(), during)
    });
    assert_eq!(during, first, "what is reserved is not spent yet");
    let passed = statuses.iter().filter(|(status, _)| *status == 200).count();
    assert_eq!(passed, scene.vendor.take().len());
    assert!(passed == fit || passed == fit + 1, "{passed} of {fit}");
    for (status, answer) in statuses.iter().filter(|(status, _)| *status != 200) {
        assert_eq!(*status, 429);
        // What runs may leave something: it is no use to give up.
        assert_eq!(answer.headers["x-should-retry"], "true");
        assert_eq!(answer.json()["error"]["code"], "rate_limit_exceeded");
    }
    let spent = scene.spent();
    assert!(spent <= 6_000 && spent > first, "{spent}");
    assert_eq!(scene.house.guest_status(&scene.guest)["limitsExceeded"], false);

    // A daemon that dies in the middle: the vendor may have billed all of it.
    scene.vendor.answers(false);
    let waiting = std::thread::scope(|scope| {
        let call =
            scope.spawn(|| scene.door().ask(hyper::Method::POST, CHAT, Some(&chat(100, false))));
        scene.vendor.until_waiting(1);
        let pid = scene.house.pid();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        call.join().unwrap()
    });
    assert!(waiting.is_err());
    scene.house.kill9();
    scene.vendor.answers(true);
    scene.house.start();
    assert_eq!(scene.spent(), spent + worst);
    let lost = scene.calls().pop().unwrap();
    assert_eq!((&lost["call"], &lost["tokens"]), (&json!("lost"), &json!(worst.to_string())));

    // The machine is adopted, its hatch too; what is left is all that its output may be.
    wait_until("the hatch is open again", SOON, || {
        UnixStream::connect(scene.house.hatch(&scene.machine)).is_ok()
    });
    scene.vendor.behave(Manners { output: 1_000_000, mute: true, ..Manners::default() });
    let left = 6_000 - scene.spent();
    scene.vendor.take();
    scene.costs(left, || {
        scene.post(CHAT, &chat(1_000_000, false)).expect(200);
    });
    let asked = scene.vendor.take().pop().unwrap().body["max_completion_tokens"].as_u64().unwrap();
    assert!(asked < left && asked > left - 500, "{asked} of {left}");

    // Nothing is left: each vendor's own error, which no wait mends, and it is said once.
    let refused = scene.post(CHAT, &chat(9, true));
    assert_eq!(refused.headers["x-should-retry"], "false");
    let body = refused.expect(429);
    assert_eq!(
        (&body["error"]["type"], &body["error"]["code"]),
        (&json!("insufficient_quota"), &json!("insufficient_quota"))
    );
    assert_eq!(body["error"]["param"], Value::Null);
    let message = tree::text(&body["error"], "message");
    assert!(message.contains("6000 of 6000") && message.contains("0 are left"), "{message}");
    let refused = scene.post(MESSAGES, &messages(9, false));
    assert_eq!(refused.headers["x-should-retry"], "false");
    let body = refused.expect(429);
    assert_eq!(
        (&body["type"], &body["error"]["type"]),
        (&json!("error"), &json!("rate_limit_error"))
    );
    assert_eq!(scene.vendor.take().len(), 0, "nobody was asked");
    let now = scene.house.guest_status(&scene.guest);
    assert_eq!(now["resourceUsage"]["tokensUsed"], 6_000, "{now}");
    let trail = tree::trail(&scene.house);
    let exceeded = trail.iter().filter(|e| e["kind"] == "couch.guest.limits_exceeded").count();
    assert_eq!(exceeded, 1);
    let denied = trail.iter().filter(|e| e["kind"] == "instance.denied").count();
    assert!(denied >= 1, "{trail:?}");
}

#[test]
fn a_tree_spends_from_all_of_its_envelopes() {
    let vendor = Vendor::start();
    let house = House::new(&vendor.settings());
    for name in ["OPENAI_API_KEY", "ANTHROPIC_API_KEY"] {
        let body = json!({"value": "sk-host"});
        house.socket().put(&format!("/v1/secrets/{name}"), &body).expect(200);
    }
    let mut body = tree::small(json!({
        "vcpus": 1, "memory_mb": 256, "llm_models": ["gpt-*"],
        "envelope": {"vcpus": 4, "memory_mb": 1024, "disk_gb": 2, "tokens": 3000},
    }));
    body["capabilities"] = tree::rights(1);
    let root = house.socket().post("/v1/instances", &body).expect(201);
    let root = tree::text(&root, "id").to_owned();
    house.until_instance(&root, "running");
    let child = tree::small(json!({"envelope": {"tokens": 1500}}));
    let post = format!("-X POST {}/v1/instances -d '{child}'", tree::API);
    let (status, child) = tree::curl(&house, &root, &post);
    assert_eq!(status, 201, "{child}");
    let child = tree::text(&child, "id").to_owned();
    house.until_instance(&child, "running");

    vendor.behave(Manners { mute: true, ..Manners::default() });
    let ask = |machine: &str, model: &str, output: u64| {
        let mut body = chat(output, false);
        body["model"] = model.into();
        house.knock(machine, &Knock::Llm).post(CHAT, &body)
    };
    // The child's own envelope is the narrower one, and its parent's list holds for it.
    ask(&child, "gpt-5", 500).expect(200);
    assert_eq!(ask(&child, "gpt-5", 1_000).status, 200, "with what is left");
    let refused = ask(&child, "gpt-5", 1_000).expect(429);
    assert!(refused.to_string().contains("1500 of 1500"), "{refused}");
    ask(&child, "claude-sonnet-4", 10).expect(404);
    let room = tree::get(&house, &root, "/v1/self")["envelope"].clone();
    assert_eq!((&room["spent"]["tokens"], &room["left"]["tokens"]), (&json!(1500), &json!(1500)));
    assert_eq!(tree::get(&house, &child, "/v1/self")["envelope"]["left"]["tokens"], 0);
    // What it spent stays spent when it is gone.
    let gone = format!("-X DELETE {}/v1/instances/{child}", tree::API);
    assert_eq!(tree::curl(&house, &root, &gone).0, 200);
    ask(&root, "gpt-5", 100_000).expect(200);
    let refused = ask(&root, "gpt-5", 1).expect(429);
    assert!(refused.to_string().contains("3000 of 3000"), "{refused}");
    let info = house.socket().get(&format!("/v1/instances/{root}")).expect(200);
    assert_eq!(info["usage"]["tokens"], 1500, "its own part: {info}");
}

#[test]
fn with_nothing_left_the_answer_is_out_before_the_freeze_and_more_of_it_thaws() {
    let scene = scene(2_000, json!({"onLimit": "freeze"}));
    scene.vendor.behave(Manners { mute: true, ..Manners::default() });
    scene.post(CHAT, &chat(100_000, false)).expect(200);
    let refused = scene.post(CHAT, &chat(1, false)).expect(429);
    assert_eq!(refused["error"]["code"], "insufficient_quota", "{refused}");
    scene.house.until(&scene.guest, "frozen");
    let status = scene.house.guest_status(&scene.guest);
    assert_eq!(status["limitsExceeded"], true, "{status}");
    assert_eq!(status["violations"], json!(["tokens: 2000/2000"]), "{status}");
    let more = json!({"maxTokenBudget": 10_000});
    let limits = format!("/couch/guests/{}/limits", scene.guest);
    scene.house.socket().put(&limits, &more).expect(200);
    scene.house.until(&scene.guest, "running");
    wait_until("it is served again", SOON, || scene.post(CHAT, &chat(1, false)).status == 200);
    assert_eq!(scene.house.guest_status(&scene.guest)["limitsExceeded"], false);
}
