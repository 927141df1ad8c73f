//! What an answer of the cloud means. It has three error envelopes and two kinds of plain text
//! (contracts/vers.md 4): which it is is decided by status and by how the body begins, and only then is
//! anything parsed.
//!
//! ```text
//! idempotent ──▶ asked again, a few times, with Retry-After honoured
//! create     ──▶ Made | Refused: nothing was made | Unclear: look before another is asked for
//! delete     ──▶ 200, 404: gone. 403 Forbidden as JSON: gone, if the key still passes a list.
//!                409: it sleeps; wake it, then delete. Text 403: always the key
//! ```

use std::time::Duration;

use aegis_wire::vers::{AppError, FORBIDDEN, VmId};
use aegis_wire::words::Uuid;
use serde::de::DeserializeOwned;

/// Longest text of the cloud that is shown, characters.
const SHOWN_MAX: usize = 200;
/// An idempotent request is sent so often at most.
pub const TRIES: u32 = 3;
/// The first pause before another try, where the cloud names none.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Who is told to come back later than this, is told so at once.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Body, as it came.
    pub body: Vec<u8>,
    /// `Retry-After` or `Retry-After-Ms`.
    pub retry_after: Option<Duration>,
}

/// Why there is nothing to go on with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Nothing was sent.
    #[error("the vers API can't be reached: {0}")]
    Unreachable(String),
    /// It was sent, and no whole answer came.
    #[error("the vers API gave no whole answer: {0}")]
    Broken(String),
    /// The key is not accepted.
    #[error("the vers API does not accept the key (VERS_API_KEY)")]
    Auth,
    /// Too many requests.
    #[error("the vers API limits requests; again in {} ms", .0.as_millis())]
    Limited(Duration),
    /// There is no such thing.
    #[error("not found: {0}")]
    NotFound(String),
    /// It is not the asker's, or there is no such thing; the key may be fine.
    #[error("the vers API forbids it: {0}")]
    Forbidden(String),
    /// Not in this state.
    #[error("the vers API says that it is in no state for that: {0}")]
    Conflict(String),
    /// The request is at fault.
    #[error("the vers API refuses ({status}): {text}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// What it says.
        text: String,
    },
    /// The cloud is at fault.
    #[error("the vers API failed ({status}): {text}")]
    Failed {
        /// HTTP status.
        status: u16,
        /// What it says.
        text: String,
        /// When to ask again, where it says so.
        after: Option<Duration>,
    },
    /// A success that can't be read.
    #[error("the vers API said something else than it should: {0}")]
    Unreadable(String),
}

impl Failure {
    /// How long the cloud asks to be left alone.
    pub fn after(&self) -> Option<Duration> {
        match self {
            Failure::Limited(after) => Some(*after),
            Failure::Failed { after, .. } => *after,
            _ => None,
        }
    }
}

/// How a create came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Created {
    /// This was made.
    Made(Uuid),
    /// Nothing was made.
    Refused(Failure),
    /// Something may have been made, or may yet be: look.
    Unclear(Failure),
}

/// How a delete came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Deleted {
    /// It is gone; a list will show it.
    Gone,
    /// It is gone if the key still passes a list, else the key is at fault.
    GoneIfKeyPasses,
    /// It sleeps: wake it, and delete it then.
    Asleep,
}

/// Takes a success as it is, and anything else for what it means.
pub fn judge(answer: &Answer) -> Result<&[u8], Failure> {
    let text = || said(&answer.body);
    match answer.status {
        200..=299 => Ok(&answer.body),
        401 => Err(Failure::Auth),
        403 if !is_json(&answer.body) => Err(Failure::Auth),
        403 => Err(Failure::Forbidden(text())),
        404 => Err(Failure::NotFound(text())),
        409 => Err(Failure::Conflict(text())),
        429 => Err(Failure::Limited(answer.retry_after.unwrap_or(Duration::from_secs(1)))),
        status @ (408 | 500..=599) => {
            Err(Failure::Failed { status, text: text(), after: answer.retry_after })
        }
        status => Err(Failure::Refused { status, text: text() }),
    }
}

/// Reads a success.
pub fn read<T: DeserializeOwned>(answer: &Answer) -> Result<T, Failure> {
    let body = judge(answer)?;
    serde_json::from_slice(body).map_err(|e| Failure::Unreadable(e.to_string()))
}

/// Reads the answer to a create. Only what says for certain that nothing was made is a refusal.
pub fn created(answered: Result<Answer, Failure>) -> Created {
    let failure = match answered.and_then(|answer| read::<VmId>(&answer)) {
        Ok(made) => return Created::Made(made.vm_id),
        Err(failure) => failure,
    };
    match failure {
        Failure::Unreachable(_)
        | Failure::Auth
        | Failure::Limited(_)
        | Failure::NotFound(_)
        | Failure::Forbidden(_)
        | Failure::Conflict(_)
        | Failure::Refused { .. } => Created::Refused(failure),
        Failure::Broken(_) | Failure::Failed { .. } | Failure::Unreadable(_) => {
            Created::Unclear(failure)
        }
    }
}

/// Reads the answer to a delete.
pub fn deleted(answer: &Answer) -> Result<Deleted, Failure> {
    match judge(answer) {
        Ok(_) | Err(Failure::NotFound(_)) => Ok(Deleted::Gone),
        Err(Failure::Forbidden(text)) if text == FORBIDDEN => Ok(Deleted::GoneIfKeyPasses),
        Err(Failure::Conflict(_)) => Ok(Deleted::Asleep),
        Err(other) => Err(other),
    }
}

