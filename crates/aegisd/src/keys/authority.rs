//! A certificate authority for each machine that may use placeholders inside of TLS: it signs for the
//! hosts of that machine's proxy secrets and is trusted in that machine only (contracts/couch.md 6).
//!
//! Its key is derived, so that a restart of the daemon ends no trust, and never leaves this process.

use std::io;
use std::time::Duration;

use aegis_wire::egress::HostName;
use aegis_wire::words::{InstanceId, Time};
use p256::SecretKey;
use p256::pkcs8::EncodePrivateKey as _;
use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose, NameConstraints, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;

use super::{Key, random};

/// The longest that a machine trusts its authority: one that runs on is started anew before.
pub const TRUSTED_MAX: Duration = Duration::from_secs(30 * 86_400);
/// How long a server's certificate is valid.
pub const LEAF_VALID: Duration = Duration::from_secs(2 * 86_400);
/// Clocks that are so far behind find a certificate valid.
const BEHIND: Duration = Duration::from_secs(3_600);

/// The authorities of all machines.
pub struct Authorities(Key);

/// What a TLS server shows, and its key.
pub struct Leaf {
    /// The certificate.
    pub certificate: CertificateDer<'static>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
}

impl Authorities {
    pub(super) fn new(key: Key) -> Authorities {
        Authorities(key)
    }

    /// What a machine trusts, PEM: its authority, for these hosts and what is below them, until then,
    /// at most [`TRUSTED_MAX`].
    ///
    /// # Errors
    /// The operating system gave no randomness.
    pub fn certificate(
        &self,
        id: &InstanceId,
        hosts: &[HostName],
        from: Time,
        until: Option<Time>,
    ) -> io::Result<String> {
        let most = later(from, TRUSTED_MAX);
        let mut params = subject(id);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        // With no name permitted, none but ours would be forbidden.
        let permitted = match hosts {
            [] => vec![GeneralSubtree::DnsName("invalid".to_owned())],
            hosts => hosts.iter().map(|h| GeneralSubtree::DnsName(h.to_string())).collect(),
        };
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: permitted,
            // Names say nothing about addresses.
            excluded_subtrees: vec![
                GeneralSubtree::IpAddress(CidrSubnet::V4([0; 4], [0; 4])),
                GeneralSubtree::IpAddress(CidrSubnet::V6([0; 16], [0; 16])),
            ],
        });
        set_validity(&mut params, from, until.map_or(most, |end| end.min(most)))?;
        // The same key signs anew at every start: only the number tells the certificates apart.
        params.serial_number = Some(SerialNumber::from_slice(&random::<16>()?));
        let key = self.key(id)?;
        Ok(params.self_signed(&key).map_err(io::Error::other)?.pem())
    }

    /// A certificate for a host, which the machine takes for that host's own.
    ///
    /// # Errors
    /// The operating system gave no randomness.
    pub fn leaf(&self, id: &InstanceId, host: &HostName, now: Time) -> io::Result<Leaf> {
        let mut params =
            CertificateParams::new(vec![host.to_string()]).map_err(io::Error::other)?;
        // Its name is in the alternative names; long ones fit nowhere else.
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "placeholders of Aegis");
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(SerialNumber::from_slice(&random::<16>()?));
        set_validity(&mut params, now, later(now, LEAF_VALID))?;
        let issuer = Issuer::new(subject(id), self.key(id)?);
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let certificate = params.signed_by(&key, &issuer).map_err(io::Error::other)?;
        let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
        Ok(Leaf { certificate: certificate.into(), key })
    }

    fn key(&self, id: &InstanceId) -> io::Result<KeyPair> {
        // Of 2^32 numbers one is none of the curve's: then the next is taken.
        let secret = (0_u8..=u8::MAX)
            .find_map(|nth| SecretKey::from_slice(&self.0.mac(&format!("{id} {nth}"))).ok())
            .ok_or_else(|| io::Error::other("no number is one of the curve's"))?;
        let document = secret.to_pkcs8_der().map_err(io::Error::other)?;
        KeyPair::try_from(document.as_bytes()).map_err(io::Error::other)
    }
}

/// What a machine's authority is called, and how it signs.
fn subject(id: &InstanceId) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("Aegis, for {id} alone"));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params
}

fn later(time: Time, by: Duration) -> Time {
    Time(time.0.saturating_add(i64::try_from(by.as_millis()).unwrap_or(i64::MAX)))
}

