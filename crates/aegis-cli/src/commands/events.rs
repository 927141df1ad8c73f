//! `aegis events`: what happens on this host, as the daemon writes it down.

use aegis_wire::bounds::EVENT_RETRY;
use aegis_wire::couch::Event;
use clap::Args;

use super::Ask;
use crate::failure::{Failure, Result};
use crate::output::{self, Format, say};
use aegis_wire::path::escape;

/// What `aegis events` takes.
#[derive(Args, Debug)]
#[command(after_help = "\
Without -f: all that was written down up to now. With -f: what comes, also after a restart of the \
daemon; none is left out and none comes twice.

Examples:
  aegis events --guest 01K…
  aegis events -f --kind couch.guest
  aegis events -f --since 1204 --json | jq -r .kind")]
pub struct EventsArgs {
    /// Go on with what comes
    #[arg(long, short)]
    follow: bool,
    /// Only what came after this number (`seq`)
    #[arg(long, value_name = "SEQ")]
    since: Option<u64>,
    /// Only kinds that begin so, as in couch.guest or instance.denied
    #[arg(long, value_name = "PREFIX")]
    kind: Option<String>,
    /// Only what concerns one guest: its invite, itself, its machines
    #[arg(long, value_name = "ID")]
    guest: Option<String>,
}

/// Shows them.
pub async fn events(ask: &Ask, args: EventsArgs) -> Result<()> {
    let mut after = args.since;
    loop {
        let ended = show_from(ask, &args, &mut after).await;
        // Only a follower that was told where it is can go on there.
        if !args.follow || after.is_none() {
            return ended;
        }
        match ended {
            Err(refused @ (Failure::Refused(_) | Failure::Exit(_))) => return Err(refused),
            Err(broken) => say(&output::clean(broken.words().trim_end())),
            Ok(()) => say("the daemon has stopped; waiting for it"),
        }
        tokio::time::sleep(EVENT_RETRY).await;
    }
}

/// Shows events from one answer until it ends; `after` moves along.
async fn show_from(ask: &Ask, args: &EventsArgs, after: &mut Option<u64>) -> Result<()> {
    let mut lines = ask.client.events(&path(args, *after)).await?;
    while let Some(line) = lines.next().await? {
        match told(&line)? {
            // Said first, before any event. That of an event counts when the event was shown.
            Told::Place(seq) => *after = after.or(Some(seq)),
            Told::Event(event) => {
                if ask.format == Format::Json {
                    output::data(&[line.strip_prefix(DATA).unwrap_or(&line), b"\n"].concat())?;
                } else {
                    output::data(words(&event).as_bytes())?;
                }
                *after = Some(event.seq);
            }
            Told::Nothing => {}
        }
    }
    Ok(())
}

fn path(args: &EventsArgs, after: Option<u64>) -> String {
    let mut query = vec![format!("follow={}", args.follow)];
    query.push(match after {
        Some(seq) => format!("since={seq}"),
        None if args.follow => "from=now".to_owned(),
        None => "from=start".to_owned(),
    });
    query.extend(args.kind.as_deref().map(|kind| format!("kind={}", escape(kind))));
    query.extend(args.guest.as_deref().map(|guest| format!("guest={}", escape(guest))));
    format!("/couch/events?{}", query.join("&"))
}

const DATA: &[u8] = b"data: ";

/// What one line of server-sent events says. The daemon tells an event in one line of data, and
/// where one is before the first.
enum Told {
    Place(u64),
    Event(Box<Event>),
    Nothing,
}

fn told(line: &[u8]) -> Result<Told> {
    let broken =
        |e: serde_json::Error| Failure::because("the daemon sent a line that is no event", e);
    if let Some(data) = line.strip_prefix(DATA) {
        return Ok(Told::Event(serde_json::from_slice(data).map_err(broken)?));
    }
    Ok(match line.strip_prefix(b"id: ") {
        Some(id) => match serde_json::from_slice::<u64>(id) {
            Ok(seq) => Told::Place(seq),
            Err(e) => return Err(broken(e)),
        },
        None => Told::Nothing,
    })
}

fn words(event: &Event) -> String {
    let data = event.data.iter().map(|(name, value)| format!(" {name}={}", output::plain(value)));
    let Event { seq, at, actor, kind, subject, .. } = event;
    let line = format!("{seq:>7} {at} {kind:<28} {subject} by {actor}{}", data.collect::<String>());
    // One line each, whatever somebody chose as a name.
    output::clean(&line.replace('\n', " ")) + "\n"
}
