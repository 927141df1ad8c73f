//! Anthropic's messages.

use serde_json::Value;

use super::draft::{Draft, count, kind, list, present, unknowable, without};
use super::problem::Problem;
use super::stream::{Seen, Verdict};

/// What runs at the vendor.
const UNKNOWABLE: [&str; 2] = ["mcp_servers", "container"];
/// Tools that the client runs; others are the vendor's.
const CLIENTS_TOOLS: [&str; 3] = ["bash_", "text_editor_", "memory_"];
const OUTPUT: &str = "max_tokens";

pub(super) fn look(draft: &mut Draft) -> Result<(), Problem> {
    let body = &draft.body;
    without(body, &UNKNOWABLE)?;
    // Forgetting costs nothing; what is written anew does.
    let edits = present(body, "context_management").and_then(|c| c.get("edits"));
    for edit in edits.and_then(Value::as_array).into_iter().flatten() {
        if !kind(edit).starts_with("clear_") {
            return Err(unknowable(&format!("an edit of type {:?}", kind(edit))));
        }
    }
    let tools = list(body, "tools")?;
    for tool in tools {
        let kind = kind(tool);
        let own = kind.is_empty() || kind == "custom";
        if !own && !CLIENTS_TOOLS.iter().any(|start| kind.starts_with(start)) {
            return Err(unknowable(&format!("a tool of type {kind:?}")));
        }
    }
    let messages = list(body, "messages")?;
    let mut images = match present(body, "system") {
        Some(system) => blocks(system)?,
        None => 0,
    };
    for message in messages {
        images += message.get("content").map_or(Ok(0), blocks)?;
    }
    draft.output = count(body, OUTPUT)?;
    draft.messages = messages.len() as u64 + 1;
    (draft.images, draft.tools) = (images, !tools.is_empty());
    Ok(())
}

/// Looks at content: text, or blocks that are all in the request. Returns its pictures.
fn blocks(content: &Value) -> Result<u64, Problem> {
    let blocks = match content {
        Value::Null | Value::String(_) => return Ok(0),
        Value::Array(blocks) => blocks,
        _ => return Err(Problem::field("content", "must be text or blocks")),
    };
    let mut images = 0;
    for block in blocks {
        let source = block.get("source").map(kind).unwrap_or_default();
        match (kind(block), source) {
            ("text" | "tool_use" | "thinking" | "redacted_thinking", _) => {}
            ("image", "base64") => images += 1,
            ("document", "text") => {}
            ("document", "content") => {
                images += block.pointer("/source/content").map_or(Ok(0), self::blocks)?;
            }
            ("tool_result" | "search_result", _) => {
                images += block.get("content").map_or(Ok(0), self::blocks)?;
            }
            (other, source) => {
                let what = format!("a block of type {other:?} with source {source:?}");
                return Err(unknowable(&what));
            }
        }
    }
    Ok(images)
}

pub(super) fn finish(draft: &mut Draft, output: u64) {
    draft.body.insert(OUTPUT.to_owned(), output.into());
}

/// Names of what a message's `usage` tells of as input.
const INPUT: [&str; 3] = ["input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"];

/// All tokens that a message's `usage` tells of.
pub(super) fn usage(usage: &Value) -> Option<u64> {
    let part = |name: &str| usage.get(name).and_then(Value::as_u64);
    let output = part("output_tokens")?;
    let input = INPUT.iter().fold(0_u64, |sum, name| sum.saturating_add(part(name).unwrap_or(0)));
    Some(input.saturating_add(output))
}

/// Looks at one event. Input is told at the start, output at the end; some tell both again there.
pub(super) fn event(data: &Value, seen: &mut Seen) -> Verdict {
    let mut told = |usage: Option<&Value>| {
        let part = |name: &str| usage.and_then(|u| u.get(name)).and_then(Value::as_u64);
        let parts = INPUT.iter().filter_map(|name| part(name));
        let input = parts.reduce(u64::saturating_add);
        seen.told_input = seen.told_input.max(input);
        seen.told_output = seen.told_output.max(part("output_tokens"));
        part("output_tokens").is_some()
    };
    match kind(data) {
        "message_start" => drop(told(data.pointer("/message/usage"))),
        // Only here it is told what was put out, and without that the rest is as good as nothing.
        "message_delta" if told(data.get("usage")) => {
            let both = seen.told_input.zip(seen.told_output);
            seen.usage = both.map(|(input, output)| input.saturating_add(output));
        }
        "content_block_start" => {
            seen.output.text(data.pointer("/content_block/text").and_then(Value::as_str));
        }
        "content_block_delta" => {
            for path in ["/delta/text", "/delta/partial_json", "/delta/thinking"] {
                seen.output.text(data.pointer(path).and_then(Value::as_str));
            }
        }
        "message_stop" => return Verdict::End,
        _ => {}
    }
    Verdict::Pass
}
