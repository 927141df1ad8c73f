//! A reader of server-sent events, parsed by a crate that is not ours.

use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use eventsource_stream::{Event, Eventsource as _};
use futures_util::{Stream, StreamExt as _};
use http_body_util::BodyStream;
use hyper::Method;
use hyper::header::{ACCEPT, CONTENT_TYPE, HeaderName};
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::http::{Broken, Client};

/// Nothing that a test awaits takes longer.
const DEADLINE: Duration = Duration::from_secs(60);

type Parsed = Pin<Box<dyn Stream<Item = Result<Event, Broken>> + Send>>;

/// An open stream of events; dropped, it is disconnected.
pub struct Events {
    stream: Parsed,
    runtime: Runtime,
}

/// Asks for events. `last` is what a client that comes back says of itself.
pub fn open(client: &Client, path: &str, last: Option<&str>) -> Result<Events, u16> {
    let mut client = client.with(ACCEPT, "text/event-stream");
    if let Some(last) = last {
        client = client.with(HeaderName::from_static("last-event-id"), last);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let answer = runtime.block_on(client.begin(Method::GET, path, Bytes::new())).unwrap();
    if answer.status() != 200 {
        return Err(answer.status().as_u16());
    }
    assert_eq!(answer.headers()[CONTENT_TYPE], "text/event-stream");
    let chunks = BodyStream::new(answer.into_body()).filter_map(|frame| async {
        match frame {
            Ok(frame) => frame.into_data().ok().map(Ok),
            Err(error) => Some(Err(error)),
        }
    });
    let stream = chunks.eventsource().map(|event| event.map_err(|e| e.to_string().into()));
    Ok(Events { stream: Box::pin(stream), runtime })
}

impl Events {
    fn step(&mut self) -> Option<Result<Event, Broken>> {
        let next = async { tokio::time::timeout(DEADLINE, self.stream.next()).await };
        self.runtime.block_on(next).expect("an event, or the end")
    }

    /// Whether the daemon ends the stream now, as one that was not cut off ends.
    pub fn ends(&mut self) -> bool {
        self.step().is_none()
    }

    /// The next event with its data.
    #[track_caller]
    pub fn must(&mut self) -> (Event, Value) {
        let event = self.next().expect("an event");
        let data: Value = serde_json::from_str(&event.data).unwrap();
        assert_eq!(event.id, data["seq"].to_string());
        assert_eq!(event.event, data["kind"]);
        (event, data)
    }
}

impl Iterator for Events {
    type Item = Event;

    /// The next event; none when the stream ended or broke off.
    fn next(&mut self) -> Option<Event> {
        self.step().and_then(Result::ok)
    }
}
