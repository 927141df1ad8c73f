//! Machines that misbehave on their channel.

use aegis_wire::channel::frame::{self, Decoder, Kind};
use aegis_wire::pipe::read_message;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWrite};

use super::*;

/// Reads up to the next HELLO and acknowledges it.
/// Nobody is at the other port.
fn wires(ctl: UnixStream) -> Wires {
    Wires { ctl, workspace: UnixStream::pair().unwrap().0 }
}

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
    let mut relay = Relay::start(wires(ours), frozen, Arc::new(Broker::new()));
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
    let mut relay = Relay::start(wires(ours), frozen, Arc::new(Broker::new()));
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
            let call = json!({"jsonrpc": "2.0", "id": 1, "method": "guest.stroll"});
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

/// A machine's harness, as far as its calls go: asks for itself over the control stream, and counts
/// what comes on the stream of a ticket.
async fn asking_machine(theirs: UnixStream, answers: mpsc::Sender<Value>) {
    let mut pipe = Pipe::new(theirs);
    let mut epoch = pipe.accept().await.unwrap();
    while let Some(now) = epoch {
        let (app, session) = tokio::io::duplex(SESSION_BUFFER);
        let (_mux, mut inbound) = mux::start(session, false);
        let answers = answers.clone();
        tokio::spawn(async move {
            while let Some(mut stream) = inbound.recv().await {
                match read_message(&mut stream).await {
                    Ok(Some(StreamHead::Control)) => {
                        let peer = Peer::start(stream, aegis_wire::pipe::peer::NoCalls);
                        let answers = answers.clone();
                        tokio::spawn(async move {
                            let params = json!({"token": "t"});
                            let deadline = Duration::from_secs(60);
                            let asked = peer.call::<_, Value>(GUEST_CALL, &params, deadline).await;
                            let told = asked.unwrap_or_else(|error| json!(error.to_string()));
                            let _ = answers.send(told).await;
                        });
                    }
                    Ok(Some(StreamHead::Guest { ticket })) => {
                        let mut text = String::new();
                        stream.read_to_string(&mut text).await.unwrap();
                        answers.send(json!([ticket, text])).await.unwrap();
                    }
                    _ => {}
                }
            }
        });
        epoch = match pipe.serve(now, app).await.unwrap() {
            aegis_wire::pipe::session::Ended::NewEpoch(next) => Some(next),
            _ => None,
        };
    }
}

const GUEST_CALL: &str = aegis_wire::channel::guest::method::SELF_INFO;

#[tokio::test]
async fn a_machine_asks_and_is_answered_and_streamed_to() {
    use aegis_wire::worker::{BrokerAnswer, Brokered, Reply};
    use tokio::io::BufReader;

    let (ours, theirs) = UnixStream::pair().unwrap();
    let (_frozen, frozen) = watch::channel(false);
    let broker = Arc::new(Broker::new());
    let relay = Relay::start(wires(ours), frozen, Arc::clone(&broker));
    let (tell, mut told) = mpsc::channel(8);
    let machine = tokio::spawn(asking_machine(theirs, tell));

    let (aegisd, line) = UnixStream::pair().unwrap();
    let serving = {
        let broker = Arc::clone(&broker);
        tokio::spawn(async move { broker.serve(line, std::future::pending()).await })
    };
    let mut aegisd = BufReader::new(aegisd);
    let max = aegis_wire::bounds::WORKER_LINE_MAX;
    let reply = crate::lines::read(&mut aegisd, max).await.unwrap().unwrap();
    assert_eq!(serde_json::from_slice::<Reply>(&reply).unwrap(), Reply::ok());
    let call = crate::lines::read(&mut aegisd, max).await.unwrap().unwrap();
    let call: Brokered = serde_json::from_slice(&call).unwrap();
    assert_eq!((call.method.as_str(), call.params), (GUEST_CALL, json!({"token": "t"})));
    let answer = BrokerAnswer { id: call.id, result: Some(json!({"ticket": "t-1"})), error: None };

    let (mut bulk, mut asker) = UnixStream::pair().unwrap();
    let session = relay.session().await.unwrap();
    let pouring =
        tokio::spawn(
            async move { crate::broker::pour(&session, &mut asker, "t-1".to_owned()).await },
        );
    let mut bulk_lines = BufReader::new(&mut bulk);
    let reply = crate::lines::read(&mut bulk_lines, max).await.unwrap().unwrap();
    assert_eq!(serde_json::from_slice::<Reply>(&reply).unwrap(), Reply::ok());
    crate::lines::write(&mut aegisd, &answer).await.unwrap();
    assert_eq!(told.recv().await.unwrap(), json!({"ticket": "t-1"}));
    bulk.write_all(b"{\"line\":1}\n{\"line\":2}\n").await.unwrap();
    drop(bulk);
    assert_eq!(told.recv().await.unwrap(), json!(["t-1", "{\"line\":1}\n{\"line\":2}\n"]));
    pouring.await.unwrap().unwrap();

    // A machine that is gone leaves no call behind.
    machine.abort();
    drop(relay);
    drop(aegisd);
    let _ = serving.await.unwrap();
}
