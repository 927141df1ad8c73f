//! Calls between a machine and an aegisd that are both played. Time stands still, but for waits.

use std::sync::Arc;

use serde_json::json;
use tokio::io::{DuplexStream, ReadHalf, WriteHalf};
use tokio::task::JoinHandle;

use super::*;

/// The other end of a line.
struct Aegisd {
    read: BufReader<ReadHalf<DuplexStream>>,
    write: WriteHalf<DuplexStream>,
    serving: JoinHandle<io::Result<()>>,
}

impl Aegisd {
    async fn connect(broker: &Arc<Broker>) -> Aegisd {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let broker = Arc::clone(broker);
        let serving =
            tokio::spawn(async move { broker.serve(theirs, std::future::pending()).await });
        let (read, write) = tokio::io::split(ours);
        let mut aegisd = Aegisd { read: BufReader::new(read), write, serving };
        let reply: Reply = serde_json::from_slice(&aegisd.line().await.unwrap()).unwrap();
        assert!(reply.ok);
        aegisd
    }

    async fn line(&mut self) -> Option<Vec<u8>> {
        lines::read(&mut self.read, WORKER_LINE_MAX).await.unwrap()
    }

    async fn hears(&mut self) -> Brokered {
        serde_json::from_slice(&self.line().await.unwrap()).unwrap()
    }

    async fn says(&mut self, id: u64, outcome: Outcome) {
        let (result, error) = match outcome {
            Ok(value) => (Some(value), None),
            Err(error) => (None, Some(error)),
        };
        lines::write(&mut self.write, &BrokerAnswer { id, result, error }).await.unwrap();
    }

    async fn leave(self) {
        drop((self.read, self.write));
        let _ = self.serving.await.unwrap();
    }
}

fn ask(broker: &Arc<Broker>, params: Value) -> JoinHandle<Outcome> {
    let broker = Arc::clone(broker);
    tokio::spawn(async move { broker.call(method::SPAWN.to_owned(), params).await })
}

fn refused(outcome: Outcome, code: i32) -> String {
    let error = outcome.unwrap_err();
    assert_eq!(error.code, code, "{error}");
    error.message
}

#[tokio::test(start_paused = true)]
async fn calls_are_answered_in_any_order() {
    let broker = Arc::new(Broker::new());
    let mut aegisd = Aegisd::connect(&broker).await;
    let first = ask(&broker, json!({"token": "t", "request": {"n": 1}}));
    let heard_first = aegisd.hears().await;
    assert_eq!(heard_first.method, method::SPAWN);
    assert_eq!(heard_first.params, json!({"token": "t", "request": {"n": 1}}));
    let second = ask(&broker, json!({"n": 2}));
    let heard_second = aegisd.hears().await;
    aegisd.says(u64::MAX, Ok(json!("nobody's"))).await;
    let denied = RpcError { code: -32001, message: "no".to_owned(), data: json!({"rule": "x"}) };
    aegisd.says(heard_second.id, Err(denied.clone())).await;
    assert_eq!(second.await.unwrap(), Err(denied));
    aegisd.says(heard_first.id, Ok(json!({"id": "inst-1"}))).await;
    assert_eq!(first.await.unwrap(), Ok(json!({"id": "inst-1"})));
}

