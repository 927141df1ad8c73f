//! What is sent is counted, and stops at the byte.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;

use aegis_gateway::{Budgets, News};
use aegis_wire::egress::rule;
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType::A;

use crate::support::names::{ask, serve};
use crate::support::{World, internet, read_all};

fn world() -> World {
    let world = World::new(Budgets::default());
    world.set_policy(internet(&[]));
    world
}

#[test]
fn the_last_allowance_ends_at_the_byte() {
    const LIMIT: usize = 1_000_003;
    let mut world = world();
    world.gateway.set_allowance(LIMIT as u64, true);
    let listener = world.listen("203.0.113.5:7000");
    let (mut inside, mut outside) = world.pair(&listener);
    let (mut second, mut second_outside) = world.pair(&listener);
    let receiver = std::thread::spawn(move || read_all(&mut outside).unwrap().len());
    let error = loop {
        if let Err(e) = inside.write_all(&[7; 10_000]) {
            break e.kind();
        }
    };
    assert!(matches!(error, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
    // What was counted arrived, and not a byte more.
    assert_eq!(receiver.join().unwrap(), LIMIT);
    assert_eq!(world.counts().egress_bytes, LIMIT as u64);
    let mut told = [world.next_news(), world.next_news()];
    told.sort_by_key(|news| matches!(news, News::Denied { .. }));
    assert_eq!(told[0], News::Exhausted);
    assert!(matches!(&told[1], News::Denied { denied, .. } if denied.rule == rule::LIMIT));
    // Others end, too, and nothing new begins.
    assert!(read_all(&mut second).is_err());
    assert_eq!(read_all(&mut second_outside).unwrap(), b"");
    world.refused("203.0.113.5:7000");
    assert_eq!(ask(&world, "web.example.", A).0, ResponseCode::Refused);
    // Unless somebody raises it.
    world.gateway.set_allowance(LIMIT as u64 + 5, true);
    let (mut inside, mut outside) = world.pair(&listener);
    inside.write_all(b"more").unwrap();
    drop(inside);
    assert_eq!(read_all(&mut outside).unwrap(), b"more");
}

#[test]
fn without_allowance_flows_wait_and_ask() {
    let mut world = world();
    let listener = world.listen("203.0.113.5:7000");
    let (mut inside, mut outside) = world.pair(&listener);
    inside.write_all(&[7; 1000]).unwrap();
    inside.shutdown(Shutdown::Write).unwrap();
    assert_eq!(world.next_news(), News::Low);
    // What comes from outside is free.
    outside.write_all(b"down").unwrap();
    inside.read_exact(&mut [0; 4]).unwrap();
    world.gateway.set_allowance(400, false);
    outside.read_exact(&mut [0; 400]).unwrap();
    assert_eq!(world.counts().egress_bytes, 400);
    assert_eq!(world.next_news(), News::Low);
    world.gateway.set_allowance(2000, false);
    assert_eq!(read_all(&mut outside).unwrap().len(), 600);
    // Half of what came last is left still.
    assert!(world.news.try_recv().is_err());
    let trimmed = block_on(world.gateway.trim());
    assert_eq!(trimmed, Some(1000));
    let (mut inside, mut outside) = world.pair(&listener);
    inside.write_all(b"x").unwrap();
    assert_eq!(world.next_news(), News::Low);
    world.gateway.set_allowance(1001, false);
    outside.read_exact(&mut [0; 1]).unwrap();
}

#[test]
fn datagrams_are_sent_whole_or_not_at_all() {
    let mut world = world();
    world.gateway.set_allowance(150, true);
    let outside = world.outside.run(|| std::net::UdpSocket::bind("203.0.113.5:7000").unwrap());
    outside.set_read_timeout(Some(crate::support::PATIENCE)).unwrap();
    let inside = world.udp();
    inside.connect("203.0.113.5:7000").unwrap();
    let mut bytes = [0; 2000];
    inside.send(&[1; 100]).unwrap();
    assert_eq!(outside.recv(&mut bytes).unwrap(), 100);
    inside.send(&[2; 100]).unwrap();
    assert_eq!(world.next_news(), News::Exhausted);
    inside.send(&[3; 50]).unwrap();
    assert_eq!((outside.recv(&mut bytes).unwrap(), bytes[0]), (50, 3));
    assert_eq!(world.counts().egress_bytes, 150);
}

#[test]
fn questions_take_from_the_allowance() {
    let mut world = world();
    let heard = serve(&world, &[("web.example", &["203.0.113.5"])]);
    assert_eq!(ask(&world, "web.example.", A).0, ResponseCode::ServFail);
    assert_eq!(world.next_news(), News::Low);
    assert!(heard.lock().unwrap().is_empty());
    world.gateway.set_allowance(1000, false);
    assert_eq!(ask(&world, "web.example.", A).0, ResponseCode::NoError);
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}
