//! What the host can ask for on the control stream.

use std::sync::Arc;
use std::time::Duration;

use aegis_wire::channel::guest::RenewToken;
use aegis_wire::channel::rpc::{CODE_CONFLICT, CODE_INTERNAL, CODE_METHOD, CODE_PARAMS, RpcError};
use aegis_wire::channel::{
    AwaitPort, Health, Identify, Run, SetTime, Shutdown, Signal, Started, method,
};
use aegis_wire::pipe::peer::Handler;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::machine::Machine;
use crate::{end, identity, ports, warm};

/// Answers calls.
pub struct Calls(pub Arc<Machine>);

type Answer = Result<Value, RpcError>;

impl Handler for Calls {
    async fn request(&self, name: String, params: Value) -> Answer {
        match name.as_str() {
            method::HEALTH => self.health(),
            method::IDENTIFY => self.identify(parse(params)?).await,
            method::RUN => self.run(parse(params)?).await,
            method::AWAIT_PORT => await_port(parse(params)?).await,
            method::SIGNAL => self.signal(parse(params)?),
            method::SHUTDOWN => self.shutdown(parse(params)?).await,
            method::SET_TIME => set_time(parse(params)?),
            method::RENEW_TOKEN => self.renew_token(parse(params)?),
            method::SYNC => self.0.sync().await.map(|()| json!({})),
            method::HOLD => self.0.hold().await.map(|()| json!({})),
            method::ADOPT => told(&self.0.adopt(parse(params)?).await?),
            method::QUIESCE => warm::quiesce(&self.0).await.map(|()| json!({})),
            method::WARM => warm::again(&self.0, parse(params)?).await.map(|()| json!({})),
            _ => Err(RpcError::new(CODE_METHOD, format!("{name:.40} is not a method"))),
        }
    }

    fn notification(&self, _: String, _: Value) {}
}

impl Calls {
    fn health(&self) -> Answer {
        let uptime = self.0.started.elapsed().as_millis();
        told(&Health {
            boot_id: self.0.shown_boot_id(),
            uptime_ms: u64::try_from(uptime).unwrap_or(u64::MAX),
            primary_running: *self.0.primary_alive.borrow(),
        })
    }

    async fn identify(&self, ask: Identify) -> Answer {
        let based = self.0.begin_identify()?;
        let (identified, own) =
            identity::take(&self.0, ask, based).await.map_err(|failed| failed.answer())?;
        self.0.finish_identify(identified.boot_id.clone(), own)?;
        told(&identified)
    }

    async fn run(&self, run: Run) -> Answer {
        let pid = self.0.run(run).await?;
        told(&Started { pid: pid.map_or(0, |pid| pid.as_raw_nonzero().get()) })
    }

    fn signal(&self, ask: Signal) -> Answer {
        let signal = rustix::process::Signal::from_named_raw(ask.signal)
            .ok_or_else(|| RpcError::new(CODE_PARAMS, "not a signal of Linux"))?;
        let sent = self.0.primary().is_some_and(|p| self.0.starter.reaper.signal_group(p, signal));
        match sent {
            true => Ok(json!({})),
            false => Err(RpcError::new(CODE_CONFLICT, "the primary process does not run")),
        }
    }

    fn renew_token(&self, ask: RenewToken) -> Answer {
        self.0.renew(ask.token)?;
        Ok(json!({}))
    }

    async fn shutdown(&self, ask: Shutdown) -> Answer {
        let grace = Duration::from_millis(ask.grace_ms);
        end::end(&self.0, grace).await.map_err(|e| internal(&e))?;
        Ok(json!({}))
    }
}

async fn await_port(ask: AwaitPort) -> Answer {
    match ports::until_listens(ask.port, Duration::from_millis(ask.timeout_ms)).await {
        true => Ok(json!({})),
        false => Err(RpcError::new(CODE_CONFLICT, format!("nobody listens on port {}", ask.port))),
    }
}

fn set_time(ask: SetTime) -> Answer {
    identity::set_clock(ask.unix_ns).map_err(|e| internal(&e))?;
    Ok(json!({}))
}

fn parse<T: DeserializeOwned>(params: Value) -> Result<T, RpcError> {
    serde_json::from_value(params).map_err(|e| RpcError::new(CODE_PARAMS, e.to_string()))
}

fn told(answer: &impl Serialize) -> Answer {
    serde_json::to_value(answer).map_err(|e| internal(&e))
}

/// The harness's own failure.
pub fn internal(error: &dyn std::error::Error) -> RpcError {
    RpcError::new(CODE_INTERNAL, error.to_string())
}
