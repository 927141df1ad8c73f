//! What calls are judged to be, and what is seen of their answers.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::draft::{Api, Draft};
use super::problem::{Kind, Problem};
use super::stream::{Output, Seen, Verdict};
use super::*;

fn draft(api: Api, body: Value) -> Result<Draft, Problem> {
    Draft::new(api, body)
}

fn sent(api: Api, body: Value, output: u64) -> Value {
    serde_json::from_slice(&draft(api, body).unwrap().finish(output)).unwrap()
}

fn with(api: Api, more: Value) -> Value {
    let mut body = match api {
        Api::Chat => json!({"model": "gpt-5", "messages": [{"role": "user", "content": "hi"}]}),
        Api::Responses => json!({"model": "gpt-5", "input": "hi"}),
        Api::Messages => json!({
            "model": "claude", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}],
        }),
    };
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

#[test]
fn what_can_not_be_counted_before_is_refused_by_name() {
    let parts = |part: Value| json!({"messages": [{"role": "user", "content": [part]}]});
    let item = |item: Value| json!({"input": [item]});
    for (api, more, word) in [
        (Api::Chat, json!({"web_search_options": {}}), "web_search_options"),
        (Api::Chat, json!({"tools": [{"type": "web_search"}]}), "web_search"),
        (Api::Chat, parts(json!({"type": "file", "file": {"file_id": "f"}})), "file"),
        (
            Api::Chat,
            parts(json!({"type": "image_url", "image_url": {"url": "https://x.example/a.png"}})),
            "image_url",
        ),
        (Api::Chat, parts(json!({"type": "image_url", "image_url": "HTTP://x"})), "image_url"),
        (Api::Chat, json!({"n": 129}), "n"),
        (Api::Chat, json!({"max_tokens": 0}), "max_tokens"),
        (Api::Chat, json!({"max_tokens": 1.5}), "max_tokens"),
        (Api::Chat, json!({"model": ""}), "model"),
        (Api::Chat, json!({"stream": "yes"}), "stream"),
        (Api::Chat, json!({"messages": {"role": "user"}}), "messages"),
        (Api::Responses, json!({"previous_response_id": "resp_1"}), "previous_response_id"),
        (Api::Responses, json!({"conversation": "conv_1"}), "conversation"),
        (Api::Responses, json!({"background": true}), "background"),
        (Api::Responses, json!({"prompt": {"id": "pmpt_1"}}), "prompt"),
        (Api::Responses, json!({"tools": [{"type": "file_search"}]}), "file_search"),
        (Api::Responses, json!({"tools": [{"type": "code_interpreter"}]}), "code_interpreter"),
        (Api::Responses, json!({"tools": [{"type": "computer_use_preview"}]}), "computer"),
        (Api::Responses, json!({"tools": [{"type": "mcp"}]}), "mcp"),
        (Api::Responses, json!({"tools": [{"type": "image_generation"}]}), "image_generation"),
        (Api::Responses, item(json!({"type": "item_reference", "id": "x"})), "item_reference"),
        (
            Api::Responses,
            item(json!({"role": "user", "content": [{"type": "input_file", "file_id": "f"}]})),
            "input_file",
        ),
        (
            Api::Responses,
            item(json!({"role": "user", "content": [{"type": "input_image", "file_id": "f"}]})),
            "image_url",
        ),
        (Api::Messages, json!({"tools": [{"type": "web_search_20250305"}]}), "web_search"),
        (Api::Messages, json!({"tools": [{"type": "code_execution_20250522"}]}), "code_execution"),
        (Api::Messages, json!({"mcp_servers": [{"url": "https://x"}]}), "mcp_servers"),
        (
            Api::Messages,
            parts(json!({"type": "image", "source": {"type": "url", "url": "https://x"}})),
            "image",
        ),
        (
            Api::Messages,
            parts(json!({"type": "document", "source": {"type": "file", "file_id": "f"}})),
            "document",
        ),
        (
            Api::Messages,
            parts(json!({"type": "tool_result", "content": [
                {"type": "image", "source": {"type": "url", "url": "https://x"}}
            ]})),
            "image",
        ),
    ] {
        let problem = draft(api, with(api, more.clone())).expect_err(&more.to_string());
        assert_eq!(problem.kind, Kind::Invalid);
        assert!(problem.message.contains(word), "{more}: {}", problem.message);
    }
    assert_eq!(draft(Api::Chat, json!([])).unwrap_err().kind, Kind::Invalid);
}

