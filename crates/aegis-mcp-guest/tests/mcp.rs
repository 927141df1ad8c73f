//! The program as an agent has it: JSON-RPC lines over its standard input and output, with a double
//! of the guest API behind it on a real socket.
#![allow(clippy::unwrap_used, reason = "a test: what goes wrong here should end it")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use serde_json::{Value, json};

/// What the double was asked.
#[derive(Debug, PartialEq)]
struct Asked {
    line: String,
    body: Value,
}

/// A guest API that knows one child, `work`.
struct Double {
    url: String,
    asked: Receiver<Asked>,
}

impl Double {
    fn start(spawn: bool) -> Double {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (tell, asked) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let tell = tell.clone();
                std::thread::spawn(move || serve(stream.unwrap(), spawn, &tell));
            }
        });
        Double { url, asked }
    }

    fn next(&self) -> Asked {
        self.asked.recv_timeout(Duration::from_secs(10)).unwrap()
    }
}

fn serve(stream: TcpStream, spawn: bool, tell: &Sender<Asked>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let line = line.trim_end().to_owned();
        if line.is_empty() {
            break;
        }
        head.push(line);
    }
    let length = head.iter().find_map(|l| {
        let (name, value) = l.split_once(": ")?;
        name.eq_ignore_ascii_case("content-length").then(|| value.parse::<usize>().unwrap())
    });
    // As the harness has it: other names are refused.
    let host = format!("host: {}", stream.local_addr().unwrap());
    assert!(head.iter().any(|line| line.to_ascii_lowercase() == host), "{head:?}");
    let mut body = vec![0; length.unwrap_or(0)];
    reader.read_exact(&mut body).unwrap();
    let body = serde_json::from_slice(&body).unwrap_or_default();
    let line = head[0].trim_end_matches(" HTTP/1.1").to_owned();
    let (status, answer) = answer(&line, spawn);
    if line != "GET /v1/self" {
        let _ = tell.send(Asked { line, body });
    }
    let mut stream = stream;
    let _ = write!(
        stream,
        "HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        answer.len()
    );
    let _ = stream.write_all(answer.as_bytes());
}

fn answer(line: &str, spawn: bool) -> (u16, String) {
    let entry = |stream: &str, text: &str| {
        json!({"ts": "2026-02-21T00:00:00Z", "stream": stream, "source": "exec", "line": text,
            "instance_id": "inst-01ARZ3NDEKTSV4RRFFQ69G5FAV", "exec_id": "x"})
        .to_string()
            + "\n"
    };
    let (status, value) = match line {
        "GET /v1/self" => (200, json!({"id": "inst-1", "capabilities": {"spawn": spawn}})),
        "POST /v1/instances" if !spawn => (
            403,
            json!({"error": "this instance may not spawn", "code": "capability_denied",
                "rule": "spawn", "requested": "true", "allowed": "false", "hint": "ask the host"}),
        ),
        "POST /v1/instances" => (201, json!({"id": "inst-2", "state": "starting"})),
        "GET /v1/instances" => (200, json!([{"id": "inst-2", "state": "running"}])),
        "POST /v1/instances/work/exec" => {
            // Longer than what comes at once, and than what an agent gets.
            std::thread::sleep(Duration::from_millis(300));
            let mut text = json!({"exec_id": "x", "started_at": "2026-02-21T00:00:00Z"})
                .to_string()
                + "\n"
                + &entry("stderr", "warned");
            for i in 0..3000 {
                text += &entry("stdout", &format!("line {i} of a long output"));
            }
            text += &json!({"exec_id": "x", "exit_code": 7, "done": true}).to_string();
            return (200, text + "\n");
        }
        "GET /v1/instances/work/logs?follow=false&tail=200" => {
            return (200, entry("stdout", "hello") + &entry("stderr", "oh"));
        }
        "POST /v1/instances/work/stop" => (200, json!({"status": "stopped"})),
        "POST /v1/self/keepalive" => (200, json!({"lease_held": true})),
        "DELETE /v1/self/expose/8080" => (200, json!({"status": "unexposed"})),
        _ => (404, json!({"error": "no such instance", "code": "instance_not_found"})),
    };
    (status, value.to_string())
}

