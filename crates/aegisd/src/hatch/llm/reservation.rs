//! What was reserved for one call, until it is settled. However a call ends, it is: who drops it
//! settles all of it,
//! or nothing where the vendor was not asked.

use aegis_rules::change::LlmCall;
use aegis_rules::tokens::{self, Ask, Reserved};
use aegis_wire::words::InstanceId;

use crate::app::App;
use crate::app::llm::{self, NotReserved};
use crate::keys;

/// An open reservation.
pub(super) struct Reservation {
    /// Taken when it is settled.
    open: Option<Open>,
    /// Whether the vendor may have heard of the call.
    asked: bool,
}

struct Open {
    app: App,
    id: InstanceId,
    call: String,
    provider: String,
    model: String,
    amount: u64,
}

impl Reservation {
    /// Reserves the most that a call may cost; on disk when this returns.
    pub(super) async fn make(
        app: &App,
        id: &InstanceId,
        provider: &str,
        model: &str,
        ask: Ask,
    ) -> Result<(Reservation, Reserved), NotReserved> {
        let call = keys::uuid().map_err(|e| NotReserved::Ours(e.to_string()))?;
        let (app, id) = (app.clone(), id.clone());
        let (provider, model) = (provider.to_owned(), model.to_owned());
        // In a task of its own: who leaves while it is written leaves nothing reserved.
        let made = tokio::spawn(async move {
            let reserved = llm::reserve(&app, &id, &call, ask).await?;
            let open = Open { app, id, call, provider, model, amount: reserved.amount };
            Ok((Reservation { open: Some(open), asked: false }, reserved))
        });
        made.await.unwrap_or_else(|e| Err(NotReserved::Ours(e.to_string())))
    }

    /// From now on the vendor may hear of it.
    pub(super) fn ask(&mut self) {
        self.asked = true;
    }

    /// Settles what the vendor reported; all where it reported nothing. On disk when this returns.
    pub(super) async fn settle(mut self, reported: Option<u64>, end: &'static str) {
        let Some(open) = self.open.take() else { return };
        // In a task of its own: who leaves while it is written does not stop it.
        let _ = tokio::spawn(open.settle(reported, end)).await;
    }
}

impl Open {
    async fn settle(self, reported: Option<u64>, end: &'static str) {
        let Open { app, id, call, provider, model, amount } = self;
        if let Some(more) = reported.filter(|told| *told > amount) {
            tracing::warn!(instance = %id, call, provider, reserved = amount, reported = more,
                "a vendor reports more than was reserved; what was reserved is counted");
        }
        let spent = tokens::spent(amount, reported);
        let of = LlmCall { provider, model, end };
        if let Err(error) = llm::settle(&app, &id, call, of, amount, spent).await {
            // It stays reserved, and is settled as a whole at the next start.
            tracing::error!(instance = %id, %error, "a call was not settled");
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let Some(open) = self.open.take() else { return };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let told = if self.asked { None } else { Some(0) };
            runtime.spawn(open.settle(told, "left"));
        }
    }
}