fn set_validity(params: &mut CertificateParams, from: Time, until: Time) -> io::Result<()> {
    let date = |time: Time| {
        let seconds = time.0.div_euclid(1_000);
        OffsetDateTime::from_unix_timestamp(seconds).map_err(io::Error::other)
    };
    params.not_before = date(from)? - BEHIND;
    params.not_after = date(until)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{ServerName, UnixTime};
    use rustls::{
        CertificateError, ClientConfig, ClientConnection, Error, RootCertStore, ServerConfig,
        ServerConnection,
    };

    use super::*;
    use crate::keys::Keys;

    const NOW: Time = Time(1_800_000_000_000);

    #[derive(Debug)]
    struct Clock(Time);

    impl rustls::time_provider::TimeProvider for Clock {
        fn current_time(&self) -> Option<UnixTime> {
            let millis = u64::try_from(self.0.0).unwrap();
            Some(UnixTime::since_unix_epoch(Duration::from_millis(millis)))
        }
    }

    fn id(n: u32) -> InstanceId {
        format!("inst-01ARZ3NDEKTSV4RRFFQ6{n:06}").parse().unwrap()
    }

    fn hosts(names: &[&str]) -> Vec<HostName> {
        names.iter().map(|n| n.parse().unwrap()).collect()
    }

    /// A whole handshake: who trusts `root`, at `now`, asks for `name` and is shown `leaf`.
    fn shake(root: &str, leaf: Leaf, name: &str, now: Time) -> Result<(), Error> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(root.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let client =
            ClientConfig::builder_with_details(Arc::clone(&provider), Arc::new(Clock(now)))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth();
        let server = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![leaf.certificate], leaf.key)
            .unwrap();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut client = ClientConnection::new(Arc::new(client), name).unwrap();
        let mut server = ServerConnection::new(Arc::new(server)).unwrap();
        while client.is_handshaking() {
            let mut wire = Vec::new();
            client.write_tls(&mut wire).unwrap();
            server.read_tls(&mut wire.as_slice()).unwrap();
            server.process_new_packets()?;
            let mut wire = Vec::new();
            server.write_tls(&mut wire).unwrap();
            client.read_tls(&mut wire.as_slice()).unwrap();
            client.process_new_packets()?;
        }
        Ok(())
    }

    #[test]
    fn a_machine_trusts_its_own_authority_for_its_hosts_alone() {
        let dir = tempfile::tempdir().unwrap();
        let own = Keys::open(dir.path()).unwrap().authorities;
        let named = hosts(&["api.example.com", "x_y.example.org"]);
        let root = own.certificate(&id(1), &named, NOW, None).unwrap();
        // As it is after a restart of the daemon.
        let again = Keys::open(dir.path()).unwrap().authorities;
        let leaf = |id: &InstanceId, host: &str| again.leaf(id, &host.parse().unwrap(), NOW);
        for host in &named {
            let leaf = leaf(&id(1), host.as_str()).unwrap();
            shake(&root, leaf, host.as_str(), NOW).unwrap();
        }
        let invalid = |leaf: Leaf, name: &str| match shake(&root, leaf, name, NOW).unwrap_err() {
            Error::InvalidCertificate(why) => why,
            other => panic!("{other}"),
        };
        for other in ["example.com", "web.example.com", "evil.example"] {
            let why = format!("{:?}", invalid(leaf(&id(1), other).unwrap(), other));
            assert!(why.contains("NameConstraintViolation"), "{other}: {why}");
        }
        let why = invalid(leaf(&id(1), "api.example.com").unwrap(), "x_y.example.org");
        assert!(matches!(why, CertificateError::NotValidForNameContext { .. }), "{why:?}");
        // Another machine's authority, and another home's.
        let why = invalid(leaf(&id(2), "api.example.com").unwrap(), "api.example.com");
        assert_eq!(why, CertificateError::UnknownIssuer);
        let elsewhere = tempfile::tempdir().unwrap();
        let other = Keys::open(elsewhere.path()).unwrap().authorities;
        let strange = other.leaf(&id(1), &named[0], NOW).unwrap();
        assert!(matches!(
            invalid(strange, "api.example.com"),
            CertificateError::BadSignature | CertificateError::UnknownIssuer
        ));
    }

    #[test]
    fn trust_ends_with_the_envelope_and_at_last_after_thirty_days() {
        let dir = tempfile::tempdir().unwrap();
        let own = Keys::open(dir.path()).unwrap().authorities;
        let named = hosts(&["api.example.com"]);
        let day = |n: u64| Some(later(NOW, Duration::from_secs(n * 86_400)));
        // In the certificate itself: rustls, as a client, asks no authority how old it is.
        let says = |until: Option<Time>, from_to: [&str; 2]| {
            let root = own.certificate(&id(1), &named, NOW, until).unwrap();
            let root = CertificateDer::from_pem_slice(root.as_bytes()).unwrap();
            let dates = from_to.map(|date| [&[23, 13], date.as_bytes()].concat()).concat();
            root.windows(dates.len()).any(|bytes| bytes == dates)
        };
        assert!(says(day(2), ["270115070000Z", "270117080000Z"]));
        assert!(says(None, ["270115070000Z", "270214080000Z"]));
        assert!(says(day(90), ["270115070000Z", "270214080000Z"]));
        // Without a host it is for nobody.
        let nobody = own.certificate(&id(1), &[], NOW, None).unwrap();
        let leaf = own.leaf(&id(1), &named[0], NOW).unwrap();
        assert!(shake(&nobody, leaf, "api.example.com", NOW).is_err());
    }
}