/// The program, spoken to as an agent does.
struct Agent {
    child: Child,
    say: Option<ChildStdin>,
    hear: BufReader<ChildStdout>,
    id: u64,
}

impl Agent {
    fn start(url: &str) -> Agent {
        let mut child = Command::new(env!("CARGO_BIN_EXE_aegis-mcp-guest"))
            .env("AEGIS_GUEST_API", url)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let say = child.stdin.take();
        let hear = BufReader::new(child.stdout.take().unwrap());
        Agent { child, say, hear, id: 0 }
    }

    fn greeted(url: &str, version: &str) -> (Agent, Value) {
        let mut agent = Agent::start(url);
        let hello = agent.ask(
            "initialize",
            &json!({"protocolVersion": version, "capabilities": {},
                "clientInfo": {"name": "test", "version": "1"}}),
        );
        agent.tell(&json!({"jsonrpc": "2.0", "method": "notifications/initialized"}));
        (agent, hello["result"].clone())
    }

    fn tell(&mut self, message: &Value) {
        writeln!(self.say.as_mut().unwrap(), "{message}").unwrap();
    }

    fn hear(&mut self) -> Option<Value> {
        let mut line = String::new();
        self.hear.read_line(&mut line).unwrap();
        serde_json::from_str(&line).ok()
    }

    fn ask(&mut self, method: &str, params: &Value) -> Value {
        self.id += 1;
        let id = self.id;
        self.tell(&json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params}));
        let answer = self.hear().unwrap();
        assert_eq!(answer["id"], id);
        answer
    }

    fn call(&mut self, tool: &str, arguments: &Value) -> Value {
        let params = json!({"name": tool, "arguments": arguments});
        self.ask("tools/call", &params)["result"].clone()
    }

    fn tools(&mut self) -> Vec<String> {
        let tools = self.ask("tools/list", &json!({}));
        let tools = tools["result"]["tools"].as_array().unwrap().iter();
        tools.map(|tool| tool["name"].as_str().unwrap().to_owned()).collect()
    }

    /// Its standard input ends.
    fn leave(&mut self) {
        self.say = None;
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_instance_sees_the_tools_that_it_may_use() {
    let with = Double::start(true);
    let without = Double::start(false);
    for version in ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"] {
        let (mut agent, hello) = Agent::greeted(&with.url, version);
        assert_eq!(hello["protocolVersion"], version);
        assert_eq!(hello["serverInfo"]["name"], "aegis-guest");
        assert_eq!(agent.tools().len(), 13);
        let words = hello["instructions"].as_str().unwrap().to_owned();
        assert!(agent.tools().iter().all(|tool| words.contains(tool.as_str())), "{words}");
        let (mut agent, hello) = Agent::greeted(&without.url, version);
        assert_eq!(agent.tools().len(), 6);
        assert!(!hello["instructions"].as_str().unwrap().contains("instance_exec"));
    }
}

#[test]
fn calls_reach_the_api_and_answers_come_back() {
    let double = Double::start(true);
    let (mut agent, _) = Agent::greeted(&double.url, "2025-06-18");
    let ask = json!({"command": ["sleep", "1"], "exposes": [8080], "memory_mb": 256,
        "capabilities": {"spawn": false}});
    let spawned = agent.call("instance_spawn", &ask);
    assert_eq!(spawned["structuredContent"], json!({"id": "inst-2", "state": "starting"}));
    assert_eq!(double.next(), Asked { line: "POST /v1/instances".into(), body: ask });
    let listed = agent.call("instance_list", &json!({}));
    assert_eq!(listed["structuredContent"]["instances"][0]["id"], "inst-2");
    // Clients that know no structured content read the text.
    let text = listed["content"][0]["text"].as_str().unwrap();
    let text: Value = serde_json::from_str(text).unwrap();
    assert_eq!(text, listed["structuredContent"]);
    double.next();
    agent.call("keepalive_acquire", &json!({"reason": "build"}));
    assert_eq!(double.next().body, json!({"ttl_ms": 300_000, "reason": "build"}));
    let ended = agent.call("unexpose_port", &json!({"guest_port": 8080}));
    assert_eq!(ended["structuredContent"]["status"], "unexposed");
    double.next();
    agent.call("instance_info", &json!({"id": "../self"}));
    assert_eq!(double.next().line, "GET /v1/instances/..%2Fself");
}

