//! LLM calls in the ledger: what they may cost is reserved before them, what they did is settled
//! after them.

use aegis_rules::change::{Change, LlmCall};
use aegis_rules::given;
use aegis_rules::instance::Instance;
use aegis_rules::refusal::{Code, Refusal};
use aegis_rules::tokens::{self, Ask, Reserved, Short};
use aegis_wire::words::{InstanceId, LlmTokens};

use super::{App, Error, instance_not_found};
use crate::ledger::WriteError;

/// An instance whose machine asks, as it stands now.
pub struct Asker {
    /// Its record.
    pub instance: Instance,
    /// All records of its tree.
    pub family: Vec<Instance>,
}

impl Asker {
    /// Whether it may use this model, as far as it and all above it go.
    pub fn may_use(&self, model: &str) -> bool {
        given::may_use(&self.family, &self.instance.id, model)
    }
}

/// An instance that the hatch serves.
///
/// # Errors
/// Why it does not.
pub fn asker(app: &App, id: &InstanceId) -> Result<Asker, Error> {
    let now = app.ctx.now();
    let found = app.ctx.ledger.read(|f| {
        let Some(instance) = f.instance(id)? else { return Ok(None) };
        let (family, guest) = (f.family(&instance.tree)?, f.guest_of(&instance)?);
        Ok(Some((instance, family, guest)))
    })?;
    let (instance, family, guest) = found.ok_or_else(instance_not_found)?;
    tokens::is_served(&instance, guest.as_ref(), now)?;
    Ok(Asker { instance, family })
}

/// Whether the hatch serves an instance still; cheap, for whoever looks often.
pub fn is_served(app: &App, id: &InstanceId) -> bool {
    let now = app.ctx.now();
    let served = app.ctx.ledger.read(|f| match f.instance(id)? {
        Some(instance) => {
            let guest = f.guest_of(&instance)?;
            Ok(tokens::is_served(&instance, guest.as_ref(), now).is_ok())
        }
        None => Ok(false),
    });
    served.unwrap_or(false)
}

/// Why nothing was reserved.
pub enum NotReserved {
    /// The law said no.
    Short(Short),
    /// This host failed: how.
    Ours(String),
}

/// Reserves the most that a call may cost; on disk when this returns.
///
/// # Errors
/// Why the call may not begin.
pub async fn reserve(
    app: &App,
    id: &InstanceId,
    call: &str,
    ask: Ask,
) -> Result<Reserved, NotReserved> {
    let (now, id, call) = (app.ctx.now(), id.clone(), call.to_owned());
    let actor = format!("instance:{id}");
    // A refusal stops the write; why is for the asker.
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    let written = app.ctx.ledger.write(&actor, move |facts| {
        let instance = facts.instance(&id)?.ok_or_else(instance_not_found)?;
        let (family, guest) = (facts.family(&instance.tree)?, facts.guest_of(&instance)?);
        match tokens::reserve(&family, guest.as_ref(), &id, &call, &ask, now) {
            Ok((change, reserved)) => Ok((vec![change], reserved)),
            Err(short) => {
                let _ = tell.send(short);
                Err(Refusal::new(Code::EnvelopeExhausted, "the call may not begin").into())
            }
        }
    });
    match written.await {
        Ok(reserved) => Ok(reserved),
        Err(WriteError::Ledger(error)) => {
            Err(NotReserved::Ours(format!("{:#}", anyhow::Error::from(error))))
        }
        Err(WriteError::Refused(refusal)) => {
            Err(NotReserved::Short(told.try_recv().unwrap_or(Short::Ended(refusal))))
        }
    }
}

/// Settles a call.
pub async fn settle(
    app: &App,
    id: &InstanceId,
    call: String,
    of: LlmCall,
    reserved: u64,
    spent: u64,
) -> Result<(), WriteError> {
    let change = Change::TokensSettled {
        id: id.clone(),
        call,
        of: Some(Box::new(of)),
        reserved: LlmTokens(reserved),
        spent: LlmTokens(spent),
        at: app.ctx.now(),
    };
    app.ctx.ledger.write(&format!("instance:{id}"), move |_| Ok((vec![change], ()))).await
}

/// Settles what calls of a daemon that died had reserved; before any new call is taken.
pub async fn settle_lost(ctx: &crate::ctx::Ctx) -> Result<(), WriteError> {
    let now = ctx.now();
    ctx.ledger
        .write("aegisd", move |facts| {
            let open = facts.with_reserved_tokens()?;
            Ok((open.iter().filter_map(|i| tokens::settle_lost(i, now)).collect(), ()))
        })
        .await
}
