//! A certificate authority of this process alone, and the servers' certificate.

use std::net::IpAddr;
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// Names that the servers' certificate is for; beside them all addresses.
const NAMES: [&str; 10] = [
    "allowed.test",
    "*.allowed.test",
    "git.test",
    "other.test",
    "beside.test",
    "v4only.test",
    "v6only.test",
    "many.test",
    "cname.test",
    "turns.test",
];

/// What TLS servers need, and the authority's certificate, PEM.
pub(super) fn open(addresses: &[IpAddr]) -> (TlsAcceptor, String) {
    let mut params = CertificateParams::default();
    // Else both certificates have one name, and the servers' looks like one that signed itself.
    params.distinguished_name.push(DnType::CommonName, "Aegis tests' authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let mut params = CertificateParams::new(NAMES.map(str::to_owned)).unwrap();
    params.distinguished_name.push(DnType::CommonName, "Aegis tests' outside");
    params.subject_alt_names.extend(addresses.iter().map(|a| SanType::IpAddress(*a)));
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &authority).unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    (TlsAcceptor::from(Arc::new(config)), authority.pem())
}
