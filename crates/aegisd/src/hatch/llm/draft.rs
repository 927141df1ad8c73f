//! A call as it came: what of it costs, and what of it is judged. Everything that is not known here is
//! passed on as it is, but for what would make the worst case unknowable.

use aegis_rules::tokens::Ask;
use serde_json::{Map, Value};

use super::problem::Problem;
use super::{chat, messages, responses};
use crate::config::Vendor;

/// Longest name of a model, bytes.
const MODEL_MAX: usize = 200;

/// A JSON object in the order in which it came.
pub(super) type Object = Map<String, Value>;

/// One of the APIs that are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Api {
    /// `POST chat/completions`
    Chat,
    /// `POST responses`
    Responses,
    /// `POST v1/messages`
    Messages,
}

/// A call, parsed.
#[derive(Clone, Debug)]
pub(super) struct Draft {
    pub(super) api: Api,
    /// The body; rewritten before it goes on.
    pub(super) body: Object,
    pub(super) model: String,
    /// Whether events are asked for.
    pub(super) stream: bool,
    pub(super) messages: u64,
    pub(super) images: u64,
    pub(super) tools: bool,
    /// The most that each choice may put out, where the call says so.
    pub(super) output: Option<u64>,
    pub(super) choices: u64,
    /// Whether the client wants to see what the vendor says of usage at the end of a stream.
    pub(super) shows_usage: bool,
}

impl Api {
    pub(super) fn vendor(self) -> Vendor {
        match self {
            Api::Chat | Api::Responses => Vendor::OpenAi,
            Api::Messages => Vendor::Anthropic,
        }
    }

    /// Behind a provider's base URL.
    pub(super) fn path(self) -> &'static str {
        match self {
            Api::Chat => "/chat/completions",
            Api::Responses => "/responses",
            Api::Messages => "/v1/messages",
        }
    }
}

impl Draft {
    /// Looks at a body.
    ///
    /// # Errors
    /// What of it can't be taken.
    pub(super) fn new(api: Api, body: Value) -> Result<Draft, Problem> {
        let Value::Object(body) = body else {
            return Err(Problem::field("the body", "must be a JSON object"));
        };
        let model = body.get("model").and_then(Value::as_str).unwrap_or_default().to_owned();
        let printable = !model.chars().any(char::is_control);
        if model.is_empty() || model.len() > MODEL_MAX || !printable {
            return Err(Problem::field("model", "must be the name of a model"));
        }
        let stream = flag(&body, "stream")?;
        let mut draft = Draft {
            api,
            model,
            stream,
            body,
            messages: 0,
            images: 0,
            tools: false,
            output: None,
            choices: 1,
            shows_usage: true,
        };
        match api {
            Api::Chat => chat::look(&mut draft)?,
            Api::Responses => responses::look(&mut draft)?,
            Api::Messages => messages::look(&mut draft)?,
        }
        Ok(draft)
    }

    /// What it may cost; `default` is the output of a call that does not say how much.
    pub(super) fn ask(&self, default: u64) -> Ask {
        let bytes = serde_json::to_vec(&self.body).map_or(u64::MAX, |b| b.len() as u64);
        let least_output = if self.api == Api::Responses { responses::LEAST_OUTPUT } else { 1 };
        Ask {
            bytes,
            messages: self.messages,
            images: self.images,
            tools: self.tools,
            output: self.output.unwrap_or(default),
            choices: self.choices,
            least_output,
        }
    }

    /// The body that goes on: with the most that it may put out, and telling what it used.
    pub(super) fn finish(mut self, output: u64) -> Vec<u8> {
        match self.api {
            Api::Chat => chat::finish(&mut self, output),
            Api::Responses => responses::finish(&mut self, output),
            Api::Messages => messages::finish(&mut self, output),
        }
        serde_json::to_vec(&self.body).unwrap_or_default()
    }
}

/// A field that is there; `null` is as good as absent.
pub(super) fn present<'a>(of: &'a Object, name: &str) -> Option<&'a Value> {
    of.get(name).filter(|v| !v.is_null())
}

/// `true` or `false`; false where it is absent.
pub(super) fn flag(of: &Object, name: &str) -> Result<bool, Problem> {
    match present(of, name) {
        None => Ok(false),
        Some(value) => value.as_bool().ok_or_else(|| Problem::field(name, "must be true or false")),
    }
}

/// A count from 1 on.
pub(super) fn count(of: &Object, name: &str) -> Result<Option<u64>, Problem> {
    match present(of, name) {
        None => Ok(None),
        Some(value) => match value.as_u64() {
            Some(n) if n > 0 => Ok(Some(n)),
            _ => Err(Problem::field(name, "must be a whole number above 0")),
        },
    }
}

/// The list that a field must be.
pub(super) fn list<'a>(of: &'a Object, name: &str) -> Result<&'a [Value], Problem> {
    match present(of, name) {
        None => Ok(&[]),
        Some(Value::Array(items)) => Ok(items),
        Some(_) => Err(Problem::field(name, "must be a list")),
    }
}

/// Refuses fields whose cost can't be known before the call.
pub(super) fn without(of: &Object, names: &[&str]) -> Result<(), Problem> {
    match names.iter().find(|name| present(of, name).is_some()) {
        None => Ok(()),
        Some(name) => Err(unknowable(name)),
    }
}

/// Why something is refused whose cost can't be known.
pub(super) fn unknowable(param: &str) -> Problem {
    Problem::field(param, "is not served here: what it may cost can't be known before the call")
}

/// The word in `type`.
pub(super) fn kind(of: &Value) -> &str {
    of.get("type").and_then(Value::as_str).unwrap_or_default()
}

/// Counts a picture that is in the request itself; one that is elsewhere can't be judged.
pub(super) fn inline_image(url: &str, param: &str) -> Result<(), Problem> {
    let data = url.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("data:"));
    if data { Ok(()) } else { Err(unknowable(param)) }
}
