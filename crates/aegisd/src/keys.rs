//! The master key, what is derived from it, and secrets that others hold.
//!
//! Codes and tokens are MACs over ids, so that a retried redeem finds the same token and a host can
//! see a code again, while the ledger holds only hashes (contracts/couch.md 3).

mod authority;
mod lender;
mod vault;

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use aegis_rules::invite::SecretHash;
use aegis_wire::words::{CommitId, GuestId, InstanceId, InviteCode, InviteId, Time, Uuid};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use crate::tokens::Signer;
pub use authority::{Authorities, LEAF_VALID};
pub use lender::Lender;
pub use vault::{Sealed, Vault};

/// A key for one purpose.
struct Key([u8; 32]);

impl Key {
    fn derive(master: &[u8; 32], purpose: &[u8]) -> Key {
        let mut out = [0; 32];
        hkdf::Hkdf::<Sha256>::new(None, master)
            .expand(purpose, &mut out)
            .expect("32 bytes are less than HKDF's most");
        Key(out)
    }

    fn mac(&self, message: &str) -> [u8; 32] {
        let mut mac =
            Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.update(message.as_bytes());
        mac.finalize().into_bytes().into()
    }
}

/// All keys of this daemon. Nothing of it is printable.
pub struct Keys {
    invite_codes: Key,
    guest_tokens: Key,
    cloud_marks: Key,
    /// Lets others use this host as a vers cloud.
    pub lender: Lender,
    host_token: SecretHash,
    /// Seals secrets.
    pub vault: Vault,
    /// Sign for hosts of proxy secrets.
    pub authorities: Authorities,
    /// Mints and looks at capability tokens.
    pub capabilities: Signer,
}

impl Keys {
    /// Reads the master key and the host token below `home`, and makes them at the first start.
    pub fn open(home: &Path) -> io::Result<Keys> {
        let master = read_or_make(&home.join("master.key"), |_| random::<32>().map(Vec::from))?;
        let master: [u8; 32] = master.try_into().map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidData, "master.key must have 32 bytes")
        })?;
        let token = read_or_make(&home.join("host-token"), |_| {
            Ok(format!("host_{}\n", URL_SAFE_NO_PAD.encode(random::<32>()?)).into_bytes())
        })?;
        let token = String::from_utf8_lossy(&token).trim().to_owned();
        if token.len() < 16 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "host-token is shorter than 16 characters; remove the file to get a new one",
            ));
        }
        Ok(Keys {
            invite_codes: Key::derive(&master, b"aegis invite code v1"),
            guest_tokens: Key::derive(&master, b"aegis guest token v1"),
            cloud_marks: Key::derive(&master, b"aegis cloud mark v1"),
            lender: Lender::new(home, &Key::derive(&master, b"aegis vers owner v1")),
            host_token: hash(&token),
            vault: Vault::new(
                &Key::derive(&master, b"aegis secret store v1").0,
                Key::derive(&master, b"aegis secret placeholder v1"),
            ),
            authorities: Authorities::new(Key::derive(&master, b"aegis machine authority v1")),
            capabilities: Signer::new(&Key::derive(&master, b"aegis capability token v1").0),
        })
    }

    /// The code of an invite: `inv_` and base64url of 24 bytes.
    pub fn invite_code(&self, id: &InviteId) -> InviteCode {
        let mac = self.invite_codes.mac(id.as_str());
        format!("inv_{}", URL_SAFE_NO_PAD.encode(&mac[..24]))
            .parse()
            .expect("24 bytes are 32 characters of base64url")
    }

    /// The token of a guest: `guest_` and base64url of 32 bytes.
    pub fn guest_token(&self, id: &GuestId) -> String {
        format!("guest_{}", URL_SAFE_NO_PAD.encode(self.guest_tokens.mac(id.as_str())))
    }

    /// Tells this daemon's machines in a cloud from those of others; no secret.
    pub fn cloud_mark(&self) -> String {
        aegis_rules::audit::hex(&self.cloud_marks.mac("vers")[..8])
    }

    /// Whether this is the host's token; takes the same time for any wrong one.
    pub fn is_host_token(&self, token: &str) -> bool {
        self.host_token.0.ct_eq(&hash(token).0).into()
    }
}

/// What is stored of a secret.
pub fn hash(secret: &str) -> SecretHash {
    SecretHash(Sha256::digest(secret.as_bytes()).into())
}

/// Bytes of the operating system's randomness.
pub fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes)
}

fn ulid(now: Time) -> io::Result<String> {
    let millis = u64::try_from(now.0).unwrap_or(0);
    let noise = u128::from_be_bytes(random::<16>()?);
    Ok(ulid::Ulid::from_parts(millis, noise).to_string())
}

/// A fresh invite id.
pub fn invite_id(now: Time) -> io::Result<InviteId> {
    ulid(now)?.parse().map_err(io::Error::other)
}

/// A fresh guest id.
pub fn guest_id(now: Time) -> io::Result<GuestId> {
    ulid(now)?.parse().map_err(io::Error::other)
}

/// A fresh instance id: 80 random bits, so that it can't be guessed from its time.
pub fn instance_id(now: Time) -> io::Result<InstanceId> {
    InstanceId::from_ulid_text(&ulid(now)?).map_err(io::Error::other)
}

/// A fresh commit id.
pub fn commit_id(now: Time) -> io::Result<CommitId> {
    CommitId::from_ulid_text(&ulid(now)?).map_err(io::Error::other)
}

/// A random UUID (version 4), for boot and exec ids.
pub fn uuid() -> io::Result<String> {
    let mut b = random::<16>()?;
    b[6] = (b[6] & 0x0f) | 0x40;
    b[8] = (b[8] & 0x3f) | 0x80;
    Ok(Uuid::from_bytes(b).to_string())
}

/// Reads a secret file, or makes it (0600, synced) when there is none.
fn read_or_make(path: &Path, make: impl Fn(()) -> io::Result<Vec<u8>>) -> io::Result<Vec<u8>> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(mut file) => {
            let bytes = make(())?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            Ok(bytes)
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            let mut file = File::open(path)?;
            let mode = file.metadata()?.permissions().mode();
            if mode & 0o077 != 0 {
                file.set_permissions(Permissions::from_mode(0o600))?;
            }
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            if bytes.is_empty() {
                // A crash between creating and writing it: nothing was derived from it yet.
                std::fs::remove_file(path)?;
                return read_or_make(path, make);
            }
            Ok(bytes)
        }
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_stable_over_restarts_and_differ_between_homes() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let id = invite_id(Time(1)).unwrap();
        let guest = guest_id(Time(1)).unwrap();
        let first = Keys::open(a.path()).unwrap();
        let again = Keys::open(a.path()).unwrap();
        let other = Keys::open(b.path()).unwrap();
        assert_eq!(first.invite_code(&id), again.invite_code(&id));
        assert_eq!(first.guest_token(&guest), again.guest_token(&guest));
        assert_ne!(first.invite_code(&id), other.invite_code(&id));
        let token = std::fs::read_to_string(a.path().join("host-token")).unwrap();
        assert!(again.is_host_token(token.trim()));
        assert!(!other.is_host_token(token.trim()));
        for name in ["host-token", "master.key"] {
            let mode = std::fs::metadata(a.path().join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }
}
