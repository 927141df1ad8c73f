//! Both ends of a channel over an in-memory byte pipe.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::peer::{CallError, Handler, NoCalls, Peer};
use super::session::{Ended, Pipe, SESSION_BUFFER};
use super::{mux, read_message, write_message};
use crate::channel::StreamHead;
use crate::channel::rpc::{CODE_METHOD, RpcError};
use crate::json::values;

struct Echo;

impl Handler for Echo {
    async fn request(&self, method: String, params: Value) -> Result<Value, RpcError> {
        match method.as_str() {
            "echo" => Ok(params),
            "hang" => std::future::pending().await,
            _ => Err(RpcError::new(CODE_METHOD, "no such method")),
        }
    }

    fn notification(&self, _: String, _: Value) {}
}

/// A machine's side: serves every session, echoes on port streams.
async fn machine(pipe: tokio::io::DuplexStream) {
    let mut pipe = Pipe::new(pipe);
    let mut epoch = pipe.accept().await.unwrap();
    while let Some(now) = epoch {
        let (app, ours) = tokio::io::duplex(SESSION_BUFFER);
        let (mux, mut inbound) = mux::start(ours, false);
        tokio::spawn(async move {
            let mut peers = Vec::new();
            while let Some(mut stream) = inbound.recv().await {
                match read_message(&mut stream).await {
                    Ok(Some(StreamHead::Control)) => peers.push(Peer::start(stream, Echo)),
                    Ok(Some(StreamHead::Port { .. })) => {
                        tokio::spawn(async move {
                            let (mut r, mut w) = tokio::io::split(stream);
                            tokio::io::copy(&mut r, &mut w).await.ok();
                            w.shutdown().await.ok();
                        });
                    }
                    _ => {}
                }
            }
        });
        epoch = match pipe.serve(now, app).await.unwrap() {
            Ended::NewEpoch(next) => Some(next),
            Ended::Bye => {
                mux.closed().await;
                pipe.acknowledge(now).await.unwrap();
                pipe.accept().await.unwrap()
            }
            Ended::Closed => None,
        };
    }
}

async fn control(mux: &mux::Mux) -> Peer {
    let mut stream = mux.open().await.unwrap();
    write_message(&mut stream, &StreamHead::Control).await.unwrap();
    Peer::start(stream, NoCalls)
}

#[tokio::test]
async fn sessions_come_and_go_over_one_pipe() {
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    tokio::spawn(machine(theirs));
    let mut pipe = Pipe::new(ours);
    for round in 0..20u8 {
        let epoch = [round; 8];
        pipe.open(epoch).await.unwrap();
        let (app, session) = tokio::io::duplex(SESSION_BUFFER);
        let (mux, _inbound) = mux::start(session, true);
        let talk = async {
            let peer = control(&mux).await;
            let deadline = Duration::from_secs(5);
            let answer: Value = peer.call("echo", &json!({"n": round}), deadline).await.unwrap();
            assert_eq!(answer, json!({"n": round}));
            let refused = peer.call::<_, Value>("nope", &json!(null), deadline).await;
            assert!(matches!(refused, Err(CallError::Refused { .. })));
            let late = peer.call::<_, Value>("hang", &json!(null), Duration::from_millis(20)).await;
            assert!(matches!(late, Err(CallError::Deadline { .. })));
            // Bulk through a port stream, with half-close.
            let mut stream = mux.open().await.unwrap();
            write_message(&mut stream, &StreamHead::Port { port: 1 }).await.unwrap();
            let (mut r, mut w) = tokio::io::split(stream);
            let sent: Vec<u8> = (0..300_000u32).map(|i| i as u8).collect();
            let copy = sent.clone();
            let writer = tokio::spawn(async move {
                w.write_all(&copy).await.unwrap();
                w.shutdown().await.unwrap();
                w
            });
            let mut got = Vec::new();
            r.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, sent);
            drop(writer.await.unwrap());
            // Left in mid-stream: the next session must not see any of it.
            let mut rude = mux.open().await.unwrap();
            write_message(&mut rude, &StreamHead::Port { port: 1 }).await.unwrap();
            rude.write_all(&sent).await.unwrap();
        };
        tokio::select! {
            () = talk => {}
            ended = pipe.carry(epoch, app) => panic!("the session ended: {ended:?}"),
        }
        // Some sessions are ended in order, others by the next one.
        if round % 2 == 0 {
            pipe.leave(epoch).await.unwrap();
        }
    }
}

/// An echo for somebody who is not trusted.
struct Wary;

impl Handler for Wary {
    const VALUES_MAX: usize = 100;

    async fn request(&self, _: String, params: Value) -> Result<Value, RpcError> {
        Ok(params)
    }

    fn notification(&self, _: String, _: Value) {}
}

#[tokio::test]
async fn a_message_of_too_many_values_is_none() {
    for (text, count) in [
        ("1", 1),
        (r#""[[,,{:\"[[\\""#, 1),
        ("[]", 2),
        (r#"{"a":[1,2,"x,y:z"]}"#, 6),
        (r#"[{"":0},{"":0}]"#, 7),
    ] {
        assert_eq!(values(text.as_bytes()), count, "{text}");
    }
    let (ours, theirs) = tokio::io::duplex(64 * 1024);
    let (asks, _serves) = (Peer::start(ours, NoCalls), Peer::start(theirs, Wary));
    let call = async |params: Value| {
        let deadline = Duration::from_millis(200);
        asks.call::<_, Value>("echo", &params, deadline).await
    };
    let long = json!({"text": ",".repeat(100_000)});
    assert_eq!(call(long.clone()).await.unwrap(), long);
    let many = call(json!(vec![0; 200])).await;
    assert!(matches!(many, Err(CallError::Deadline { .. })), "{many:?}");
    assert_eq!(call(json!([1, 2])).await.unwrap(), json!([1, 2]), "it goes on");
}