#[test]
fn a_denial_is_a_tool_error_with_its_rule() {
    let double = Double::start(false);
    let (mut agent, _) = Agent::greeted(&double.url, "2024-11-05");
    let denied = agent.call("instance_spawn", &json!({"command": ["true"]}));
    assert_eq!(denied["isError"], true);
    let text = denied["content"][0]["text"].as_str().unwrap();
    let body: Value = serde_json::from_str(text).unwrap();
    assert_eq!((&body["rule"], &body["hint"]), (&json!("spawn"), &json!("ask the host")));
    let wrong = agent.call("instance_spawn", &json!({"comand": ["true"]}));
    assert_eq!(wrong["isError"], true);
    assert_eq!(wrong["structuredContent"]["code"], "invalid_arguments");
    let unknown = agent.ask("tools/call", &json!({"name": "format_disk", "arguments": {}}));
    assert!(unknown["error"]["message"].as_str().unwrap().contains("format_disk"));
}

#[test]
fn an_api_that_is_not_there_is_said() {
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (mut agent, _) = Agent::greeted(&format!("http://{gone}"), "2025-06-18");
    assert_eq!(agent.tools().len(), 6);
    let told = agent.call("self_info", &json!({}));
    assert_eq!(told["isError"], true);
    assert_eq!(told["structuredContent"]["code"], "unreachable");
}

#[test]
fn output_is_bounded_and_its_exit_code_comes() {
    let double = Double::start(true);
    let (mut agent, _) = Agent::greeted(&double.url, "2025-06-18");
    let done = agent.call("instance_exec", &json!({"id": "work", "command": ["make"]}));
    let said = &done["structuredContent"];
    assert_eq!(done["isError"], false);
    assert_eq!((&said["exit_code"], &said["stderr"]), (&json!(7), &json!("warned\n")));
    assert_eq!(said["truncated"], true);
    let out = said["stdout"].as_str().unwrap();
    assert!(out.starts_with("line 0 of") && out.ends_with("line 2999 of a long output\n"));
    assert!(out.contains("bytes left out") && out.len() < 66_000);
    assert_eq!(double.next().body, json!({"command": ["make"], "timeout_secs": 600}));
    let logs = agent.call("instance_logs", &json!({"id": "work"}));
    let lines = &logs["structuredContent"]["lines"];
    assert_eq!(lines[1], "2026-02-21T00:00:00Z exec/stderr oh".replace("00Z", "00.000Z"));
}

#[test]
fn what_came_before_the_end_is_answered_then_it_ends() {
    let double = Double::start(true);
    let (mut agent, _) = Agent::greeted(&double.url, "2025-06-18");
    let call = |id: u64, tool: &str, arguments: Value| {
        json!({"jsonrpc": "2.0", "id": id, "method": "tools/call",
            "params": {"name": tool, "arguments": arguments}})
    };
    agent.tell(&call(71, "instance_exec", json!({"id": "work", "command": ["make"]})));
    agent.tell(&call(72, "instance_stop", json!({"id": "work"})));
    agent.leave();
    let mut ids = [agent.hear().unwrap(), agent.hear().unwrap()].map(|a| a["id"].as_u64().unwrap());
    ids.sort_unstable();
    assert_eq!(ids, [71, 72]);
    assert!(agent.hear().is_none());
    assert!(agent.child.wait().unwrap().success());
}

#[test]
fn it_ends_with_an_agent_that_says_nothing() {
    let double = Double::start(true);
    let mut agent = Agent::start(&double.url);
    agent.leave();
    assert!(agent.child.wait().unwrap().success());
}
