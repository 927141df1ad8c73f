//! Bodies of couch requests, field by field.

use serde_json::{Map, Value};

use crate::egress::AllowList;
use crate::host::{check_reachable, services};
use crate::refusal::{Code, Refusal};
use crate::words::{
    DurationMs, InviteCode, Label, Limit, Limits, OnLimit, Permissions, Port, PublicKey, Share,
};
use aegis_rules::given::Models;
use aegis_rules::guest::ReportedUsage;
use aegis_rules::invite::{Create, Offer};

type Object = Map<String, Value>;

const LIST_MAX: usize = 256;
const TEXT_MAX: usize = 255;

/// Body of `POST /couch/invites`.
pub fn create_invite(body: &Value) -> Result<Create, Refusal> {
    let body = object(body)?;
    known(
        body,
        "",
        &[
            "createdBy",
            "label",
            "expiresInHours",
            "resourceLimits",
            "permissions",
            "golden",
            "agentPort",
            "egressAllow",
            "hostServices",
            "llmModels",
            "spawnDepth",
            "maxChildren",
            "rootShare",
            "onLimit",
        ],
    )?;
    let created_by = required_label(body, "createdBy")?;
    let label = optional_label(body, "label")?;
    let mut limits = Limits::default();
    if let Some(given) = present(body, "resourceLimits") {
        let given = sub_object(given, "resourceLimits")?;
        known(given, "resourceLimits.", &Limit::ALL.map(Limit::field))?;
        for limit in Limit::ALL {
            if let Some(value) = given.get(limit.field()) {
                let (least, most) = limit.range();
                let number = value.as_f64().ok_or_else(|| {
                    Refusal::out_of_range(
                        format!("resourceLimits.{}", limit.field()),
                        brief(value),
                        format!("a number from {least} to {most}"),
                    )
                })?;
                limits.set(limit, number)?;
            }
        }
    }
    let mut permissions = Permissions::default();
    if let Some(given) = present(body, "permissions") {
        let given = sub_object(given, "permissions")?;
        let fields: [(&str, &mut bool); 3] = [
            ("canAccessInternet", &mut permissions.internet),
            ("canSpawnSubAgents", &mut permissions.spawn),
            ("canAccessHostServices", &mut permissions.host_services),
        ];
        known(given, "permissions.", &fields.each_ref().map(|f| f.0))?;
        for (name, permission) in fields {
            if let Some(value) = given.get(name) {
                *permission = value.as_bool().ok_or_else(|| {
                    Refusal::out_of_range(
                        format!("permissions.{name}"),
                        brief(value),
                        "true or false".to_owned(),
                    )
                })?;
            }
        }
    }
    let expires_in = match present(body, "expiresInHours") {
        None => DurationMs(24 * DurationMs::HOUR),
        Some(value) => hours(value, "expiresInHours")?,
    };
    Ok(Create { created_by, label, limits, permissions, offer: offer(body)?, expires_in })
}

fn offer(body: &Object) -> Result<Offer, Refusal> {
    let count = |name: &str, most: u64| match present(body, name) {
        None => Ok(None),
        Some(value) => match value.as_u64() {
            Some(n) if n <= most => Ok(Some(n as u32)),
            _ => Err(Refusal::out_of_range(
                name.to_owned(),
                brief(value),
                format!("a whole number from 0 to {most}"),
            )),
        },
    };
    Ok(Offer {
        golden: match present(body, "golden") {
            None => None,
            Some(value) => Some(word(value, "golden", "an image reference or commit id")?),
        },
        agent_port: match present(body, "agentPort") {
            None => None,
            Some(value) => {
                let port = port(value, "agentPort")?;
                check_reachable("agentPort", port)?;
                Some(port)
            }
        },
        egress_allow: match present(body, "egressAllow") {
            None => None,
            Some(value) => Some(AllowList::parse(&texts(value, "egressAllow")?, "egressAllow")?),
        },
        host_services: match present(body, "hostServices") {
            None => Vec::new(),
            Some(value) => {
                let names = texts(value, "hostServices")?;
                services(&names, "hostServices")?;
                names
            }
        },
        llm_models: match present(body, "llmModels") {
            None => None,
            Some(value) => Some(Models::parse(texts(value, "llmModels")?, "llmModels")?),
        },
        spawn_depth: count("spawnDepth", 16)?,
        max_children: count("maxChildren", 10_000)?,
        root_share: match present(body, "rootShare") {
            None => None,
            Some(value) => Some(value.as_f64().and_then(Share::new).ok_or_else(|| {
                Refusal::out_of_range(
                    "rootShare".to_owned(),
                    brief(value),
                    "a number from 0.1 to 1".to_owned(),
                )
            })?),
        },
        on_limit: match present(body, "onLimit") {
            None => None,
            Some(value) => Some(value.as_str().and_then(OnLimit::parse).ok_or_else(|| {
                Refusal::out_of_range(
                    "onLimit".to_owned(),
                    brief(value),
                    "throttle, freeze or kill".to_owned(),
                )
            })?),
        },
    })
}

