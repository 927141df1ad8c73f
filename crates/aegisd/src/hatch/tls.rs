//! TLS at both ends: the hatch is the server for a machine that trusts its authority, and a client
//! with the host's own roots towards the server that it was for. In between are plain requests.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aegis_wire::bounds::DOOR_HEAD_DEADLINE;
use aegis_wire::egress::HostName;
use aegis_wire::words::Time;
use rustls::ServerConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::machine::Machine;
use crate::keys::LEAF_VALID;
use crate::roots;

/// The only protocol that is spoken inside.
const ALPN: &[u8] = b"http/1.1";
/// A certificate is made anew when it is so old.
const RENEWED: Duration = LEAF_VALID.checked_div(2).unwrap();

/// What a machine was shown for each of its hosts, and since when.
#[derive(Default)]
pub(super) struct Shown(Mutex<HashMap<HostName, (Time, Arc<ServerConfig>)>>);

/// Why there is no TLS with a server.
pub(super) enum NoTls {
    /// Its certificate is not one that this host trusts, for that name; why.
    Untrusted(String),
    /// It failed otherwise.
    Failed,
}

/// A client that trusts whom this host trusts, for requests that are passed on.
pub(super) fn connector() -> TlsConnector {
    let mut config = roots::client();
    config.alpn_protocols = vec![ALPN.to_vec()];
    TlsConnector::from(Arc::new(config))
}

/// Greets the server that a machine asked for.
pub(super) async fn connect(
    connector: &TlsConnector,
    host: &str,
    stream: TcpStream,
) -> Result<client::TlsStream<TcpStream>, NoTls> {
    let name = ServerName::try_from(host.to_owned()).map_err(|_| NoTls::Failed)?;
    connector.connect(name, stream).await.map_err(|error| {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::InvalidCertificate(why)) => NoTls::Untrusted(why.to_string()),
            _ => NoTls::Failed,
        }
    })
}

/// Is the server that a machine asks for, where one of its secrets may go there.
pub(super) async fn accept<S>(
    machine: &Machine,
    host: &str,
    stream: S,
) -> io::Result<server::TlsStream<S>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let host: HostName = host.parse().map_err(io::Error::other)?;
    // No worker leads the daemon to sign for another.
    if !has_secrets(machine, &host)? {
        return Err(io::Error::other("no secret of this machine's may go there by TLS"));
    }
    let config = machine.shown.config(machine, &host)?;
    let greeted = TlsAcceptor::from(config).accept(stream);
    tokio::time::timeout(DOOR_HEAD_DEADLINE, greeted).await?
}

fn has_secrets(machine: &Machine, host: &HostName) -> io::Result<bool> {
    let ctx = &machine.app().ctx;
    let asker = machine.asker().map_err(io::Error::other)?;
    let reach = ctx.ledger.read(|f| ctx.reach(f, &asker.family, &machine.id));
    Ok(ctx.config.tls_ca && reach.map_err(io::Error::other)?.via_hatch.contains(host))
}

impl Shown {
    fn config(&self, machine: &Machine, host: &HostName) -> io::Result<Arc<ServerConfig>> {
        let ctx = &machine.app().ctx;
        let now = ctx.now();
        let mut shown = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Of hosts that are none of its own any more nothing stays.
        shown.retain(|_, (since, _)| Duration::from_millis(now.since(*since).0) < RENEWED);
        if let Some((_, config)) = shown.get(host) {
            return Ok(Arc::clone(config));
        }
        let leaf = ctx.keys.authorities.leaf(&machine.id, host, now)?;
        let mut config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![leaf.certificate], leaf.key)
            .map_err(io::Error::other)?;
        config.alpn_protocols = vec![ALPN.to_vec()];
        let config = Arc::new(config);
        shown.insert(host.clone(), (now, Arc::clone(&config)));
        Ok(config)
    }
}
