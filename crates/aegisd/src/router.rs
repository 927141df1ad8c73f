//! Public ports of the host that lead into machines, through their workers and channels.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use aegis_rules::instance::Expose;
use aegis_wire::bounds::STREAMS_MAX;
use aegis_wire::words::{InstanceId, Port};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::AbortHandle;

use crate::lifecycle::Lifecycle;

/// Ports that are tried before giving up on a free one.
const TRIES: u32 = 200;
/// Between two tries to accept where the first failed.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// The open public ports; cheap to clone.
#[derive(Clone, Default)]
pub struct Router {
    inner: Arc<Mutex<HashMap<(InstanceId, Port), Open>>>,
}

struct Open {
    public: Port,
    task: AbortHandle,
    connections: Arc<AtomicU64>,
}

impl Router {
    /// Listens for an exposed port: on its recorded public port, else on a free one of the range.
    /// Repeats are fine.
    pub async fn open(
        &self,
        lifecycle: &Lifecycle,
        id: &InstanceId,
        expose: &Expose,
    ) -> io::Result<Port> {
        let key = (id.clone(), expose.guest_port);
        if let Some(open) = self.lock().get(&key) {
            return Ok(open.public);
        }
        let config = &lifecycle.ctx().config;
        let (listener, public) = match expose.public_port {
            Some(port) => (bind(config.ports_bind, port.get()).await?, port),
            None => free(config.ports_bind, config.ports).await?,
        };
        let mut ports = self.lock();
        if let Some(open) = ports.get(&key) {
            // Somebody was quicker while this one was bound.
            return Ok(open.public);
        }
        let connections = Arc::new(AtomicU64::new(0));
        let serving = serve(
            lifecycle.clone(),
            listener,
            id.clone(),
            expose.guest_port.get(),
            Arc::clone(&connections),
        );
        let task = tokio::spawn(serving).abort_handle();
        ports.insert(key, Open { public, task, connections });
        Ok(public)
    }

    /// Closes all public ports of an instance, with their connections.
    pub fn close(&self, id: &InstanceId) {
        self.lock().retain(|(of, _), open| {
            if of == id {
                open.task.abort();
            }
            of != id
        });
    }

    /// Closes one public port of an instance, with its connections.
    pub fn close_port(&self, id: &InstanceId, port: Port) {
        if let Some(open) = self.lock().remove(&(id.clone(), port)) {
            open.task.abort();
        }
    }

    /// Closes those public ports of an instance that it does not expose any more.
    pub fn keep(&self, id: &InstanceId, exposes: &[Expose]) {
        self.lock().retain(|(of, port), open| {
            let kept = of != id || exposes.iter().any(|e| e.guest_port == *port);
            if !kept {
                open.task.abort();
            }
            kept
        });
    }

    /// Connections to an instance now.
    pub fn connections(&self, id: &InstanceId) -> u64 {
        self.lock()
            .iter()
            .filter(|((of, _), _)| of == id)
            .map(|(_, open)| open.connections.load(Ordering::Relaxed))
            .sum()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(InstanceId, Port), Open>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn bind(address: IpAddr, port: u16) -> io::Result<TcpListener> {
    TcpListener::bind(SocketAddr::new(address, port)).await
}

/// A free port of the range; the kernel's answer to bind decides, so that no two get the same.
async fn free(address: IpAddr, (first, last): (u16, u16)) -> io::Result<(TcpListener, Port)> {
    let span = u32::from(last - first) + 1;
    let mut last_error = io::Error::other("no port of the range is free");
    for _ in 0..TRIES.min(span * 4) {
        let noise = u32::from_be_bytes(crate::keys::random::<4>()?);
        let port = first + u16::try_from(noise % span).unwrap_or(0);
        match bind(address, port).await {
            Ok(listener) => {
                let port = Port::try_from(u64::from(port)).map_err(io::Error::other)?;
                return Ok((listener, port));
            }
            Err(error) => last_error = error,
        }
    }
    Err(last_error)
}

async fn serve(
    lifecycle: Lifecycle,
    listener: TcpListener,
    id: InstanceId,
    port: u16,
    connections: Arc<AtomicU64>,
) {
    // More than the channel carries would only wait there.
    let slots = Arc::new(Semaphore::new(STREAMS_MAX));
    // Aborting this task drops the set, and so the connections.
    let mut open = tokio::task::JoinSet::new();
    loop {
        while open.try_join_next().is_some() {}
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let Ok((client, _)) = listener.accept().await else {
            // Out of descriptors, most likely: asking at once again would only burn time.
            tokio::time::sleep(ACCEPT_AGAIN).await;
            continue;
        };
        let (lifecycle, id) = (lifecycle.clone(), id.clone());
        let connections = Arc::clone(&connections);
        open.spawn(async move {
            connections.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = carry(&lifecycle, &id, port, client).await {
                tracing::debug!(instance = %id, port, %error, "a connection ended");
            }
            connections.fetch_sub(1, Ordering::Relaxed);
            drop(slot);
        });
    }
}

/// Copies both directions, each closing on its own.
async fn carry(
    lifecycle: &Lifecycle,
    id: &InstanceId,
    port: u16,
    mut client: TcpStream,
) -> anyhow::Result<()> {
    client.set_nodelay(true)?;
    let mut machine = lifecycle.reach_port(id, port).await?;
    tokio::io::copy_bidirectional(&mut client, &mut machine).await?;
    Ok(())
}
