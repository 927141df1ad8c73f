//! Exposed ports: as they are asked for and as clients see them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::bounds::EXPOSES_MAX;
use crate::channel::guest::API_PORT;
use crate::refusal::Refusal;
use crate::words::Port;
use aegis_rules::instance::{Expose, Protocol};

/// Refuses the guest API's own port: who reached it from outside would speak as the machine.
pub(crate) fn check_reachable(field: &str, port: Port) -> Result<(), Refusal> {
    if port.get() == API_PORT {
        let allowed = format!("another port than {API_PORT}, the guest API's, which is for inside");
        return Err(Refusal::field(field, allowed));
    }
    Ok(())
}

/// The ports of a request.
pub(super) fn exposes(list: &[Value]) -> Result<Vec<Expose>, Refusal> {
    if list.len() > EXPOSES_MAX {
        return Err(Refusal::field("exposes", format!("a list of at most {EXPOSES_MAX} ports")));
    }
    let bad = |i: usize| {
        Refusal::field(
            format!("exposes[{i}]"),
            "a port from 1 to 65535, or {\"port\", \"public_port\"?, \"protocol\"?: \"http|tcp\"}",
        )
    };
    let port = |v: &Value| v.as_u64().and_then(|n| Port::try_from(n).ok());
    let mut out: Vec<Expose> = Vec::with_capacity(list.len());
    for (i, item) in list.iter().enumerate() {
        let expose = match item {
            Value::Object(o) => {
                if o.keys().any(|k| !matches!(k.as_str(), "port" | "public_port" | "protocol")) {
                    return Err(bad(i));
                }
                Expose {
                    guest_port: o.get("port").and_then(port).ok_or_else(|| bad(i))?,
                    public_port: match o.get("public_port") {
                        None | Some(Value::Null) => None,
                        Some(v) => Some(port(v).ok_or_else(|| bad(i))?),
                    },
                    protocol: match o.get("protocol") {
                        None | Some(Value::Null) => Protocol::Http,
                        Some(v) => v.as_str().and_then(Protocol::parse).ok_or_else(|| bad(i))?,
                    },
                }
            }
            v => Expose {
                guest_port: port(v).ok_or_else(|| bad(i))?,
                public_port: None,
                protocol: Protocol::Http,
            },
        };
        check_reachable(&format!("exposes[{i}]"), expose.guest_port)?;
        if out.iter().any(|e| e.guest_port == expose.guest_port) {
            return Err(bad(i));
        }
        out.push(expose);
    }
    Ok(out)
}

/// An exposed port as clients see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The port inside.
    pub guest_port: u16,
    /// The port on the host.
    pub public_port: u16,
    /// `http` or `tcp`.
    pub protocol: String,
    /// Where it answers.
    pub url: String,
}

impl Endpoint {
    /// The endpoint of an exposed port on the address `host`, once it has a public port.
    pub fn new(expose: &Expose, host: &str) -> Option<Endpoint> {
        let public_port = expose.public_port?.get();
        let protocol = expose.protocol.word().to_owned();
        let url = format!("{protocol}://{host}:{public_port}");
        Some(Endpoint { guest_port: expose.guest_port.get(), public_port, protocol, url })
    }
}

/// Body of `POST /v1/instances/{id}/expose` and `POST /v1/self/expose`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExposeBody {
    /// The port inside.
    #[serde(default, alias = "port")]
    pub guest_port: Option<u64>,
    /// The port on the host, where a certain one is wanted.
    #[serde(default)]
    pub public_port: Option<u64>,
    /// `http` or `tcp`.
    #[serde(default)]
    pub protocol: Option<String>,
}

impl ExposeBody {
    /// Parses every field.
    pub fn parse(self) -> Result<Expose, Refusal> {
        let port = |name: &str, value: u64| {
            Port::try_from(value).map_err(|_| Refusal::field(name, "a port from 1 to 65535"))
        };
        let missing = || Refusal::field("guest_port", "a port from 1 to 65535");
        let guest_port = port("guest_port", self.guest_port.ok_or_else(missing)?)?;
        check_reachable("guest_port", guest_port)?;
        Ok(Expose {
            guest_port,
            public_port: self.public_port.map(|p| port("public_port", p)).transpose()?,
            protocol: match self.protocol.as_deref() {
                None => Protocol::Http,
                Some(word) => Protocol::parse(word)
                    .ok_or_else(|| Refusal::field("protocol", "http or tcp"))?,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nobody_outside_reaches_the_guest_api() {
        assert_eq!(exposes(&[json!(8080)]).unwrap().len(), 1);
        let of = |list: &[Value]| exposes(list).unwrap_err().field.unwrap();
        assert_eq!(of(&[json!(80), json!(7777)]), "exposes[1]");
        assert_eq!(of(&[json!({"port": 7777, "public_port": 8080})]), "exposes[0]");
        let body = ExposeBody { guest_port: Some(7777), ..ExposeBody::default() };
        assert_eq!(body.parse().unwrap_err().field.as_deref(), Some("guest_port"));
    }
}
