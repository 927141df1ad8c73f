//! OpenAI's chat completions.

use serde_json::{Value, json};

use super::draft::{Draft, count, flag, inline_image, kind, list, present, unknowable, without};
use super::problem::Problem;
use super::stream::{Seen, Verdict};

/// Choices of one call.
const CHOICES_MAX: u64 = 128;
/// Fields with which the vendor searches by itself.
const UNKNOWABLE: [&str; 1] = ["web_search_options"];
/// Where the limit of the output stands.
const LIMITS: [&str; 2] = ["max_completion_tokens", "max_tokens"];

pub(super) fn look(draft: &mut Draft) -> Result<(), Problem> {
    let body = &draft.body;
    without(body, &UNKNOWABLE)?;
    let messages = list(body, "messages")?;
    let mut images = 0;
    for message in messages {
        // An answer that lies at the vendor, of any length.
        if message.get("audio").is_some_and(|audio| !audio.is_null()) {
            return Err(unknowable("audio of an earlier answer"));
        }
        match message.get("content") {
            None | Some(Value::Null | Value::String(_)) => {}
            Some(Value::Array(parts)) => {
                for part in parts {
                    images += look_at_part(part)?;
                }
            }
            Some(_) => return Err(Problem::field("messages.content", "must be text or parts")),
        }
    }
    let tools = list(body, "tools")?;
    check_tools(tools)?;
    let functions = list(body, "functions")?;
    let limits = [count(body, LIMITS[0])?, count(body, LIMITS[1])?];
    let choices = count(body, "n")?.unwrap_or(1);
    if choices > CHOICES_MAX {
        return Err(Problem::field("n", "must be from 1 to 128"));
    }
    let shows_usage = match present(body, "stream_options") {
        None => false,
        Some(Value::Object(options)) => flag(options, "include_usage")?,
        Some(_) => return Err(Problem::field("stream_options", "must be an object")),
    };
    draft.messages = messages.len() as u64;
    draft.tools = !tools.is_empty() || !functions.is_empty();
    draft.output = limits.into_iter().flatten().min();
    (draft.images, draft.choices, draft.shows_usage) = (images, choices, shows_usage);
    Ok(())
}

fn look_at_part(part: &Value) -> Result<u64, Problem> {
    match kind(part) {
        "text" | "refusal" | "input_audio" => Ok(0),
        "image_url" => {
            let url = part.pointer("/image_url/url").and_then(Value::as_str).unwrap_or_default();
            inline_image(url, "image_url").map(|()| 1)
        }
        other => Err(unknowable(&format!("a part of type {other:?}"))),
    }
}

/// Functions are called by the client; other tools are the vendor's, and it is known to nobody how
/// often.
pub(super) fn check_tools(tools: &[Value]) -> Result<(), Problem> {
    let clients = ["function", "custom", "local_shell", "apply_patch"];
    match tools.iter().map(kind).find(|kind| !clients.contains(kind)) {
        None => Ok(()),
        Some(other) => Err(unknowable(&format!("a tool of type {other:?}"))),
    }
}

pub(super) fn finish(draft: &mut Draft, output: u64) {
    let body = &mut draft.body;
    let mut said = false;
    for name in LIMITS {
        if present(body, name).is_some() {
            body.insert(name.to_owned(), output.into());
            said = true;
        }
    }
    if !said {
        body.insert(LIMITS[0].to_owned(), output.into());
    }
    if draft.stream {
        let options = body.entry("stream_options").or_insert(Value::Null);
        match options {
            Value::Object(options) => {
                options.insert("include_usage".to_owned(), true.into());
            }
            other => *other = json!({"include_usage": true}),
        }
    }
}

/// All tokens that an answer's `usage` tells of.
pub(super) fn usage(usage: &Value) -> Option<u64> {
    let part = |name: &str| usage.get(name).and_then(Value::as_u64);
    let parts = part("prompt_tokens")?.saturating_add(part("completion_tokens").unwrap_or(0));
    // Some tell of thoughts in the sum only.
    Some(parts.max(part("total_tokens").unwrap_or(0)))
}

/// Looks at one chunk.
pub(super) fn event(data: &Value, seen: &mut Seen, shows_usage: bool) -> Verdict {
    let choices = data.get("choices").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    for delta in choices.iter().filter_map(|choice| choice.get("delta")) {
        let text = |name: &str| delta.get(name).and_then(Value::as_str);
        seen.output.text(text("content"));
        seen.output.text(text("refusal"));
        // Thoughts have two names; some say them under both.
        seen.output.text(text("reasoning_content").or(text("reasoning")));
        let calls = delta.get("tool_calls").and_then(Value::as_array);
        for call in calls.into_iter().flatten() {
            for path in ["/function/name", "/function/arguments", "/custom/input"] {
                seen.output.text(call.pointer(path).and_then(Value::as_str));
            }
        }
        let call = delta.get("function_call");
        seen.output.text(call.and_then(|c| c.get("arguments")).and_then(Value::as_str));
        if delta.get("audio").is_some_and(|audio| !audio.is_null()) {
            seen.output.piece();
        }
    }
    let told = data.get("usage").filter(|u| !u.is_null()).and_then(usage);
    if let (Some(told), true) = (told, choices.is_empty()) {
        seen.usage = Some(told);
        return if shows_usage { Verdict::Pass } else { Verdict::Hide };
    }
    Verdict::Pass
}
