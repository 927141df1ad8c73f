//! What an instance is given, as JSON inside of its row.

use aegis_rules::given::{Given, Models, Secrets};
use aegis_wire::egress::ServiceName;
use aegis_wire::words::BadWord;
use serde::{Deserialize, Serialize};

/// A list that can't be read any more allows nothing.
pub(super) fn models(texts: Option<Vec<String>>) -> Option<Models> {
    texts.map(|texts| Models::parse(texts, "models").unwrap_or_default())
}

/// Names only; what is missing was not given.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct GivenRow {
    secrets: Vec<String>,
    services: Vec<ServiceName>,
    models: Option<Vec<String>>,
}

impl From<&Given> for GivenRow {
    fn from(given: &Given) -> GivenRow {
        GivenRow {
            secrets: given.secrets.texts(),
            services: given.services.clone(),
            models: given.models.as_ref().map(|m| m.texts().to_vec()),
        }
    }
}

impl GivenRow {
    pub(super) fn into_words(self) -> Result<Given, BadWord> {
        let secrets = Secrets::parse(&self.secrets)
            .map_err(|_| BadWord::new("secrets", "names of secrets"))?;
        Ok(Given { secrets, services: self.services, models: models(self.models) })
    }
}