/// After which pause an idempotent request is sent again that failed like this; `None` for never.
pub fn again(failure: &Failure, tries: u32) -> Option<Duration> {
    let again = match failure {
        Failure::Unreachable(_) | Failure::Broken(_) => FIRST_PAUSE * 2_u32.pow(tries.min(8)),
        Failure::Limited(after) => *after,
        Failure::Failed { after, .. } => after.unwrap_or(FIRST_PAUSE * 2_u32.pow(tries.min(8))),
        _ => return None,
    };
    (tries + 1 < TRIES && again <= LONGEST_PAUSE).then_some(again)
}

/// `Retry-After-Ms`, else `Retry-After` in seconds; dates are taken for nothing.
pub fn retry_after(millis: Option<&str>, seconds: Option<&str>) -> Option<Duration> {
    let number = |text: Option<&str>| text?.trim().parse::<f64>().ok().filter(|n| *n >= 0.0);
    let millis = number(millis).or_else(|| number(seconds).map(|s| s * 1000.0))?;
    // Nobody is left alone for longer than a day.
    Some(Duration::from_millis(millis.min(86_400_000.0) as u64))
}

fn is_json(body: &[u8]) -> bool {
    body.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'{')
}

/// What the cloud says for people, cut: the sentence of an envelope, else the text.
fn said(body: &[u8]) -> String {
    let envelope = is_json(body).then(|| serde_json::from_slice::<AppError>(body).ok()).flatten();
    let text = match envelope {
        Some(envelope) => envelope.error,
        None => String::from_utf8_lossy(&body[..body.len().min(4 * SHOWN_MAX)]).into_owned(),
    };
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    text.trim().chars().take(SHOWN_MAX).map(clean).collect()
}

#[cfg(test)]
mod tests {
    use aegis_wire::vers::AUTH_TEXT;

    use super::*;

    fn answer(status: u16, body: &str) -> Answer {
        Answer { status, body: body.as_bytes().to_vec(), retry_after: None }
    }

    const FORBIDDEN_JSON: &str = r#"{"error":"Forbidden","success":false}"#;

    #[test]
    fn a_refused_key_never_looks_like_a_delete() {
        assert_eq!(deleted(&answer(200, r#"{"vm_id":"x"}"#)), Ok(Deleted::Gone));
        assert_eq!(deleted(&answer(404, "not found")), Ok(Deleted::Gone));
        assert_eq!(deleted(&answer(403, FORBIDDEN_JSON)), Ok(Deleted::GoneIfKeyPasses));
        assert_eq!(deleted(&answer(403, AUTH_TEXT)), Err(Failure::Auth));
        assert_eq!(deleted(&answer(403, "")), Err(Failure::Auth));
        assert_eq!(deleted(&answer(401, FORBIDDEN_JSON)), Err(Failure::Auth));
        let other = r#"{"error":"over quota","success":false}"#;
        assert!(
            matches!(deleted(&answer(403, other)), Err(Failure::Forbidden(t)) if t == "over quota")
        );
        assert_eq!(deleted(&answer(409, other)), Ok(Deleted::Asleep));
        assert!(matches!(deleted(&answer(500, "<html>")), Err(Failure::Failed { .. })));
    }

    #[test]
    fn only_a_certain_no_to_a_create_is_a_refusal() {
        let id = "0b9cf0ad-8d4e-4a4b-9c4b-3f3d1f0a6a01";
        let made = created(Ok(answer(201, &format!("{{\"vm_id\":\"{id}\"}}"))));
        assert_eq!(made, Created::Made(id.parse().unwrap()));
        for (status, body) in [
            (400, "Failed to parse"),
            (403, AUTH_TEXT),
            (403, FORBIDDEN_JSON),
            (404, "x"),
            (429, ""),
        ] {
            let came = created(Ok(answer(status, body)));
            assert!(matches!(came, Created::Refused(_)), "{status} {came:?}");
        }
        for (status, body) in
            [(201, "{}"), (201, "…"), (500, "x"), (502, "x"), (408, ""), (504, "")]
        {
            let came = created(Ok(answer(status, body)));
            assert!(matches!(came, Created::Unclear(_)), "{status} {came:?}");
        }
        let never = created(Err(Failure::Unreachable(String::new())));
        assert!(matches!(never, Created::Refused(_)), "nothing was sent");
        assert!(matches!(created(Err(Failure::Broken(String::new()))), Created::Unclear(_)));
    }

    #[test]
    fn what_is_asked_again_and_when() {
        let limited = |ms| Failure::Limited(Duration::from_millis(ms));
        assert_eq!(again(&limited(700), 0), Some(Duration::from_millis(700)));
        assert_eq!(again(&limited(60_000), 0), None, "the caller waits for that itself");
        assert_eq!(again(&limited(700), TRIES - 1), None);
        assert_eq!(again(&Failure::Auth, 0), None);
        assert!(
            again(&Failure::Broken(String::new()), 0) < again(&Failure::Broken(String::new()), 1)
        );
        assert_eq!(retry_after(Some("250"), Some("9")), Some(Duration::from_millis(250)));
        assert_eq!(retry_after(None, Some("1.5")), Some(Duration::from_millis(1500)));
        assert_eq!(retry_after(Some("x"), Some("-1")), None);
        assert_eq!(retry_after(None, Some("1e99")), Some(Duration::from_secs(86_400)));
    }

    #[test]
    fn what_is_shown_is_short_and_one_line() {
        let long = format!("a\nb{}", "x".repeat(5000));
        let Err(Failure::Refused { text, .. }) = judge(&answer(418, &long)) else { panic!() };
        assert!(text.starts_with("a b") && text.chars().count() == SHOWN_MAX, "{text}");
    }
}
