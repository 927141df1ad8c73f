//! What an instance is given, as JSON inside of its row.

use aegis_rules::given::{Folder, Given, Models, Secrets};
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
    workspace: Option<FolderRow>,
}

#[derive(Serialize, Deserialize)]
struct FolderRow {
    path: String,
    read_only: bool,
}

impl From<&Given> for GivenRow {
    fn from(given: &Given) -> GivenRow {
        GivenRow {
            secrets: given.secrets.texts(),
            services: given.services.clone(),
            models: given.models.as_ref().map(|m| m.texts().to_vec()),
            workspace: given
                .workspace
                .clone()
                .map(|f| FolderRow { path: f.path, read_only: f.read_only }),
        }
    }
}

impl GivenRow {
    pub(super) fn into_words(self) -> Result<Given, BadWord> {
        let secrets = Secrets::parse(&self.secrets)
            .map_err(|_| BadWord::new("secrets", "names of secrets"))?;
        let workspace = self.workspace.map(|f| Folder { path: f.path, read_only: f.read_only });
        Ok(Given { secrets, services: self.services, models: models(self.models), workspace })
    }
}
