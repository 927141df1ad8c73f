//! What a machine's own calls need of its worker (contracts/aegis.md 5).

use aegis_rules::instance::Instance;
use aegis_wire::bounds::RPC_DEADLINE;
use aegis_wire::words::{InstanceId, Time};
use aegis_wire::worker::Request;

use super::worker::{self, Connection, WorkerError};
use crate::ctx::Ctx;
use crate::tokens::{Claims, TOKEN_LIFE};

/// Begins to serve a machine's calls; what follows on the connection are its
/// [`aegis_wire::worker::Brokered`] lines.
pub async fn serve_calls(ctx: &Ctx, id: &InstanceId) -> Result<Connection, WorkerError> {
    worker::ask(ctx, id, &Request::Broker, RPC_DEADLINE).await
}

/// Opens a stream into a machine, named by a ticket; what is written there is the machine's.
pub async fn open_bulk(
    ctx: &Ctx,
    id: &InstanceId,
    ticket: String,
) -> Result<Connection, WorkerError> {
    worker::ask(ctx, id, &Request::GuestStream { ticket }, RPC_DEADLINE).await
}

/// Hands a machine another capability token.
pub(super) async fn renew_token(
    ctx: &Ctx,
    id: &InstanceId,
    token: String,
) -> Result<(), WorkerError> {
    worker::ask(ctx, id, &Request::RenewToken { token }, RPC_DEADLINE).await.map(drop)
}

/// A fresh token, and when it is to be renewed; never where a later one would not live longer.
pub(super) fn mint(
    ctx: &Ctx,
    instance: &Instance,
    jti: &str,
) -> Result<(String, Option<Time>), WorkerError> {
    let now = ctx.now();
    let cap = &instance.capabilities;
    let claims = Claims::new(instance.id.clone(), jti.to_owned(), cap, now, instance.ends_at);
    let token = ctx
        .keys
        .capabilities
        .mint(&claims)
        .map_err(|e| WorkerError::Program(format!("no token could be made: {e}")))?;
    let final_one = instance.ends_at.is_some_and(|ends| ends <= now.plus(TOKEN_LIFE));
    Ok((token, (!final_one).then(|| claims.renew_at())))
}
