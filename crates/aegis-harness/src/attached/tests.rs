use std::io::Read as _;

use aegis_wire::channel::output::header;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::*;

fn frame(kind: Kind, bytes: &[u8]) -> Vec<u8> {
    [&header(kind, bytes.len())[..], bytes].concat()
}

#[tokio::test(flavor = "current_thread")]
async fn input_is_given_on_and_counted_and_its_end_is_an_end() {
    let (to, mut from) = pipe::pipe().unwrap();
    let held = Arc::new(watch::Sender::default());
    let (tell, taken) = watch::channel(0);
    let (mut host, ours) = tokio::io::duplex(1 << 20);
    let feeder = tokio::spawn(feed(Arc::clone(&held), Some(to), tell));
    let reader = tokio::spawn({
        let taken = taken.clone();
        async move { read(ours, &held, &taken).await }
    });
    let much = vec![7; STDIN_WINDOW];
    for piece in much.chunks(CHUNK) {
        host.write_all(&frame(Kind::Stdin, piece)).await.unwrap();
    }
    host.write_all(&frame(Kind::StdinEnd, b"")).await.unwrap();
    let mut got = Vec::new();
    from.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, much);
    assert_eq!(*taken.borrow(), STDIN_WINDOW as u64);
    feeder.await.unwrap();
    // Behind the end only the host's leaving is left, and nothing may come before that.
    assert!(!reader.is_finished());
    host.write_all(&frame(Kind::Stdin, b"x")).await.unwrap();
    reader.await.unwrap();
}

#[tokio::test(flavor = "current_thread")]
async fn more_than_the_window_is_the_end_and_the_end_is_seen_behind_a_full_one() {
    for (beyond, kind) in [(1, Kind::Stdin), (0, Kind::Resize)] {
        let held = watch::Sender::default();
        let (_tell, taken) = watch::channel(0);
        let (mut host, ours) = tokio::io::duplex(1 << 20);
        for piece in vec![7; STDIN_WINDOW].chunks(CHUNK) {
            host.write_all(&frame(Kind::Stdin, piece)).await.unwrap();
        }
        host.write_all(&frame(kind, &vec![7; beyond])).await.unwrap();
        // Returns at all, though nobody takes anything.
        read(ours, &held, &taken).await;
        assert_eq!(held.borrow().bytes.len(), STDIN_WINDOW);
    }
    let held = watch::Sender::default();
    let (_tell, taken) = watch::channel(0);
    let (mut host, ours) = tokio::io::duplex(1 << 20);
    for piece in vec![7; STDIN_WINDOW].chunks(CHUNK) {
        host.write_all(&frame(Kind::Stdin, piece)).await.unwrap();
    }
    drop(host);
    read(ours, &held, &taken).await;
    assert!(!held.borrow().over, "who left did not say that it was all");
}

#[tokio::test(flavor = "current_thread")]
async fn a_command_that_reads_no_more_is_seen_at_once() {
    let (ours, mut its) = std::io::pipe().map(|(its, ours)| (ours, its)).unwrap();
    let to = pipe::Sender::from_owned_fd(ours.into()).unwrap();
    let held: Arc<watch::Sender<Held>> = Arc::default();
    let (tell, taken) = watch::channel(0);
    held.send_modify(|held| held.bytes.extend_from_slice(b"some"));
    let feeder = tokio::spawn(feed(Arc::clone(&held), Some(to), tell));
    let mut got = [0; 4];
    let its = tokio::task::spawn_blocking(move || {
        its.read_exact(&mut got).unwrap();
        its
    });
    drop(its.await.unwrap());
    // No input came, and no end of it.
    feeder.await.unwrap();
    assert_eq!(*taken.borrow(), 4);
}
