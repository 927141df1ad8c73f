//! What machines are given of their host: secrets, whose values go in and never come out here, and
//! host services (contracts/aegis.md 1, contracts/couch.md 6).

use serde::{Deserialize, Serialize};

use crate::bounds::{SECRET_HOSTS_MAX, SECRET_VALUE_MAX};
use crate::egress::{HostName, ServiceName};
use crate::refusal::Refusal;
use crate::words::Time;
use aegis_rules::given::{SERVICES_MAX, Secrets};

/// Body of `PUT /v1/secrets/{name}`. It has no `Debug`: the value is in it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretBody {
    /// The secret itself.
    pub value: String,
    /// Whether machines get a placeholder instead of it.
    #[serde(default)]
    pub proxy: bool,
    /// Hosts at which the placeholder stands for it: `api.example.com`, `NAME.host.aegis`.
    #[serde(default)]
    pub hosts: Vec<String>,
}

impl SecretBody {
    /// The value, and the hosts at which its placeholder stands for it; `None` for a secret that
    /// machines get as it is.
    ///
    /// # Errors
    /// A refusal of a field; it never repeats the value.
    pub fn parse(self) -> Result<(String, Option<Vec<HostName>>), Refusal> {
        if self.value.is_empty() || self.value.len() > SECRET_VALUE_MAX || self.value.contains('\0')
        {
            let allowed = format!("a text of 1 to {SECRET_VALUE_MAX} bytes without NUL");
            return Err(Refusal::field("value", allowed));
        }
        if !self.proxy {
            return match self.hosts.is_empty() {
                true => Ok((self.value, None)),
                false => Err(Refusal::field("hosts", "left out where proxy is false")),
            };
        }
        let bad = || {
            let allowed = "host names such as api.example.com or NAME.host.aegis";
            Refusal::field("hosts", format!("1 to {SECRET_HOSTS_MAX} {allowed}"))
        };
        if self.hosts.is_empty() || self.hosts.len() > SECRET_HOSTS_MAX {
            return Err(bad());
        }
        // It goes into a header: what can't stand there would fail at every use.
        if !self.value.bytes().all(|b| b == b'\t' || (b' '..=b'~').contains(&b)) {
            return Err(Refusal::field("value", "printable ASCII where proxy is true"));
        }
        let hosts: Result<Vec<HostName>, _> = self.hosts.iter().map(|h| h.parse()).collect();
        Ok((self.value, Some(hosts.map_err(|_| bad())?)))
    }
}

/// A secret in answers: everything but its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the field names are the contract's")]
pub struct SecretShape {
    pub name: String,
    pub proxy: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    pub updated_at: Time,
}

/// Answer to `GET /v1/secrets`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretList {
    /// By name.
    pub secrets: Vec<SecretShape>,
}

/// Body of `PUT /v1/instances/{id}/secrets`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretsBody {
    /// Names; `["*"]` is all that there are at the start.
    pub secrets: Vec<String>,
}

impl SecretsBody {
    /// Parses the names.
    ///
    /// # Errors
    /// A refusal of the field.
    pub fn parse(&self) -> Result<Secrets, Refusal> {
        Secrets::parse(&self.secrets)
    }
}

/// Names of host services, each once.
pub(crate) fn services(texts: &[String], field: &str) -> Result<Vec<ServiceName>, Refusal> {
    let bad = || {
        let names = "names of host services: lower-case letters, digits and hyphens";
        Refusal::field(field, format!("at most {SERVICES_MAX} {names}"))
    };
    if texts.len() > SERVICES_MAX {
        return Err(bad());
    }
    let mut names = Vec::with_capacity(texts.len());
    for text in texts {
        let name: ServiceName = text.parse().map_err(|_| bad())?;
        if !names.contains(&name) {
            names.push(name);
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(value: &str, proxy: bool, hosts: &[&str]) -> SecretBody {
        let hosts = hosts.iter().map(|h| (*h).to_owned()).collect();
        SecretBody { value: value.to_owned(), proxy, hosts }
    }

    #[test]
    fn what_can_be_no_secret_is_refused_without_repeating_it() {
        let long = "x".repeat(SECRET_VALUE_MAX + 1);
        for (bad, field) in [
            (body("", false, &[]), "value"),
            (body("hush\0", false, &[]), "value"),
            (body(&long, false, &[]), "value"),
            (body("hush", false, &["a.example"]), "hosts"),
            (body("hush", true, &[]), "hosts"),
            (body("hush", true, &["*.example"]), "hosts"),
            (body("hush", true, &["10.0.0.1"]), "hosts"),
            (body("hush\r\nX: y", true, &["a.example"]), "value"),
        ] {
            let refusal = bad.parse().unwrap_err();
            assert_eq!(refusal.field.as_deref(), Some(field));
            assert!(!format!("{refusal:?}").contains("hush"));
        }
        let (value, hosts) = body("line\nline", false, &[]).parse().unwrap();
        assert_eq!((value.as_str(), hosts), ("line\nline", None));
        let (_, hosts) = body("k", true, &["API.example.com"]).parse().unwrap();
        assert_eq!(hosts.unwrap()[0].as_str(), "api.example.com");
    }
}
