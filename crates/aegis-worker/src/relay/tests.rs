//! Machines that misbehave on their channel.

use aegis_wire::channel::frame::{self, Decoder, Kind};
use aegis_wire::pipe::read_message;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWrite};

use super::*;

/// Reads up to the next HELLO and acknowledges it.
async fn greet(ctl: &mut UnixStream, decoder: &mut Decoder) -> Option<frame::Epoch> {
    let mut chunk = vec![0; 64 * 1024];
    loop {
        while let Some(frame) = decoder.next_frame() {
            if frame.kind == Kind::Hello {
                ctl.write_all(&frame::header(Kind::Ack, frame.epoch, 0)).await.ok()?;
                return Some(frame.epoch);
            }
        }
        let n = ctl.read(&mut chunk).await.ok().filter(|n| *n > 0)?;
        decoder.feed(&chunk[..n]);
    }
}

async fn data<W: AsyncWrite + Unpin>(to: &mut W, epoch: frame::Epoch, bytes: &[u8]) {
    let mut out = frame::header(Kind::Data, epoch, bytes.len()).to_vec();
    out.extend_from_slice(bytes);
    let _ = to.write_all(&out).await;
}

#[tokio::test]
async fn a_machine_that_talks_rubbish_is_given_up() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let (_frozen, frozen) = watch::channel(false);
    let mut relay = Relay::start(ours, frozen);
    let rubbish = tokio::spawn(async move {
        let mut decoder = Decoder::new();
        let mut greeted = 0;
        theirs.write_all(&[7; 100_000]).await.unwrap();
        while let Some(epoch) = greet(&mut theirs, &mut decoder).await {
            greeted += 1;
            // A yamux frame of no version.
            data(&mut theirs, epoch, &[0xEE; 4096]).await;
        }
        greeted
    });
    let why = relay.dead.wait_for(Option::is_some).await.unwrap().clone().unwrap();
    assert!(why.contains("lost 5 times"), "{why}");
    assert!(relay.session().await.is_err());
    drop(relay);
    assert_eq!(rubbish.await.unwrap(), LOSSES_MAX);
}

#[tokio::test]
async fn a_machine_can_open_nothing_and_does_not_change_its_story() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let (_frozen, frozen) = watch::channel(false);
    let mut relay = Relay::start(ours, frozen);
    let machine = tokio::spawn(async move {
        let epoch = greet(&mut theirs, &mut Decoder::new()).await.unwrap();
        // The next pipe finds no HELLO any more: it only carries.
        let mut pipe = Pipe::new(theirs);
        let (app, session) = tokio::io::duplex(SESSION_BUFFER);
        let (mux, mut inbound) = mux::start(session, false);
        let talk = async {
            let mut control = inbound.recv().await.unwrap();
            let head: Option<StreamHead> = read_message(&mut control).await.unwrap();
            assert_eq!(head, Some(StreamHead::Control));
            for code in 1..200 {
                let exited =
                    json!({"jsonrpc": "2.0", "method": "processExited", "params": {"code": code}});
                write_message(&mut control, &exited).await.unwrap();
            }
            let mut mine = mux.open().await.unwrap();
            let _ = write_message(&mut mine, &StreamHead::Port { port: 22 }).await;
            // The host closes it: nothing is served.
            assert_eq!(mine.read(&mut [0; 16]).await.unwrap_or(0), 0);
            let call = json!({"jsonrpc": "2.0", "id": 1, "method": "guest.spawn"});
            write_message(&mut control, &call).await.unwrap();
            let answer: Option<Value> = read_message(&mut control).await.unwrap();
            assert_eq!(answer.unwrap()["error"]["code"], CODE_METHOD);
        };
        tokio::select! {
            () = talk => {}
            _ = pipe.carry(epoch, app) => panic!("the session ended"),
        }
    });
    relay.exited.wait_for(Option::is_some).await.unwrap();
    machine.await.unwrap();
    assert_eq!(relay.exited.borrow().unwrap().code, 1);
}
