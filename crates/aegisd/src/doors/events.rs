//! `GET /couch/events` (contracts/couch.md 8): events as server-sent events.

use std::convert::Infallible;
use std::sync::Arc;

use aegis_rules::refusal::{Code, Refusal};
use aegis_wire::bounds::{EVENT_FOLLOWERS_MAX, EVENT_KEEP_ALIVE, EVENT_RETRY};
use axum::extract::State as Extract;
use axum::http::HeaderMap;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use futures_util::StreamExt as _;
use futures_util::stream;
use serde::Deserialize;

use super::State;
use super::answer::Failure;
use super::ask::{HostAuth, Params, bad_query};
use crate::app::events::{self, Ask, Begin, Feed};

#[derive(Deserialize)]
pub(super) struct EventsQuery {
    since: Option<String>,
    from: Option<String>,
    kind: Option<String>,
    guest: Option<String>,
    follow: Option<String>,
}

pub(super) async fn events(
    Extract(state): Extract<State>,
    HostAuth(host): HostAuth,
    headers: HeaderMap,
    Params(query): Params<EventsQuery>,
) -> Result<Response, Failure> {
    let follow = match query.follow.as_deref() {
        None | Some("" | "1" | "true") => true,
        Some("0" | "false") => false,
        Some(_) => return Err(bad_query("follow", "true or false")),
    };
    let ask = Ask {
        begin: begin(&headers, &query)?,
        kind: query.kind.as_deref().map(str::parse).transpose()?,
        guest: match &query.guest {
            None => None,
            Some(id) => Some(super::couch::guest_id(id)?),
        },
        follow,
    };
    let slot = Arc::clone(&state.followers).try_acquire_owned().map_err(|_| {
        let most = EVENT_FOLLOWERS_MAX;
        let mut refusal = Refusal::new(Code::NoCapacity, format!("{most} follow events already"));
        refusal.allowed = Some(most.to_string());
        refusal
    })?;
    let feed = events::open(host, &state.app, ask)?;
    // Told before the first event: who is cut off before one comes goes on from here too.
    let hello = Event::default().id(feed.position().to_string()).retry(EVENT_RETRY);
    let mut stopped = state.stopped.clone();
    let rest = stream::unfold((feed, slot), |(mut feed, slot)| async move {
        let event = next(&mut feed).await?;
        Some((event, (feed, slot)))
    });
    let stop = async move {
        let _ = stopped.wait_for(|stopped| *stopped).await;
    };
    let all = stream::iter([hello]).chain(rest).take_until(stop).map(Ok::<_, Infallible>);
    let alive = KeepAlive::new().interval(EVENT_KEEP_ALIVE);
    Ok(Sse::new(all).keep_alive(alive).into_response())
}

/// Where to begin: a client that comes back says it itself, in the header.
fn begin(headers: &HeaderMap, query: &EventsQuery) -> Result<Begin, Failure> {
    let seq = |name, text: &str| {
        let seq = text.parse().map(Begin::After);
        seq.map_err(|_| bad_query(name, "the seq of an event, or 0"))
    };
    if let Some(value) = headers.get("last-event-id") {
        return seq("Last-Event-ID", value.to_str().unwrap_or_default());
    }
    match (&query.since, query.from.as_deref()) {
        (Some(text), None) => seq("since", text),
        (None, None | Some("now")) => Ok(Begin::Now),
        (None, Some("start")) => Ok(Begin::Start),
        (Some(_), Some(_)) => Err(bad_query("from", "absent where since is given")),
        (None, Some(_)) => Err(bad_query("from", "now or start")),
    }
}

async fn next(feed: &mut Feed) -> Option<Event> {
    let event = match feed.next().await {
        Ok(event) => event?,
        // The answer has begun: it ends here, and its reader comes back to where it was.
        Err(error) => {
            let chain = anyhow::Error::from(error);
            tracing::error!(error = format!("{chain:#}"), "a follower of events was cut off");
            return None;
        }
    };
    let line = Event::default().id(event.seq.to_string()).event(&event.kind).json_data(&event);
    line.inspect_err(|error| tracing::error!(%error, "an event could not be told")).ok()
}
