//! Rows of what machines may reach, and of what they asked for.

use aegis_rules::egress::{AllowList, Egress};
use aegis_rules::exceed::Raise;
use aegis_rules::request::{AccessRequest, Verdict, Wish};
use aegis_wire::words::{BadWord, DurationMs, EgressBytes, InstanceId, LlmTokens, Time};
use serde::{Deserialize, Serialize};

/// What is missing is not allowed.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct EgressRow {
    internet: bool,
    allow: Option<AllowList>,
}

impl From<&Egress> for EgressRow {
    fn from(e: &Egress) -> EgressRow {
        EgressRow { internet: e.internet, allow: e.allow.clone() }
    }
}

impl From<EgressRow> for Egress {
    fn from(r: EgressRow) -> Egress {
        Egress { internet: r.internet, allow: r.allow }
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct RequestRow {
    number: u32,
    from: InstanceId,
    egress: AllowList,
    egress_bytes: Option<EgressBytes>,
    tokens: Option<LlmTokens>,
    duration_ms: Option<DurationMs>,
    reason: Option<String>,
    at: i64,
    verdict: String,
}

impl From<&AccessRequest> for RequestRow {
    fn from(r: &AccessRequest) -> RequestRow {
        let Raise { egress, tokens, duration } = r.wish.raise;
        RequestRow {
            number: r.number,
            from: r.from.clone(),
            egress: r.wish.egress.clone(),
            egress_bytes: egress,
            tokens,
            duration_ms: duration,
            reason: r.reason.clone(),
            at: r.at.0,
            verdict: r.verdict.word().to_owned(),
        }
    }
}

impl RequestRow {
    pub(super) fn into_words(self) -> Result<AccessRequest, BadWord> {
        let RequestRow { egress_bytes, tokens, duration_ms, .. } = self;
        let raise = Raise { egress: egress_bytes, tokens, duration: duration_ms };
        Ok(AccessRequest {
            number: self.number,
            from: self.from,
            wish: Wish { egress: self.egress, raise },
            reason: self.reason,
            at: Time(self.at),
            verdict: Verdict::parse(&self.verdict)
                .ok_or(BadWord::new("verdict", "open, granted or denied"))?,
        })
    }
}