#[tokio::test(start_paused = true)]
async fn only_calls_of_the_guest_api_pass() {
    let broker = Broker::new();
    for name in ["identify", "guest.", "guest.spawn ", "GUEST.SPAWN", "", &"x".repeat(100_000)] {
        let error = refused(broker.call(name.to_owned(), json!({})).await, CODE_METHOD);
        assert!(error.len() < 100);
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_waits_for_a_line_but_not_for_ever() {
    let broker = Arc::new(Broker::new());
    let late = ask(&broker, json!({}));
    let error = refused(late.await.unwrap(), CODE_UNAVAILABLE);
    assert!(error.contains("nothing was done"), "{error}");
    let waiting = ask(&broker, json!({"n": 1}));
    tokio::task::yield_now().await;
    let mut aegisd = Aegisd::connect(&broker).await;
    let heard = aegisd.hears().await;
    aegisd.says(heard.id, Ok(json!(1))).await;
    assert_eq!(waiting.await.unwrap(), Ok(json!(1)));
}

#[tokio::test(start_paused = true)]
async fn who_was_being_answered_when_aegisd_left_is_told_so() {
    let broker = Arc::new(Broker::new());
    let mut aegisd = Aegisd::connect(&broker).await;
    let call = ask(&broker, json!({}));
    let lost = aegisd.hears().await;
    aegisd.leave().await;
    let error = refused(call.await.unwrap(), CODE_UNAVAILABLE);
    assert!(error.contains("may have been done"), "{error}");
    // The next one is served by the next aegisd, which can't answer for the one before.
    let mut aegisd = Aegisd::connect(&broker).await;
    let call = ask(&broker, json!({}));
    let heard = aegisd.hears().await;
    aegisd.says(lost.id, Ok(json!("late"))).await;
    aegisd.says(heard.id, Ok(json!("mine"))).await;
    assert_eq!(call.await.unwrap(), Ok(json!("mine")));
}

#[tokio::test(start_paused = true)]
async fn a_later_line_takes_the_place_of_an_earlier_one() {
    let broker = Arc::new(Broker::new());
    let mut first = Aegisd::connect(&broker).await;
    let mut second = Aegisd::connect(&broker).await;
    assert!(first.line().await.is_none(), "the earlier one is let go");
    let call = ask(&broker, json!({}));
    let heard = second.hears().await;
    second.says(heard.id, Ok(json!(2))).await;
    assert_eq!(call.await.unwrap(), Ok(json!(2)));
    first.serving.await.unwrap().unwrap();
    let call = ask(&broker, json!({}));
    let heard = second.hears().await;
    second.says(heard.id, Ok(json!(3))).await;
    assert_eq!(call.await.unwrap(), Ok(json!(3)), "the end of the earlier one ends nothing");
}

#[tokio::test(start_paused = true)]
async fn a_line_that_says_rubbish_is_ended() {
    let broker = Arc::new(Broker::new());
    let mut aegisd = Aegisd::connect(&broker).await;
    let call = ask(&broker, json!({}));
    aegisd.hears().await;
    aegisd.write.write_all(b"rubbish\n").await.unwrap();
    refused(call.await.unwrap(), CODE_UNAVAILABLE);
    assert!(aegisd.serving.await.unwrap().is_err());
}

#[tokio::test(start_paused = true)]
async fn an_aegisd_that_never_answers_costs_a_call_and_no_more() {
    let broker = Arc::new(Broker::new());
    let mut aegisd = Aegisd::connect(&broker).await;
    let call = ask(&broker, json!({}));
    let heard = aegisd.hears().await;
    let error = refused(call.await.unwrap(), CODE_UNAVAILABLE);
    assert!(error.contains("did not answer within"), "{error}");
    aegisd.says(heard.id, Ok(json!(1))).await;
    let call = ask(&broker, json!({}));
    let heard = aegisd.hears().await;
    aegisd.says(heard.id, Ok(json!(2))).await;
    assert_eq!(call.await.unwrap(), Ok(json!(2)));
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_would_break_the_channel_is_no_answer() {
    let broker = Arc::new(Broker::new());
    let mut aegisd = Aegisd::connect(&broker).await;
    let call = ask(&broker, json!({}));
    let heard = aegisd.hears().await;
    aegisd.says(heard.id, Ok(json!("x".repeat(RPC_MESSAGE_MAX)))).await;
    refused(call.await.unwrap(), CODE_INTERNAL);
}

#[tokio::test(start_paused = true)]
async fn a_flood_is_told_to_wait_and_holds_nothing() {
    let broker = Arc::new(Broker::new());
    // Nobody answers.
    let mut calls: Vec<_> = (0..1000).map(|n| ask(&broker, json!({"n": n}))).collect();
    let over = calls.split_off(RPC_IN_FLIGHT_MAX);
    for call in over {
        refused(call.await.unwrap(), CODE_RATE);
    }
    for call in calls {
        refused(call.await.unwrap(), CODE_UNAVAILABLE);
    }
    // Few, but large.
    let large = json!("x".repeat(GUEST_PARAMS_MAX - WRAP_MAX));
    let fit = GUEST_PARAMS_HELD_MAX / GUEST_PARAMS_MAX;
    let mut calls: Vec<_> = (0..2 * fit).map(|_| ask(&broker, large.clone())).collect();
    let over = calls.split_off(fit);
    for call in over {
        refused(call.await.unwrap(), CODE_RATE);
    }
    for call in calls {
        refused(call.await.unwrap(), CODE_UNAVAILABLE);
    }
    let larger = json!("x".repeat(GUEST_PARAMS_MAX + WRAP_MAX));
    refused(ask(&broker, larger).await.unwrap(), CODE_PARAMS);
    // All of it is free again.
    assert_eq!(broker.calls.available_permits(), RPC_IN_FLIGHT_MAX);
    assert_eq!(broker.held.available_permits(), GUEST_PARAMS_HELD_MAX);
    let mut aegisd = Aegisd::connect(&broker).await;
    let call = ask(&broker, large);
    let heard = aegisd.hears().await;
    aegisd.says(heard.id, Ok(json!({}))).await;
    assert_eq!(call.await.unwrap(), Ok(json!({})));
}

#[tokio::test(start_paused = true)]
async fn who_leaves_is_forgotten() {
    let broker = Arc::new(Broker::new());
    let mut aegisd = Aegisd::connect(&broker).await;
    let call = ask(&broker, json!({}));
    let heard = aegisd.hears().await;
    call.abort();
    assert!(call.await.is_err());
    assert_eq!(broker.calls.available_permits(), RPC_IN_FLIGHT_MAX);
    aegisd.says(heard.id, Ok(json!({}))).await;
    let call = ask(&broker, json!({}));
    let heard = aegisd.hears().await;
    aegisd.says(heard.id, Ok(json!(2))).await;
    assert_eq!(call.await.unwrap(), Ok(json!(2)));
}