#[test]
fn what_the_client_does_itself_is_taken() {
    let image = json!({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}});
    let messages = json!([{"role": "user", "content": [{"type": "text", "text": "x"}, image]}]);
    let tools = json!([{"type": "function", "function": {"name": "web_search"}}]);
    let taken = draft(
        Api::Chat,
        with(Api::Chat, json!({"messages": messages, "tools": tools, "n": 3, "max_tokens": 9})),
    )
    .unwrap();
    assert_eq!((taken.images, taken.tools, taken.choices, taken.output), (1, true, 3, Some(9)));
    let taken = draft(
        Api::Responses,
        with(
            Api::Responses,
            json!({
                "background": false, "previous_response_id": null, "tools": [{"type": "custom"}],
                "input": [
                    {"role": "user", "content": "x"},
                    {"type": "function_call_output", "call_id": "c", "output": "{\"file_id\": 1}"},
                ],
            }),
        ),
    )
    .unwrap();
    assert_eq!((taken.messages, taken.tools, taken.output), (3, true, None));
    // Names inside of a tool's own input are the client's.
    let used = json!({"type": "tool_use", "id": "t", "name": "n", "input": {"type": "image",
                      "source": {"type": "url"}, "file_id": "f"}});
    let taken = draft(
        Api::Messages,
        with(
            Api::Messages,
            json!({
                "messages": [{"role": "assistant", "content": [used]}],
                "tools": [{"name": "x"}, {"type": "bash_20250124", "name": "bash"}],
                "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]},
            }),
        ),
    )
    .unwrap();
    assert_eq!((taken.messages, taken.output), (2, Some(100)));
}

#[test]
fn the_output_is_limited_and_the_rest_goes_on_as_it_came() {
    let body = json!({
        "model": "gpt-5", "stream": true, "stream_options": {"other": 1}, "zeta": {"b": 1, "a": 2},
        "messages": [{"role": "user", "content": "hi"}], "max_tokens": 50,
    });
    let went = sent(Api::Chat, body, 7);
    assert_eq!(went["max_tokens"], 7);
    assert_eq!(went.get("max_completion_tokens"), None);
    assert_eq!(went["stream_options"], json!({"other": 1, "include_usage": true}));
    // A schema's order is the order in which a model fills it.
    assert!(went.to_string().contains(r#""zeta":{"b":1,"a":2}"#), "{went}");
    assert_eq!(sent(Api::Chat, with(Api::Chat, json!({})), 7)["max_completion_tokens"], 7);
    let both = json!({"max_tokens": 4, "max_completion_tokens": 9});
    assert_eq!(draft(Api::Chat, with(Api::Chat, both)).unwrap().output, Some(4));
    let went = sent(Api::Responses, with(Api::Responses, json!({"store": true})), 7);
    assert_eq!((&went["store"], &went["max_output_tokens"]), (&json!(false), &json!(7)));
    assert_eq!(sent(Api::Messages, with(Api::Messages, json!({})), 7)["max_tokens"], 7);
}

#[test]
fn a_name_that_is_said_twice_is_one() {
    let text = r#"{"model":"gpt-5","max_tokens":1,"messages":[],"max_tokens":9,
                   "tools":[{"type":"web_search","type":"function"}]}"#;
    let draft = draft(Api::Chat, serde_json::from_str(text).unwrap()).unwrap();
    assert_eq!(draft.output, Some(9));
    let went = String::from_utf8(draft.finish(9)).unwrap();
    assert_eq!(went.matches("max_tokens").count(), 1, "{went}");
    assert!(!went.contains("web_search"), "what was judged is what goes on: {went}");
}

#[test]
fn output_is_never_counted_far_above_the_truth() {
    let mut output = Output::default();
    for _ in 0..10 {
        output.text(Some("word"));
    }
    output.text(Some(""));
    output.text(None);
    assert_eq!(output.tokens(), 10, "a piece is a token");
    output.text(Some(&"x".repeat(800)));
    assert_eq!(output.tokens(), 105, "a long piece is many");
    let mut letters = Output::default();
    (0..300).for_each(|_| letters.text(Some("x")));
    assert_eq!(letters.tokens(), 100, "a letter is less than a token");
}

#[test]
fn streams_are_understood() {
    let mut seen = Seen::default();
    let delta = json!({"choices": [{"delta": {"content": "some", "tool_calls": [
        {"function": {"name": "fetch", "arguments": "{}"}}], "reasoning": "so",
        "reasoning_content": "so"}}], "usage": null});
    assert_eq!(chat::event(&delta, &mut seen, false), Verdict::Pass);
    assert_eq!(seen.output.tokens(), 4);
    let last = json!({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}});
    assert_eq!(chat::event(&last, &mut seen, false), Verdict::Hide);
    assert_eq!(chat::event(&last, &mut seen, true), Verdict::Pass);
    assert_eq!(seen.usage, Some(7));

    let mut seen = Seen::default();
    for (event, verdict) in [
        (json!({"type": "response.output_text.delta", "delta": "abc"}), Verdict::Pass),
        (json!({"type": "response.reasoning_summary_text.delta", "delta": "abc"}), Verdict::Pass),
        (
            json!({"type": "response.incomplete",
                   "response": {"usage": {"input_tokens": 5, "output_tokens": 6, "total_tokens": 12}}}),
            Verdict::End,
        ),
    ] {
        assert_eq!(responses::event(&event, &mut seen), verdict);
    }
    assert_eq!((seen.output.tokens(), seen.usage), (1, Some(12)));

    let mut seen = Seen::default();
    for (event, verdict) in [
        (
            json!({"type": "message_start", "message": {"usage": {
                "input_tokens": 10, "cache_read_input_tokens": 5, "output_tokens": 1}}}),
            Verdict::Pass,
        ),
        (
            json!({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "hi"}}),
            Verdict::Pass,
        ),
        (json!({"type": "message_delta", "usage": {"output_tokens": 9}}), Verdict::Pass),
        (json!({"type": "message_stop"}), Verdict::End),
    ] {
        assert_eq!(messages::event(&event, &mut seen), verdict);
    }
    assert_eq!((seen.output.tokens(), seen.usage), (1, Some(24)));
}

