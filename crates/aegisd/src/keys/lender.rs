//! The key with which others use this host as a vers cloud: one at a time, in the form of that cloud's.
//! Only its hash is kept, in `HOME/vers-key`; a new one takes the place of the one before.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use aegis_rules::audit::hex;
use aegis_vers::ApiKey;
use aegis_wire::words::Uuid;
use subtle::ConstantTimeEq as _;

use super::{Key, hash, random};

/// Issues keys, and knows the one that is valid.
pub struct Lender {
    path: PathBuf,
    owner: Uuid,
}

impl Lender {
    pub(super) fn new(home: &Path, key: &Key) -> Lender {
        let mac = key.mac("owner");
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&mac[..16]);
        Lender { path: home.join("vers-key"), owner: Uuid::from_bytes(bytes) }
    }

    /// Who owns all machines that are lent; no secret.
    pub fn owner(&self) -> &Uuid {
        &self.owner
    }

    /// A new key; the one before is worth nothing from now on.
    pub fn issue(&self) -> io::Result<ApiKey> {
        let key = ApiKey::new(&self.owner, &random::<32>()?);
        let fresh = self.path.with_extension("new");
        let _ = fs::remove_file(&fresh);
        let mut file =
            fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?;
        writeln!(file, "{}", hex(&hash(key.reveal()).0))?;
        file.sync_all()?;
        fs::rename(&fresh, &self.path)?;
        Ok(key)
    }

    /// Whether this is the key; takes the same time for any wrong one.
    pub fn admits(&self, text: &str) -> bool {
        let Ok(kept) = fs::read_to_string(&self.path) else { return false };
        let shown = hex(&hash(text).0);
        kept.trim().as_bytes().ct_eq(shown.as_bytes()).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_key_is_the_only_one() {
        let home = tempfile::tempdir().unwrap();
        let lender = Lender::new(home.path(), &Key([7; 32]));
        assert!(!lender.admits(""), "there is none");
        let first = lender.issue().unwrap();
        assert!(lender.admits(first.reveal()));
        let second = lender.issue().unwrap();
        assert!(lender.admits(second.reveal()) && !lender.admits(first.reveal()));
        assert_eq!(second.owner(), lender.owner());
        let kept = fs::read_to_string(home.path().join("vers-key")).unwrap();
        assert!(!kept.contains(&second.reveal()[36..]));
    }
}
