//! Capability tokens (contracts/aegis.md 3): minted at every boot, believed only after every part
//! was looked at.
//!
//! A token says what its instance may ask for. It is worth nothing by itself: whether its `jti` is
//! the current one, whether it came over its own instance's channel and whether that instance runs
//! is looked up by the [`crate::broker`].

use std::sync::Once;

use aegis_rules::capability::Capabilities;
use aegis_wire::host::CapabilityShape;
use aegis_wire::words::{DurationMs, InstanceId, Time};
use hmac::{Hmac, KeyInit as _, Mac as _};
use jsonwebtoken::crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::{Error as JwtError, ErrorKind};
use jsonwebtoken::{Algorithm, AlgorithmFamily, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

/// Who mints tokens.
const ISSUER: &str = "aegisd";
/// Longest token that is looked at, bytes.
pub const TOKEN_MAX: usize = 48 * 1024;
/// How long a token lives where no envelope ends sooner.
pub const TOKEN_LIFE: DurationMs = DurationMs(24 * DurationMs::HOUR);

/// What a token says.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claims {
    /// Always `aegisd`.
    iss: String,
    /// The instance that it was minted for.
    pub sub: InstanceId,
    /// When, seconds since 1970.
    pub iat: i64,
    /// From when on it is worth nothing, seconds since 1970.
    pub exp: i64,
    /// Names this token: the ledger knows the current one of each instance.
    pub jti: String,
    /// What the instance may do.
    pub cap: CapabilityShape,
}

impl Claims {
    /// Claims from now until `ends`, or for [`TOKEN_LIFE`] where that is sooner.
    pub fn new(
        sub: InstanceId,
        jti: String,
        cap: &Capabilities,
        now: Time,
        ends: Option<Time>,
    ) -> Claims {
        let cap = CapabilityShape::of(cap);
        let most = now.plus(TOKEN_LIFE);
        let end = ends.map_or(most, |ends| ends.min(most));
        // Rounded up: a token that outlives its envelope by less than a second is refused by the
        // envelope.
        let exp = end.0.div_euclid(1000) + 1;
        Claims { iss: ISSUER.to_owned(), sub, iat: now.0.div_euclid(1000), exp, jti, cap }
    }

    /// When another one should take its place: after three quarters of its life.
    pub fn renew_at(&self) -> Time {
        let life = self.exp.saturating_sub(self.iat).max(0);
        Time((self.iat + life / 4 * 3).saturating_mul(1000))
    }
}

/// What is wrong with a token. The words go into the audit trail, the token never does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// No token of ours: not three parts, no JSON, a claim is missing or none of ours.
    #[error("malformed")]
    Malformed,
    /// Signed in another way than HS256, or not at all.
    #[error("algorithm")]
    Algorithm,
    /// Signed with a key that is not this daemon's.
    #[error("unknown_key")]
    UnknownKey,
    /// The signature is not that of these bytes.
    #[error("signature")]
    Signature,
    /// Its time is over.
    #[error("expired")]
    Expired,
    /// It was minted in the future.
    #[error("not_yet")]
    NotYet,
}

/// The key for tokens, and its name.
pub struct Signer {
    sign: EncodingKey,
    verify: DecodingKey,
    kid: String,
}

impl Signer {
    /// From a key that serves this purpose alone.
    pub fn new(key: &[u8; 32]) -> Signer {
        static INSTALLED: Once = Once::new();
        // It is per process; the tests of one binary share it.
        INSTALLED.call_once(|| {
            let _ = PROVIDER.install_default();
        });
        let kid = mac(key, b"kid").finalize().into_bytes();
        Signer {
            sign: EncodingKey::from_secret(key),
            verify: DecodingKey::from_secret(key),
            kid: aegis_rules::audit::hex(&kid[..8]),
        }
    }

    /// A token of these claims.
    pub fn mint(&self, claims: &Claims) -> Result<String, JwtError> {
        let header = Header { kid: Some(self.kid.clone()), ..Header::new(Algorithm::HS256) };
        jsonwebtoken::encode(&header, claims, &self.sign)
    }

    /// What a token says, if this daemon said it and its time is not over.
    pub fn verify(&self, token: &str, now: Time) -> Result<Claims, Flaw> {
        if token.len() > TOKEN_MAX {
            return Err(Flaw::Malformed);
        }
        let header = jsonwebtoken::decode_header(token).map_err(|_| unreadable(token))?;
        if header.alg != Algorithm::HS256 {
            return Err(Flaw::Algorithm);
        }
        if header.kid.as_deref() != Some(self.kid.as_str()) {
            return Err(Flaw::UnknownKey);
        }
        if header != (Header { kid: header.kid.clone(), ..Header::new(Algorithm::HS256) }) {
            return Err(Flaw::Malformed);
        }
        let mut validation = Validation::new(Algorithm::HS256);
        validation.set_issuer(&[ISSUER]);
        validation.set_required_spec_claims(&["exp", "iss", "sub"]);
        // The daemon has its own clock, which no change of the wall clock moves: looked at below.
        validation.validate_exp = false;
        validation.leeway = 0;
        let claims = jsonwebtoken::decode::<Claims>(token, &self.verify, &validation)
            .map_err(|e| match e.kind() {
                ErrorKind::InvalidSignature => Flaw::Signature,
                ErrorKind::InvalidAlgorithm => Flaw::Algorithm,
                _ => Flaw::Malformed,
            })?
            .claims;
        let seconds = now.0.div_euclid(1000);
        if seconds >= claims.exp {
            return Err(Flaw::Expired);
        }
        if claims.iat > seconds {
            return Err(Flaw::NotYet);
        }
        Ok(claims)
    }
}

