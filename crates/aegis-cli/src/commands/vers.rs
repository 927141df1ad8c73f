//! `aegis vers-key`: the key with which others use this host as a vers cloud.

use super::{Ask, text};
use crate::failure::Result;

/// Has a new key made, and shows it; nobody can show it again.
pub async fn key(ask: &Ask) -> Result<()> {
    let issued = ask.client.post("/v1/vers/key", None).await?;
    ask.format.answer(&issued, || {
        format!(
            "export VERS_BASE_URL={}\nexport VERS_API_KEY={}\n",
            text(&issued, "base_url"),
            text(&issued, "api_key")
        )
    })
}
