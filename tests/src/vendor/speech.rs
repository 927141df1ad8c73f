//! What the double says: one answer, in the words of each API.

use serde_json::{Value, json};

use super::Manners;

/// Which API is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Api {
    /// `POST chat/completions`
    Chat,
    /// `POST responses`
    Responses,
    /// `POST v1/messages`
    Messages,
}

/// One answer. Each word of it is a token.
pub(super) struct Speech {
    api: Api,
    model: Value,
    prompt: u64,
    /// Words of each choice.
    pub(super) output: u64,
    choices: u64,
    tells_usage: bool,
    exaggerates: u64,
}

fn event(name: &str, data: &Value) -> String {
    match name {
        "" => format!("data: {data}\n\n"),
        _ => format!("event: {name}\ndata: {data}\n\n"),
    }
}

impl Speech {
    pub(super) fn new(api: Api, body: &Value, manners: &Manners) -> Speech {
        let limits = ["max_completion_tokens", "max_tokens", "max_output_tokens"];
        let limit = limits.iter().filter_map(|name| body[*name].as_u64()).min();
        let limit = limit.filter(|_| !manners.ignores_limits).unwrap_or(u64::MAX);
        let usage_asked = match api {
            Api::Chat => body["stream"] != true || body["stream_options"]["include_usage"] == true,
            Api::Responses | Api::Messages => true,
        };
        Speech {
            api,
            model: body["model"].clone(),
            prompt: manners.prompt.unwrap_or(body.to_string().len() as u64 / 4),
            output: manners.output.min(limit),
            choices: body["n"].as_u64().unwrap_or(1),
            tells_usage: usage_asked && !manners.mute,
            exaggerates: manners.exaggerates,
        }
    }

    fn usage(&self) -> Value {
        if !self.tells_usage {
            return Value::Null;
        }
        let output = self.output * self.choices + self.exaggerates;
        match self.api {
            Api::Chat => json!({
                "prompt_tokens": self.prompt, "completion_tokens": output,
                "total_tokens": self.prompt + output,
            }),
            Api::Responses => json!({
                "input_tokens": self.prompt, "output_tokens": output,
                "total_tokens": self.prompt + output,
            }),
            // A part of the input comes from a cache.
            Api::Messages => json!({
                "input_tokens": self.prompt - self.prompt / 2,
                "cache_read_input_tokens": self.prompt / 2,
                "cache_creation_input_tokens": 0, "output_tokens": output,
            }),
        }
    }

    fn text(&self) -> String {
        "word ".repeat(self.output as usize)
    }

    /// All of it in one piece.
    pub(super) fn whole(&self) -> Value {
        let (model, text) = (&self.model, self.text());
        let mut whole = match self.api {
            Api::Chat => {
                let choice = |index| {
                    json!({"index": index, "finish_reason": "stop",
                           "message": {"role": "assistant", "content": text, "refusal": null}})
                };
                let choices: Vec<Value> = (0..self.choices).map(choice).collect();
                json!({"id": "chatcmpl-1", "object": "chat.completion", "created": 1,
                       "model": model, "choices": choices})
            }
            Api::Responses => self.response("completed"),
            Api::Messages => json!({
                "id": "msg_1", "type": "message", "role": "assistant", "model": model,
                "content": [{"type": "text", "text": text}], "stop_reason": "end_turn",
                "stop_sequence": null,
            }),
        };
        if self.tells_usage {
            whole["usage"] = self.usage();
        }
        whole
    }

    fn response(&self, status: &str) -> Value {
        let text = if status == "completed" { self.text() } else { String::new() };
        json!({
            "id": "resp_1", "object": "response", "created_at": 1, "status": status,
            "model": self.model, "parallel_tool_calls": true, "tool_choice": "auto", "tools": [],
            "output": [{"type": "message", "id": "msg_1", "role": "assistant", "status": status,
                        "content": [{"type": "output_text", "text": text, "annotations": []}]}],
        })
    }

    fn chunk(&self, choices: &Value) -> String {
        let usage = Value::Null;
        event(
            "",
            &json!({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1,
                    "model": self.model, "choices": choices, "usage": usage}),
        )
    }

    /// Events before the first word.
    pub(super) fn begin(&self) -> Vec<String> {
        match self.api {
            Api::Chat => {
                vec![
                    self.chunk(&json!([{"index": 0, "delta": {"role": "assistant", "content": ""},
                                         "finish_reason": null}])),
                ]
            }
            Api::Responses => {
                let response = self.response("in_progress");
                vec![event(
                    "response.created",
                    &json!({"type": "response.created", "sequence_number": 0, "response": response}),
                )]
            }
            Api::Messages => {
                let mut message = self.whole();
                message["content"] = json!([]);
                message["stop_reason"] = Value::Null;
                if self.tells_usage {
                    message["usage"]["output_tokens"] = 1.into();
                }
                let block = json!({"type": "content_block_start", "index": 0,
                                   "content_block": {"type": "text", "text": ""}});
                vec![
                    event("message_start", &json!({"type": "message_start", "message": message})),
                    event("content_block_start", &block),
                    event("ping", &json!({"type": "ping"})),
                ]
            }
        }
    }

    /// One more word, of each choice.
    pub(super) fn word(&self, number: u64) -> String {
        match self.api {
            Api::Chat => (0..self.choices)
                .map(|index| {
                    self.chunk(&json!([{"index": index, "delta": {"content": "word "},
                                        "finish_reason": null}]))
                })
                .collect(),
            Api::Responses => event(
                "response.output_text.delta",
                &json!({"type": "response.output_text.delta", "sequence_number": number + 1,
                        "item_id": "msg_1", "output_index": 0, "content_index": 0,
                        "delta": "word ", "logprobs": []}),
            ),
            Api::Messages => event(
                "content_block_delta",
                &json!({"type": "content_block_delta", "index": 0,
                        "delta": {"type": "text_delta", "text": "word "}}),
            ),
        }
    }

    /// Events after the last word.
    pub(super) fn end(&self) -> Vec<String> {
        match self.api {
            Api::Chat => {
                let stop = json!([{"index": 0, "delta": {}, "finish_reason": "stop"}]);
                let mut events = vec![self.chunk(&stop)];
                if self.tells_usage {
                    let last = json!({"id": "chatcmpl-1", "object": "chat.completion.chunk",
                                      "created": 1, "model": self.model, "choices": [],
                                      "usage": self.usage()});
                    events.push(event("", &last));
                }
                events.push("data: [DONE]\n\n".to_owned());
                events
            }
            Api::Responses => {
                let mut response = self.response("completed");
                response["usage"] = self.usage();
                vec![event(
                    "response.completed",
                    &json!({"type": "response.completed", "sequence_number": self.output + 1,
                            "response": response}),
                )]
            }
            Api::Messages => {
                let stop = json!({"type": "content_block_stop", "index": 0});
                let mut delta = json!({"type": "message_delta",
                    "delta": {"stop_reason": "end_turn", "stop_sequence": null}});
                if self.tells_usage {
                    delta["usage"] = json!({"output_tokens": self.usage()["output_tokens"]});
                }
                vec![
                    event("content_block_stop", &stop),
                    event("message_delta", &delta),
                    event("message_stop", &json!({"type": "message_stop"})),
                ]
            }
        }
    }
}