/// Tells a header with an algorithm that is none of JWT's own (`none`) from one that is no header.
fn unreadable(token: &str) -> Flaw {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    let head = token.split('.').next().unwrap_or_default();
    let parsed = URL_SAFE_NO_PAD
        .decode(head)
        .ok()
        .and_then(|bytes| serde_json::from_slice::<serde_json::Value>(&bytes).ok());
    match parsed.as_ref().and_then(|h| h.get("alg")) {
        Some(alg) if alg != "HS256" => Flaw::Algorithm,
        _ => Flaw::Malformed,
    }
}

fn mac(key: &[u8], message: &[u8]) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(message);
    mac
}

/// HS256 over the HMAC that all other secrets of the daemon are made with, and nothing else: the
/// crate's own providers would bring RSA and curves along.
static PROVIDER: CryptoProvider = CryptoProvider {
    signer_factory: |algorithm, key| {
        only_hs256(*algorithm, key.family())?;
        Ok(Box::new(Hs256(key.as_bytes().to_vec())))
    },
    verifier_factory: |algorithm, key| {
        only_hs256(*algorithm, key.family())?;
        Ok(Box::new(Hs256(key.try_get_as_bytes()?.to_vec())))
    },
    key_utils: KeyUtils::new_unimplemented(),
};

fn only_hs256(algorithm: Algorithm, family: AlgorithmFamily) -> Result<(), JwtError> {
    if algorithm == Algorithm::HS256 && family == AlgorithmFamily::Hmac {
        Ok(())
    } else {
        Err(ErrorKind::InvalidAlgorithm.into())
    }
}

struct Hs256(Vec<u8>);

impl signature::Signer<Vec<u8>> for Hs256 {
    fn try_sign(&self, message: &[u8]) -> Result<Vec<u8>, signature::Error> {
        Ok(mac(&self.0, message).finalize().into_bytes().to_vec())
    }
}

impl signature::Verifier<Vec<u8>> for Hs256 {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        // In constant time.
        mac(&self.0, message).verify_slice(signature).map_err(|_| signature::Error::new())
    }
}

impl JwtSigner for Hs256 {
    fn algorithm(&self) -> Algorithm {
        Algorithm::HS256
    }
}

