//! The control stream: answers as a harness does, up to the point where it is told to misbehave.

use std::sync::{Arc, Mutex};

use aegis_wire::channel::rpc::{CODE_INTERNAL, Message, RpcError};
use aegis_wire::channel::{Health, Identified, Identify, Run, Started, method};
use aegis_wire::pipe::mux::{Mux, Stream};
use aegis_wire::pipe::{read_message, write_message};
use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::watch;

use crate::attack;
use crate::port::Port;

/// What all sessions share.
pub struct Machine {
    /// The port.
    pub port: Arc<Port>,
    boot_id: Mutex<String>,
    mode: watch::Sender<String>,
}

impl Machine {
    /// As good as any, until now.
    pub fn new(port: Arc<Port>) -> Machine {
        Machine { port, boot_id: Mutex::default(), mode: watch::Sender::new(String::new()) }
    }

    /// How it misbehaves; empty before it runs.
    pub fn mode(&self) -> watch::Receiver<String> {
        self.mode.subscribe()
    }
}

/// One session.
pub async fn serve(machine: Arc<Machine>, mux: Mux, stream: Stream) {
    let (mut read, mut write) = tokio::io::split(stream);
    // A session was lost: the next one is no better.
    let mode = machine.mode.borrow().clone();
    if !mode.is_empty() {
        return misbehave(&machine, &mode, mux, read, write).await;
    }
    while let Ok(Some(Message { id: Some(id), method: Some(name), params, .. })) =
        read_message(&mut read).await
    {
        let answer = match name.as_str() {
            method::IDENTIFY => identify(&machine, id, params, &mut write).await,
            method::RUN => {
                let run: Run = serde_json::from_value(params).unwrap();
                let started = serde_json::to_value(Started { pid: 1 }).unwrap();
                let _ = write_message(&mut write, &Message::answer(id, Ok(started))).await;
                let mode = run.command[0].clone();
                machine.mode.send_replace(mode.clone());
                return misbehave(&machine, &mode, mux, read, write).await;
            }
            _ => polite(&machine, &name),
        };
        if write_message(&mut write, &Message::answer(id, answer)).await.is_err() {
            return;
        }
    }
}

/// What a harness answers.
fn polite(machine: &Machine, name: &str) -> Result<Value, RpcError> {
    Ok(match name {
        method::HEALTH => {
            let boot_id = machine.boot_id.lock().unwrap().clone();
            serde_json::to_value(Health { boot_id, uptime_ms: 1, primary_running: true }).unwrap()
        }
        _ => json!({}),
    })
}

/// The host name tells how.
async fn identify(
    machine: &Machine,
    id: u64,
    params: Value,
    write: &mut WriteHalf<Stream>,
) -> Result<Value, RpcError> {
    let ask: Identify = serde_json::from_value(params).unwrap();
    let mut identified =
        Identified { boot_id: ask.boot_id.clone(), kernel: "6.6.6-hostile".to_owned() };
    match ask.hostname.as_str() {
        "half-identify" => {
            let whole = serde_json::to_vec(&Message::answer(id, Ok(json!(identified)))).unwrap();
            let _ = write.write_all(&(whole.len() as u32).to_be_bytes()).await;
            let _ = write.write_all(&whole[..whole.len() / 2]).await;
            let _ = write.flush().await;
            std::future::pending::<()>().await;
        }
        "twin" => identified.boot_id = "6ba7b810-9dad-11d1-80b4-00c04fd430c8".to_owned(),
        "loud-twin" => identified.boot_id = "x".repeat(900_000),
        "loud-refusal" => return Err(RpcError::new(CODE_INTERNAL, "\u{1b}[31mno ".repeat(60_000))),
        "wrong-shape" => return Ok(json!([[[[{"boot_id": 7}]]]])),
        _ => {}
    }
    *machine.boot_id.lock().unwrap() = ask.boot_id;
    Ok(json!(identified))
}

async fn misbehave(
    machine: &Arc<Machine>,
    mode: &str,
    mux: Mux,
    mut read: ReadHalf<Stream>,
    mut write: WriteHalf<Stream>,
) {
    if mode != "polite" {
        return attack::control(machine, mode, &mux, read, write).await;
    }
    while let Ok(Some(Message { id: Some(id), method: Some(name), .. })) =
        read_message(&mut read).await
    {
        let answer = Message::answer(id, polite(machine, &name));
        if write_message(&mut write, &answer).await.is_err() {
            return;
        }
    }
}