/// Body of `POST /couch/redeem`: code, name, public key. A code that has not the form of one is
/// `None`: it is unknown, which is a 404 and not a 400.
pub fn redeem(body: &Value) -> Result<(Option<InviteCode>, Label, Option<PublicKey>), Refusal> {
    let body = object(body)?;
    known(body, "", &["code", "name", "publicKey"])?;
    let code = match present(body, "code").map(|v| v.as_str().map(str::trim)) {
        Some(Some(code)) if !code.is_empty() => code.parse().ok(),
        _ => return Err(Refusal::field("code", "an invite code")),
    };
    let name = required_label(body, "name")?;
    let key = match present(body, "publicKey") {
        None => None,
        Some(value) => Some(word(value, "publicKey", "an OpenSSH public key line")?),
    };
    Ok((code, name, key))
}

/// Body of `POST /couch/guests/{id}/activate`: vm id and endpoint.
pub fn activate(body: &Value) -> Result<(String, String), Refusal> {
    let body = object(body)?;
    known(body, "", &["vmId", "agentEndpoint"])?;
    let text = |name: &str| {
        let text = present(body, name).and_then(Value::as_str).map(str::trim).unwrap_or_default();
        if text.is_empty() || text.len() > 2048 || text.chars().any(char::is_control) {
            return Err(Refusal::field(name, "a text that is not blank, of at most 2048 bytes"));
        }
        Ok(text.to_owned())
    };
    Ok((text("vmId")?, text("agentEndpoint")?))
}

/// Body of `PUT /couch/guests/{id}/usage`.
pub fn usage(body: &Value) -> Result<ReportedUsage, Refusal> {
    let body = object(body)?;
    let mut asked = ReportedUsage::default();
    let fields: [(&str, f64, &mut Option<u64>); 6] = [
        ("cpuSeconds", 1e9, &mut asked.cpu_ns),
        ("memoryPeakMB", 1_048_576.0, &mut asked.memory_peak_bytes),
        ("diskUsedGB", 1e9, &mut asked.disk_bytes),
        ("networkEgressGB", 1e9, &mut asked.egress_bytes),
        ("tokensUsed", 1.0, &mut asked.tokens),
        ("uptimeSeconds", 1e3, &mut asked.uptime_ms),
    ];
    known(body, "", &fields.each_ref().map(|f| f.0))?;
    for (name, unit, slot) in fields {
        if let Some(value) = body.get(name) {
            *slot = Some(match value.as_f64() {
                // The upper end keeps the number of units exact in a float.
                Some(n) if n >= 0.0 && n * unit <= 9e18 => (n * unit).round() as u64,
                _ => {
                    return Err(Refusal::out_of_range(
                        name.to_owned(),
                        brief(value),
                        "a number that is not negative".to_owned(),
                    ));
                }
            });
        }
    }
    Ok(asked)
}

fn object(body: &Value) -> Result<&Object, Refusal> {
    body.as_object()
        .ok_or_else(|| Refusal::new(Code::MalformedRequest, "the body must be a JSON object"))
}

fn sub_object<'a>(value: &'a Value, name: &str) -> Result<&'a Object, Refusal> {
    value.as_object().ok_or_else(|| Refusal::field(name, "an object"))
}

/// A field that is there; `null` is as good as absent.
fn present<'a>(body: &'a Object, name: &str) -> Option<&'a Value> {
    body.get(name).filter(|v| !v.is_null())
}

/// Refuses a field that nobody knows: a misspelt limit must not silently become the default.
fn known(body: &Object, path: &str, names: &[&str]) -> Result<(), Refusal> {
    match body.keys().find(|k| !names.contains(&k.as_str())) {
        None => Ok(()),
        Some(key) => {
            let field = format!("{path}{}", key.chars().take(64).collect::<String>());
            let mut refusal = Refusal::new(
                Code::InvalidField,
                format!("unknown field {field}; known are {}", names.join(", ")),
            );
            refusal.field = Some(field);
            refusal.allowed = Some(names.join(", "));
            Err(refusal)
        }
    }
}

fn required_label(body: &Object, name: &str) -> Result<Label, Refusal> {
    optional_label(body, name)?
        .ok_or_else(|| Refusal::field(name, "1 to 200 characters that are not blank"))
}

fn optional_label(body: &Object, name: &str) -> Result<Option<Label>, Refusal> {
    match present(body, name) {
        None => Ok(None),
        Some(value) => {
            let text =
                value.as_str().map(str::trim).ok_or_else(|| Refusal::field(name, "a text"))?;
            if text.is_empty() {
                return Ok(None);
            }
            text.parse()
                .map(Some)
                .map_err(|e: crate::words::BadWord| Refusal::field(name, e.expected))
        }
    }
}

fn hours(value: &Value, name: &str) -> Result<DurationMs, Refusal> {
    match value.as_f64() {
        Some(h) if h > 0.0 && h <= 720.0 => {
            Ok(DurationMs(((h * DurationMs::HOUR as f64).round() as u64).max(1)))
        }
        _ => Err(Refusal::out_of_range(
            name.to_owned(),
            brief(value),
            "a number above 0 and at most 720".to_owned(),
        )),
    }
}