impl JwtVerifier for Hs256 {
    fn algorithm(&self) -> Algorithm {
        Algorithm::HS256
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use serde_json::{Value, json};

    use super::*;

    const NOW: Time = Time(1_800_000_000_000);

    fn claims() -> Claims {
        let id = "inst-01ARZ3NDEKTSV4RRFFQ69G5FAV".parse().unwrap();
        Claims::new(id, "jti-1".to_owned(), &Capabilities::default(), NOW, None)
    }

    fn encode(part: &Value) -> String {
        URL_SAFE_NO_PAD.encode(part.to_string())
    }

    /// Signs whatever header and claims with a key.
    fn forge(key: &[u8; 32], header: &Value, claims: &Value) -> String {
        let message = format!("{}.{}", encode(header), encode(claims));
        let signature = mac(key, message.as_bytes()).finalize().into_bytes();
        format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    fn parts(token: &str) -> (Value, Value) {
        let mut parts = token
            .split('.')
            .take(2)
            .map(|p| serde_json::from_slice(&URL_SAFE_NO_PAD.decode(p).unwrap()).unwrap());
        (parts.next().unwrap(), parts.next().unwrap())
    }

    #[test]
    fn what_was_minted_is_believed_until_its_end() {
        let signer = Signer::new(&[7; 32]);
        let token = signer.mint(&claims()).unwrap();
        assert!(signer.verify(&token, NOW).is_ok_and(|c| c == claims()));
        let (header, said) = parts(&token);
        assert_eq!(header["alg"], "HS256");
        assert!(header["kid"].is_string());
        assert_eq!(said["iss"], "aegisd");
        assert_eq!(said["cap"]["spawn"], false);
        let end = Time(claims().exp * 1000);
        assert!(signer.verify(&token, Time(end.0 - 1)).is_ok());
        assert_eq!(signer.verify(&token, end).err(), Some(Flaw::Expired));
        assert_eq!(signer.verify(&token, Time(NOW.0 - 2000)).err(), Some(Flaw::NotYet));
        let quarter = Time(NOW.0 + 18 * 3_600_000);
        assert_eq!(claims().renew_at(), quarter);
    }

    #[test]
    fn an_envelope_ends_its_tokens() {
        let ends = Some(NOW.plus(DurationMs(90_000)));
        let short = Claims {
            iat: 0,
            ..Claims::new(claims().sub, "j".into(), &Capabilities::default(), NOW, ends)
        };
        assert_eq!(short.exp, NOW.0 / 1000 + 91);
        let late = Some(NOW.plus(DurationMs(90 * DurationMs::HOUR)));
        let capped = Claims::new(claims().sub, "j".into(), &Capabilities::default(), NOW, late);
        assert_eq!(capped.exp, claims().exp);
    }

    #[test]
    fn nothing_else_is_believed() {
        let key = [7; 32];
        let signer = Signer::new(&key);
        let token = signer.mint(&claims()).unwrap();
        let (header, said) = parts(&token);
        let with = |part: &Value, name: &str, value: Value| {
            let mut part = part.clone();
            part[name] = value;
            part
        };
        let without = |part: &Value, name: &str| {
            let mut part = part.clone();
            part.as_object_mut().unwrap().remove(name);
            part
        };
        let flaw = |token: &str| signer.verify(token, NOW).err();

        assert!(signer.verify(&forge(&key, &header, &said), NOW).is_ok(), "forge() signs as we do");
        for alg in ["none", "None", "HS384", "HS512", "RS256", "ES256", "EdDSA", ""] {
            let header = with(&header, "alg", json!(alg));
            assert_eq!(flaw(&forge(&key, &header, &said)), Some(Flaw::Algorithm), "{alg}");
            let bare = format!("{}.{}.", encode(&header), encode(&said));
            assert_eq!(flaw(&bare), Some(Flaw::Algorithm), "{alg} unsigned");
        }
        assert_eq!(flaw(&forge(&key, &without(&header, "alg"), &said)), Some(Flaw::Malformed));
        assert_eq!(flaw(&forge(&key, &without(&header, "kid"), &said)), Some(Flaw::UnknownKey));
        let other_kid = with(&header, "kid", json!("0011223344556677"));
        assert_eq!(flaw(&forge(&key, &other_kid, &said)), Some(Flaw::UnknownKey));
        for (name, value) in
            [("jku", json!("http://x")), ("crit", json!(["x"])), ("typ", json!("x"))]
        {
            assert_eq!(
                flaw(&forge(&key, &with(&header, name, value), &said)),
                Some(Flaw::Malformed),
                "{name}"
            );
        }

        assert_eq!(flaw(&forge(&[8; 32], &header, &said)), Some(Flaw::Signature));
        let other = Signer::new(&[8; 32]).mint(&claims()).unwrap();
        assert_eq!(flaw(&other), Some(Flaw::UnknownKey));
        let (message, signature) = token.rsplit_once('.').unwrap();
        for broken in ["", "AAAA", &signature[4..]] {
            assert_eq!(flaw(&format!("{message}.{broken}")), Some(Flaw::Signature), "{broken}");
        }
        // Greater powers under the old signature.
        let (head, _) = message.split_once('.').unwrap();
        let mut more = said.clone();
        more["cap"]["spawn"] = json!(true);
        assert_eq!(flaw(&format!("{head}.{}.{signature}", encode(&more))), Some(Flaw::Signature));

        for claim in ["iss", "sub", "iat", "exp", "jti", "cap"] {
            let token = forge(&key, &header, &without(&said, claim));
            assert_eq!(flaw(&token), Some(Flaw::Malformed), "without {claim}");
        }
        for (claim, value) in [
            ("iss", json!("me")),
            ("iss", json!(["aegisd"])),
            ("sub", json!("inst-x")),
            ("exp", json!("9999999999")),
            ("exp", json!(1e300)),
            ("iat", json!(null)),
            ("jti", json!(5)),
            ("cap", json!({})),
            ("extra", json!(1)),
        ] {
            let token = forge(&key, &header, &with(&said, claim, value.clone()));
            assert_eq!(flaw(&token), Some(Flaw::Malformed), "{claim}: {value}");
        }
        for text in [
            "",
            ".",
            "..",
            "...",
            "a.b.c",
            &token[1..],
            &format!("{token}.x"),
            &"x".repeat(TOKEN_MAX + 1),
        ] {
            assert!(flaw(text).is_some(), "{text}");
        }
    }

    #[test]
    fn no_bit_of_a_token_may_change() {
        let signer = Signer::new(&[7; 32]);
        let token = signer.mint(&claims()).unwrap();
        for at in 0..token.len() {
            for flip in [1_u8, 2, 4, 32] {
                let mut bytes = token.clone().into_bytes();
                bytes[at] ^= flip;
                let Ok(other) = String::from_utf8(bytes) else { continue };
                assert!(signer.verify(&other, NOW).is_err(), "{at} {flip}: {other}");
            }
        }
    }
}
