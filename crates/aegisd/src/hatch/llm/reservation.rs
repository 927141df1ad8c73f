//! What was reserved for one call, until it is settled. However a call ends, it is: who drops it
//! settles all of it.

use aegis_rules::change::LlmCall;
use aegis_rules::tokens;
use aegis_wire::words::InstanceId;

use crate::app::{App, llm};

/// An open reservation.
pub(super) struct Reservation {
    /// Taken when it is settled.
    open: Option<Open>,
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
    pub(super) fn new(
        app: &App,
        id: &InstanceId,
        call: String,
        provider: &str,
        model: &str,
        amount: u64,
    ) -> Reservation {
        let open = Open {
            app: app.clone(),
            id: id.clone(),
            call,
            provider: provider.to_owned(),
            model: model.to_owned(),
            amount,
        };
        Reservation { open: Some(open) }
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
            runtime.spawn(open.settle(None, "left"));
        }
    }
}