#[test]
fn paths_find_their_provider() {
    let provider = |name: &str, vendor| Provider {
        name: name.parse().unwrap(),
        vendor,
        base_url: "http://x".to_owned(),
        secret: None,
        models: Default::default(),
        output: 1,
    };
    let all = [
        provider("anthropic", Vendor::Anthropic),
        provider("local", Vendor::OpenAi),
        provider("openai", Vendor::OpenAi),
    ];
    let find = |method: Method, path: &str| {
        route(&all, &method, path)
            .map(|(provider, wish)| (provider.name.to_string(), wish))
            .map_err(|(vendor, problem)| (vendor, problem.kind))
    };
    for (method, path, name, wish) in [
        (Method::POST, "/openai/v1/chat/completions", "openai", Wish::Call(Api::Chat)),
        (Method::POST, "/openai/responses", "openai", Wish::Call(Api::Responses)),
        (Method::POST, "/anthropic/v1/messages", "anthropic", Wish::Call(Api::Messages)),
        (Method::POST, "/v1/chat/completions", "local", Wish::Call(Api::Chat)),
        (Method::POST, "/v1/messages", "anthropic", Wish::Call(Api::Messages)),
        (Method::GET, "/v1/models", "local", Wish::Models),
        (Method::GET, "/anthropic/v1/models", "anthropic", Wish::Models),
    ] {
        assert_eq!(find(method, path), Ok((name.to_owned(), wish)), "{path}");
    }
    for (method, path, vendor) in [
        (Method::GET, "/openai/v1/files", Vendor::OpenAi),
        (Method::POST, "/openai/v1/messages", Vendor::OpenAi),
        (Method::POST, "/anthropic/v1/messages/batches", Vendor::Anthropic),
        (Method::POST, "/anthropic/v1/chat/completions", Vendor::Anthropic),
        (Method::GET, "/openai/v1/chat/completions", Vendor::OpenAi),
        (Method::POST, "/openai/v1/../files", Vendor::OpenAi),
        (Method::POST, "/", Vendor::OpenAi),
    ] {
        assert_eq!(find(method, path), Err((vendor, Kind::NoRoute)), "{path}");
    }
    assert!(route(&[], &Method::GET, "/v1/models").is_err());
}

/// JSON as somebody writes it who knows which names matter.
fn any_json() -> impl Strategy<Value = Value> {
    let word = prop::sample::select(vec![
        "model",
        "messages",
        "input",
        "content",
        "type",
        "text",
        "image_url",
        "url",
        "tools",
        "n",
        "stream",
        "max_tokens",
        "max_output_tokens",
        "stream_options",
        "include_usage",
        "source",
        "function",
        "tool_result",
        "data:x",
        "http://x",
        "message",
        "base64",
        "image",
        "system",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        word.clone().prop_map(Value::from),
    ];
    leaf.prop_recursive(5, 48, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec((word.clone(), inner), 0..6).prop_map(|pairs| {
                pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
            }),
        ]
    })
}

proptest! {
    /// What goes on is an object with the limit, which is judged as what came was.
    #[test]
    fn what_goes_on_is_what_was_judged(more in any_json(), output in 1..u64::MAX) {
        for (api, limit) in [
            (Api::Chat, "max_completion_tokens"),
            (Api::Responses, "max_output_tokens"),
            (Api::Messages, "max_tokens"),
        ] {
            // Whatever it is, it is judged.
            let _ = draft(api, more.clone());
            let mut body = more.clone();
            if !body.is_object() {
                body = json!({"content": body});
            }
            body["model"] = "gpt-5".into();
            let Ok(judged) = draft(api, body) else { continue };
            let (images, tools, choices) = (judged.images, judged.tools, judged.choices);
            let went: Value = serde_json::from_slice(&judged.finish(output)).unwrap();
            prop_assert!(went[limit] == output || went["max_tokens"] == output);
            let again = draft(api, went).unwrap();
            prop_assert_eq!(again.output, Some(output));
            prop_assert_eq!((again.images, again.tools, again.choices), (images, tools, choices));
        }
    }

    /// No bytes of a vendor are lost, doubled or held for ever.
    #[test]
    fn events_hold_all_bytes(bytes in "[ad:\\r\\n]{0,200}", size in 1..20_usize) {
        let mut events = sse::Events::default();
        let mut all = Vec::new();
        for piece in bytes.as_bytes().chunks(size) {
            events.push(piece);
            while let Some(event) = events.next() {
                prop_assert!(event.raw.ends_with(b"\n"));
                all.extend_from_slice(&event.raw);
            }
        }
        all.extend_from_slice(&events.rest());
        prop_assert_eq!(all, bytes.as_bytes());
    }
}
