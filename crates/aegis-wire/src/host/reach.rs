//! What a machine may reach, and what it asks the host for.

use aegis_rules::egress::{AllowList, Egress, EgressAsk};
use aegis_rules::exceed::Raise;
use aegis_rules::guest::Guest;
use aegis_rules::request::{AccessRequest, Wish};
use serde::{Deserialize, Serialize};

use crate::couch::Amount;
use crate::refusal::Refusal;
use crate::words::{Limit, Limits, Time};

/// What a machine may reach, as it is asked for.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct EgressBody {
    /// Whether anything outside may be reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub internet: Option<bool>,
    /// Names with globs, CIDRs, ports; absent means all public addresses, empty none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow: Option<Vec<String>>,
}

impl EgressBody {
    /// Parses the list; a bad entry is refused by `field`.
    pub fn parse(self, field: &str) -> Result<EgressAsk, Refusal> {
        let allow = self.allow.map(|l| AllowList::parse(&l, &format!("{field}.allow")));
        Ok(EgressAsk { internet: self.internet, allow: allow.transpose()? })
    }
}

/// What an instance's record lets it, and all below it, reach.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct EgressShape {
    /// Whether anything outside may be reached.
    pub internet: bool,
    /// What of it; `null` is all public addresses.
    pub allow: Option<Vec<String>>,
}

impl From<&Egress> for EgressShape {
    fn from(e: &Egress) -> EgressShape {
        EgressShape { internet: e.internet, allow: e.allow.as_ref().map(AllowList::texts) }
    }
}

/// Limits that can be changed while a guest lives, in the couch's names; absent ones stay.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RaiseBody {
    /// In GB of 10^9 bytes.
    #[serde(rename = "maxNetworkEgressGB", default, skip_serializing_if = "Option::is_none")]
    pub egress_gb: Option<f64>,
    /// Tokens.
    #[serde(rename = "maxTokenBudget", default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<f64>,
    /// Hours since the redeem.
    #[serde(rename = "maxDurationHours", default, skip_serializing_if = "Option::is_none")]
    pub hours: Option<f64>,
}

impl RaiseBody {
    /// Parses every number within its range.
    pub fn parse(self) -> Result<Raise, Refusal> {
        let mut limits = Limits::default();
        for (limit, value) in [
            (Limit::Egress, self.egress_gb),
            (Limit::Tokens, self.tokens),
            (Limit::Duration, self.hours),
        ] {
            if let Some(value) = value {
                limits.set(limit, value)?;
            }
        }
        Ok(Raise {
            egress: self.egress_gb.map(|_| limits.egress),
            tokens: self.tokens.map(|_| limits.tokens),
            duration: self.hours.map(|_| limits.duration),
        })
    }
}

/// Body of `POST /v1/self/requests`: what a machine asks its host for.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AccessBody {
    /// Names with globs, CIDRs, ports that shall be reachable.
    #[serde(default)]
    pub egress: Vec<String>,
    /// Higher limits.
    #[serde(rename = "resourceLimits", default)]
    pub limits: RaiseBody,
    /// Why, for the host.
    #[serde(default)]
    pub reason: Option<String>,
}

impl AccessBody {
    /// Parses what is asked for, and the reason.
    pub fn parse(self) -> Result<(Wish, Option<String>), Refusal> {
        let egress = AllowList::parse(&self.egress, "egress")?;
        Ok((Wish { egress, raise: self.limits.parse()? }, self.reason))
    }
}

/// A request, as the host and its machine see it.
#[derive(Clone, Debug, Serialize)]
pub struct AccessShape {
    /// Its number among the guest's.
    pub number: u32,
    /// Which machine asks.
    pub instance: String,
    /// For what to reach.
    pub egress: Vec<String>,
    /// For which limits.
    #[serde(rename = "resourceLimits")]
    pub limits: serde_json::Value,
    /// Why.
    pub reason: Option<String>,
    /// When.
    pub at: Time,
    /// `open`, `granted` or `denied`.
    pub status: &'static str,
}

impl From<&AccessRequest> for AccessShape {
    fn from(r: &AccessRequest) -> AccessShape {
        let Raise { egress, tokens, duration } = r.wish.raise;
        let mut limits = serde_json::Map::new();
        let numbers = [
            (Limit::Egress, egress.map(|e| e.gb())),
            (Limit::Tokens, tokens.map(|t| t.0 as f64)),
            (Limit::Duration, duration.map(|d| d.hours())),
        ];
        for (limit, value) in numbers {
            let value = value.and_then(|v| serde_json::to_value(Amount(v)).ok());
            limits.extend(value.map(|v| (limit.field().to_owned(), v)));
        }
        AccessShape {
            number: r.number,
            instance: r.from.to_string(),
            egress: r.wish.egress.texts(),
            limits: limits.into(),
            reason: r.reason.clone(),
            at: r.at,
            status: r.verdict.word(),
        }
    }
}

/// All requests of a guest, the newest last.
pub fn requests(of: &Guest) -> Vec<AccessShape> {
    of.requests.iter().map(Into::into).collect()
}

/// Something that a guest's machines were refused.
#[derive(Clone, Debug, Serialize)]
pub struct DenialShape {
    /// Place in the audit trail.
    pub seq: u64,
    /// When.
    pub at: Time,
    /// Which machine.
    pub instance: String,
    /// `egress`, or the call that was refused.
    pub method: String,
    /// The limit or list that said no.
    pub rule: String,
    /// What was asked for.
    pub requested: String,
    /// What would pass.
    pub allowed: String,
    /// How often it was asked for within ten seconds.
    pub count: u64,
}
