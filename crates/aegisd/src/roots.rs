//! Whom this host trusts, for everybody here who speaks TLS to others.

use hyper_rustls::ConfigBuilderExt as _;
use rustls::{ClientConfig, RootCertStore};

/// A client that trusts whom this host trusts.
pub fn client() -> ClientConfig {
    let with = match ClientConfig::builder().with_native_roots() {
        Ok(with) => with,
        Err(error) => {
            tracing::warn!(%error, "no CA certificates here: nobody is reached by https");
            ClientConfig::builder().with_root_certificates(RootCertStore::empty())
        }
    };
    with.with_no_client_auth()
}
