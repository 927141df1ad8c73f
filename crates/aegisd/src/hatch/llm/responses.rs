//! OpenAI's responses.

use serde_json::Value;

use super::chat::check_tools;
use super::draft::{
    Draft, Object, count, flag, inline_image, kind, list, present, unknowable, without,
};
use super::problem::Problem;
use super::stream::{Seen, Verdict};

/// The least limit of the output that the vendor takes.
pub(super) const LEAST_OUTPUT: u64 = 16;

/// What refers to something that lies at the vendor, or goes on there.
const UNKNOWABLE: [&str; 4] =
    ["previous_response_id", "conversation", "prompt", "context_management"];
/// Items that are all in the request.
const ITEMS: [&str; 11] = [
    "",
    "message",
    "function_call",
    "function_call_output",
    "reasoning",
    "custom_tool_call",
    "custom_tool_call_output",
    "local_shell_call",
    "local_shell_call_output",
    "apply_patch_call",
    "apply_patch_call_output",
];
const OUTPUT: &str = "max_output_tokens";

pub(super) fn look(draft: &mut Draft) -> Result<(), Problem> {
    let body = &draft.body;
    without(body, &UNKNOWABLE)?;
    if flag(body, "background")? {
        return Err(unknowable("background"));
    }
    let tools = list(body, "tools")?;
    check_tools(tools)?;
    let (mut messages, mut images) = (1, 0);
    match present(body, "input") {
        None | Some(Value::String(_)) => {}
        Some(Value::Array(items)) => {
            messages += items.len() as u64;
            for item in items {
                images += look_at_item(item)?;
            }
        }
        Some(_) => return Err(Problem::field("input", "must be text or a list")),
    }
    draft.output = count(body, OUTPUT)?;
    (draft.messages, draft.images, draft.tools) = (messages, images, !tools.is_empty());
    Ok(())
}

fn look_at_item(item: &Value) -> Result<u64, Problem> {
    let Value::Object(item) = item else {
        return Err(Problem::field("input", "must hold objects"));
    };
    let kind = item.get("type").and_then(Value::as_str).unwrap_or_default();
    if !ITEMS.contains(&kind) {
        return Err(unknowable(&format!("an input item of type {kind:?}")));
    }
    Ok(parts(item, "content")? + parts(item, "output")?)
}

fn parts(item: &Object, name: &str) -> Result<u64, Problem> {
    let Some(Value::Array(parts)) = item.get(name) else { return Ok(0) };
    let mut images = 0;
    for part in parts {
        match kind(part) {
            "input_text" | "output_text" | "refusal" | "reasoning_text" | "summary_text"
            | "input_audio" | "text" => {}
            "input_image" => {
                let url = part.get("image_url").and_then(Value::as_str).unwrap_or_default();
                inline_image(url, "image_url")?;
                images += 1;
            }
            other => return Err(unknowable(&format!("a part of type {other:?}"))),
        }
    }
    Ok(images)
}

pub(super) fn finish(draft: &mut Draft, output: u64) {
    draft.body.insert(OUTPUT.to_owned(), output.into());
    // What lies at the vendor could be referred to, and is the host's account's.
    draft.body.insert("store".to_owned(), false.into());
}

/// All tokens that a response's `usage` tells of.
pub(super) fn usage(usage: &Value) -> Option<u64> {
    let part = |name: &str| usage.get(name).and_then(Value::as_u64);
    let parts = part("input_tokens")?.saturating_add(part("output_tokens").unwrap_or(0));
    Some(parts.max(part("total_tokens").unwrap_or(0)))
}

/// Looks at one event.
pub(super) fn event(data: &Value, seen: &mut Seen) -> Verdict {
    let kind = kind(data);
    // A summary of thoughts is not what was billed for them.
    if kind.ends_with(".delta") && !kind.contains("summary") {
        match kind.contains("audio") {
            true => seen.output.piece(),
            false => seen.output.text(data.get("delta").and_then(Value::as_str)),
        }
    }
    match kind {
        "response.completed" | "response.incomplete" | "response.failed" => {
            seen.usage = data.pointer("/response/usage").and_then(usage);
            Verdict::End
        }
        _ => Verdict::Pass,
    }
}
