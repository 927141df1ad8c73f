//! API keys: a UUID that says whose, and 64 hexadecimal digits right behind it that are the secret.

use std::fmt;
use std::str::FromStr;

use aegis_wire::words::{BadWord, Uuid};
use zeroize::Zeroizing;

/// Length of the UUID.
const OWNER_LEN: usize = 36;
/// Length of the secret.
const SECRET_LEN: usize = 64;

/// A key. Nothing prints its secret.
#[derive(Clone)]
pub struct ApiKey {
    owner: Uuid,
    text: Zeroizing<String>,
}

impl ApiKey {
    /// Whose it is; no secret.
    pub fn owner(&self) -> &Uuid {
        &self.owner
    }

    /// The whole key, for the header and for nothing else.
    pub fn reveal(&self) -> &str {
        &self.text
    }

    /// A key of its parts.
    pub fn new(owner: &Uuid, secret: &[u8; SECRET_LEN / 2]) -> ApiKey {
        let mut text = Zeroizing::new(String::with_capacity(OWNER_LEN + SECRET_LEN));
        text.push_str(owner.as_str());
        for byte in secret {
            text.push(digit(byte >> 4));
            text.push(digit(byte & 15));
        }
        ApiKey { owner: owner.clone(), text }
    }
}

fn digit(four_bits: u8) -> char {
    char::from_digit(u32::from(four_bits), 16).unwrap_or('0')
}

impl FromStr for ApiKey {
    type Err = BadWord;
    fn from_str(text: &str) -> Result<ApiKey, BadWord> {
        let bad = || BadWord::new("API key", "a UUID and 64 hexadecimal digits right behind it");
        let text = text.trim();
        let fits = text.len() == OWNER_LEN + SECRET_LEN && text.is_ascii();
        if !fits || !text[OWNER_LEN..].bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(bad());
        }
        let owner = text[..OWNER_LEN].to_ascii_lowercase().parse().map_err(|_| bad())?;
        Ok(ApiKey { owner, text: Zeroizing::new(text.to_owned()) })
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKey({}…)", self.owner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: &str = "0b9cf0ad-8d4e-4a4b-9c4b-3f3d1f0a6a01";

    #[test]
    fn a_key_is_an_owner_and_a_secret_that_nothing_prints() {
        let secret = "a1".repeat(32);
        let key: ApiKey = format!(" {OWNER}{secret}\n").parse().unwrap();
        assert_eq!(key.owner().as_str(), OWNER);
        assert_eq!(key.reveal(), format!("{OWNER}{secret}"));
        assert_eq!(format!("{key:?}"), format!("ApiKey({OWNER}…)"));
        assert_eq!(ApiKey::new(key.owner(), &[0xa1; 32]).reveal(), key.reveal());
        for bad in [
            String::new(),
            OWNER.to_owned(),
            format!("{OWNER}-{secret}"),
            format!("{OWNER}{}", "g1".repeat(32)),
            format!("{}{secret}", "x".repeat(36)),
            format!("{OWNER}{}é", "a".repeat(62)),
        ] {
            assert!(bad.parse::<ApiKey>().is_err(), "{bad}");
        }
    }
}
