//! Between a machine's gateway and aegisd's hatch: one unix socket per machine, `RUN_DIR/door.sock`.
//!
//! ```text
//! process ── TCP to llm.aegis, NAME.host.aegis ──▶ gateway in the worker
//!   connects to RUN_DIR/door.sock, says {"door":"llm"}\n, then passes bytes on, both ways
//! aegisd, room hatch: the path says which machine it is; HTTP/1.1 follows
//! ```
//! Each connection begins with one JSON line, a [`Knock`] of at most [`crate::bounds::KNOCK_MAX`]
//! bytes. Nothing that a knock says widens anything: the hatch looks up itself what its machine may.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// First line of a connection to the hatch: where the process inside wanted to go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "door", rename_all = "snake_case")]
pub enum Knock {
    /// To `llm.aegis`.
    Llm,
    /// To `NAME.host.aegis`.
    Service {
        /// The name, a DNS label.
        name: String,
    },
    /// To a public address over plain HTTP, which the egress policy allowed, and at which a secret's
    /// placeholder may be used.
    Http {
        /// The address that was allowed: no other is connected to.
        to: SocketAddr,
        /// The host name that was allowed there.
        host: String,
    },
    /// As `Http`, inside of TLS: the hello that asks for the host follows, and the hatch is the server
    /// that it is for, by the machine's own authority.
    Https {
        /// The address that was allowed: no other is connected to.
        to: SocketAddr,
        /// The host name that was allowed there, and asked for.
        host: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_knock_is_one_line_of_this_form() {
        let text = |knock: &Knock| serde_json::to_string(knock).unwrap();
        let http = Knock::Http {
            to: "[2001:db8::1]:80".parse().unwrap(),
            host: "api.example.com".to_owned(),
        };
        assert_eq!(text(&Knock::Llm), r#"{"door":"llm"}"#);
        assert_eq!(
            text(&Knock::Service { name: "ollama".to_owned() }),
            r#"{"door":"service","name":"ollama"}"#
        );
        assert_eq!(
            text(&http),
            r#"{"door":"http","to":"[2001:db8::1]:80","host":"api.example.com"}"#
        );
        assert_eq!(serde_json::from_str::<Knock>(&text(&http)).unwrap(), http);
        let https =
            Knock::Https { to: "203.0.113.5:443".parse().unwrap(), host: "a.example".to_owned() };
        let said = r#"{"door":"https","to":"203.0.113.5:443","host":"a.example"}"#;
        assert_eq!(text(&https), said);
        assert!(serde_json::from_str::<Knock>(r#"{"door":"shell"}"#).is_err());
    }
}