fn word<T>(value: &Value, name: &str, expected: &str) -> Result<T, Refusal>
where
    T: TryFrom<String, Error = crate::words::BadWord>,
{
    let text = value.as_str().ok_or_else(|| Refusal::field(name, expected))?;
    T::try_from(text.trim().to_owned()).map_err(|e| Refusal::field(name, e.expected))
}

fn port(value: &Value, name: &str) -> Result<Port, Refusal> {
    value.as_u64().and_then(|n| Port::try_from(n).ok()).ok_or_else(|| {
        Refusal::out_of_range(name.to_owned(), brief(value), "a port from 1 to 65535".to_owned())
    })
}

fn texts(value: &Value, name: &str) -> Result<Vec<String>, Refusal> {
    let bad = || {
        Refusal::field(name, format!("a list of at most {LIST_MAX} texts of 1 to {TEXT_MAX} bytes"))
    };
    let list = value.as_array().filter(|l| l.len() <= LIST_MAX).ok_or_else(bad)?;
    list.iter()
        .map(|v| {
            v.as_str()
                .map(str::trim)
                .filter(|t| !t.is_empty() && t.len() <= TEXT_MAX)
                .map(str::to_owned)
                .ok_or_else(bad)
        })
        .collect()
}

/// A value as it is quoted back: never more than a line of it.
fn brief(value: &Value) -> String {
    value.to_string().chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(body: Value) -> String {
        create_invite(&body).unwrap_err().field.unwrap_or_default()
    }

    #[test]
    fn defaults_are_filled_per_field() {
        let ask = create_invite(&json!({
            "createdBy": " noah ",
            "resourceLimits": {"maxMemoryMB": 512},
            "permissions": {"canSpawnSubAgents": true},
        }))
        .unwrap();
        assert_eq!(ask.created_by.as_str(), "noah");
        assert_eq!(ask.limits.memory.0, 512);
        assert_eq!(ask.limits.cpu, Limits::default().cpu);
        assert!(ask.permissions.internet && ask.permissions.spawn);
        assert_eq!(ask.expires_in.hours(), 24.0);
        // Absent is not 0: what is named holds.
        assert_eq!((ask.offer.spawn_depth, ask.offer.max_children), (None, None));
        let named = create_invite(&json!({
            "createdBy": "noah", "spawnDepth": 0, "maxChildren": 7, "rootShare": 0.25,
        }))
        .unwrap();
        assert_eq!((named.offer.spawn_depth, named.offer.max_children), (Some(0), Some(7)));
        assert_eq!(named.offer.root_share.map(Share::part), Some(0.25));
    }

    #[test]
    fn every_bad_value_names_its_field() {
        let with = |key: &str, value: Value| {
            let mut body = json!({"createdBy": "n"});
            body[key] = value;
            refused(body)
        };
        assert_eq!(refused(json!({"createdBy": "  "})), "createdBy");
        assert_eq!(refused(json!({})), "createdBy");
        assert_eq!(with("surprise", json!(1)), "surprise");
        for bad in [json!(0), json!(0.05), json!(1.1), json!("half")] {
            assert_eq!(with("rootShare", bad), "rootShare");
        }
        for bad in [json!(0), json!(-1), json!(721), json!("24"), json!([])] {
            assert_eq!(with("expiresInHours", bad), "expiresInHours");
        }
        for limit in Limit::ALL {
            for bad in [json!(0), json!(-1), json!("1"), json!(1e300), json!(null), json!({})] {
                let got = with("resourceLimits", json!({ limit.field(): bad }));
                assert_eq!(got, format!("resourceLimits.{}", limit.field()));
            }
        }
        assert_eq!(with("resourceLimits", json!({"maxCpu": 1})), "resourceLimits.maxCpu");
        assert_eq!(with("permissions", json!({"root": true})), "permissions.root");
        assert_eq!(
            with("permissions", json!({"canAccessInternet": "yes"})),
            "permissions.canAccessInternet"
        );
        assert_eq!(with("agentPort", json!(0)), "agentPort");
        assert_eq!(with("agentPort", json!(7777)), "agentPort");
        assert_eq!(with("onLimit", json!("explode")), "onLimit");
        assert_eq!(with("hostServices", json!(["Not A Label"])), "hostServices");
        assert_eq!(with("llmModels", json!([7])), "llmModels");
        assert_eq!(with("llmModels", json!(vec!["x"; 65])), "llmModels");
        assert_eq!(with("golden", json!("../etc")), "golden");
        for bad in ["http://example.com", "10.0.0.1/8", "a*.example.com", "example.com:0"] {
            assert_eq!(with("egressAllow", json!(["example.com", bad])), "egressAllow");
        }
    }

    #[test]
    fn usage_refuses_what_is_no_count() {
        for bad in [json!(-1), json!("5"), json!(1e300), json!(null)] {
            assert!(usage(&json!({ "tokensUsed": bad })).is_err());
        }
        assert_eq!(usage(&json!({"tokensUsed": 7})).unwrap().tokens, Some(7));
        assert!(usage(&json!({"tokens": 7})).is_err());
    }
}
