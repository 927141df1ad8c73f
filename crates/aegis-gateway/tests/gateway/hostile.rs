//! A guest with root that means harm: garbage, floods, silence.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use aegis_gateway::Budgets;
use aegis_wire::egress::rule;

use crate::support::{PATIENCE, World, internet, read_all};

/// A card whose frames are written by hand.
struct Card(UnixStream);

impl Card {
    fn plug(world: &World) -> Card {
        let (ours, theirs) = UnixStream::pair().unwrap();
        world.gateway.plug(theirs.into());
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        ours.set_write_timeout(Some(PATIENCE)).unwrap();
        Card(ours)
    }

    fn send(&mut self, frame: &[u8]) {
        self.0.write_all(&(frame.len() as u32).to_be_bytes()).unwrap();
        self.0.write_all(frame).unwrap();
    }

    /// The next frame.
    fn receive(&mut self) -> Vec<u8> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut frame).unwrap();
        frame
    }

    /// Asks for the gateway's card, and waits for the answer: all that was sent before was taken.
    fn settle(&mut self) {
        let mut frame = vec![0xff; 6];
        frame.extend([2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1]);
        frame.extend([172, 16, 0, 2, 0, 0, 0, 0, 0, 0, 172, 16, 0, 1]);
        self.send(&frame);
        while self.receive()[12..14] != [8, 6] {}
    }
}

/// A TCP segment to 203.0.113.5, without a checksum: nobody looks at it.
fn segment(from_port: u16, to_port: u16, flags: u8, seq: u32, ack: u32, data: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1, 8, 0];
    frame.extend([0x45, 0]);
    frame.extend((40 + data.len() as u16).to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, 6, 0, 0, 172, 16, 0, 2, 203, 0, 113, 5]);
    frame.extend(from_port.to_be_bytes());
    frame.extend(to_port.to_be_bytes());
    frame.extend(seq.to_be_bytes());
    frame.extend(ack.to_be_bytes());
    frame.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    frame.extend(data);
    frame
}

const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// This process's memory, bytes: threads of all tests share it.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

#[test]
fn garbage_is_dropped_and_all_else_goes_on() {
    // What hits by chance opens flows.
    let many =
        Budgets { new_flows_per_second: 1 << 30, new_flows_burst: 1 << 30, ..Budgets::default() };
    let mut world = World::new(many);
    world.set_policy(internet(&[]));
    world.gateway.set_allowance(1 << 40, false);
    let mut card = Card::plug(&world);
    let mut seed = 12345_u32;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 17;
        seed ^= seed << 5;
        seed
    };
    for round in 0..20_000_u32 {
        let mut frame = segment(9, 7000, (round % 64) as u8, 1, 1, b"data");
        // Broken in a few places, or cut, or nothing but noise.
        match round % 4 {
            0 => frame = (0..random() % 200).map(|_| random() as u8).collect(),
            1 => frame.truncate(random() as usize % frame.len()),
            _ => {
                for _ in 0..1 + random() % 4 {
                    let at = random() as usize % frame.len();
                    frame[at] = random() as u8;
                }
            }
        }
        card.0.write_all(&(frame.len() as u32).to_be_bytes()).unwrap();
        card.0.write_all(&frame).unwrap();
        if round % 16 == 0 {
            card.settle();
        }
    }
    card.settle();
    world.plug();
    let listener = world.listen("203.0.113.5:7000");
    let (mut inside, mut outside) = world.pair(&listener);
    inside.write_all(b"still here").unwrap();
    drop(inside);
    assert_eq!(read_all(&mut outside).unwrap(), b"still here");
}

#[test]
fn a_frame_that_is_too_long_ends_the_link() {
    let mut world = World::open();
    let mut card = Card::plug(&world);
    card.settle();
    card.0.write_all(&65_551_u32.to_be_bytes()).unwrap();
    assert_eq!(card.0.read(&mut [0; 1]).unwrap(), 0);
    world.plug();
    let listener = world.listen("203.0.113.5:7000");
    world.pair(&listener);
}

#[test]
fn a_flood_of_connections_is_bounded() {
    let budgets = Budgets {
        tcp_flows: 64,
        new_flows_per_second: 1,
        new_flows_burst: 100,
        ..Budgets::default()
    };
    let mut world = World::new(budgets);
    world.set_policy(internet(&[]));
    world.gateway.set_allowance(1 << 30, false);
    let listener = world.listen("203.0.113.5:7000");
    let mut card = Card::plug(&world);
    let reader = card.0.try_clone().unwrap();
    // What comes back is not read by everybody; this one does, and counts.
    let (tell, told) = std::sync::mpsc::channel();
    let counting = std::thread::spawn(move || {
        let mut card = Card(reader);
        loop {
            let frame = card.receive();
            if frame[12..14] == [8, 6] {
                tell.send(()).unwrap();
                return;
            }
        }
    });
    for port in 1..=100_000_u32 {
        card.send(&segment((port % 60_000 + 1) as u16, 7000, SYN, port, 0, b""));
    }
    let mut ask = vec![0xff; 6];
    ask.extend([2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1]);
    ask.extend([172, 16, 0, 2, 0, 0, 0, 0, 0, 0, 172, 16, 0, 1]);
    card.send(&ask);
    told.recv_timeout(PATIENCE).unwrap();
    counting.join().unwrap();
    let counts = world.counts();
    assert!(counts.flows <= 100, "{counts:?}");
    assert!(counts.denied >= 30_000, "{counts:?}");
    assert_eq!(world.denial().rule, rule::FLOWS);
    drop(listener);
}

#[test]
fn a_guest_that_never_reads_holds_a_bounded_amount() {
    let world = World::open();
    let listener = world.listen("203.0.113.5:7000");
    let before = resident();
    let mut card = Card::plug(&world);
    // Echoes that nobody takes; the link fills, and they are dropped.
    let mut echo = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1, 8, 0];
    echo.extend([0x45, 0, 0xea, 0x78, 0, 0, 0, 0, 64, 1, 0, 0, 172, 16, 0, 2, 172, 16, 0, 1]);
    echo.extend([8, 0, 0xf7, 0xff, 0, 0, 0, 0]);
    echo.resize(14 + 60_024, 0);
    for _ in 0..2_000 {
        card.send(&echo);
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes");
    drop(listener);
}

#[test]
fn handshakes_that_are_not_finished_end() {
    let budgets = Budgets { connect: std::time::Duration::from_millis(300), ..Budgets::default() };
    let world = World::new(budgets);
    world.set_policy(internet(&[]));
    let listener = world.listen("203.0.113.5:7000");
    let mut card = Card::plug(&world);
    card.send(&segment(1000, 7000, SYN, 1, 0, b""));
    let (mut outside, _) = listener.accept().unwrap();
    outside.set_read_timeout(Some(PATIENCE)).unwrap();
    // The guest says nothing more; outside it ends.
    assert_eq!(read_all(&mut outside).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn segments_of_no_flow_are_reset_and_resets_are_not() {
    let world = World::open();
    let mut card = Card::plug(&world);
    card.send(&segment(1000, 7000, RST, 5, 0, b""));
    card.send(&segment(1000, 7000, ACK, 5, 77, b"data"));
    let answer = card.receive();
    assert_eq!((answer[14 + 9], answer[14 + 20 + 13] & RST), (6, RST));
    assert_eq!(answer[14 + 24..14 + 28], 77_u32.to_be_bytes());
    card.settle();
}

#[test]
fn many_real_flows_share_what_there_is() {
    const FLOWS: usize = 300;
    let world = World::open();
    let listener = world.listen("203.0.113.5:7000");
    let server = std::thread::spawn(move || {
        let mut streams: Vec<TcpStream> = Vec::new();
        for _ in 0..FLOWS {
            streams.push(listener.accept().unwrap().0);
        }
        for stream in &mut streams {
            let mut bytes = [0; 5];
            stream.read_exact(&mut bytes).unwrap();
            stream.write_all(&bytes).unwrap();
        }
    });
    let mut streams: Vec<TcpStream> =
        (0..FLOWS).map(|_| world.connect("203.0.113.5:7000").unwrap()).collect();
    for stream in &mut streams {
        stream.write_all(b"hello").unwrap();
    }
    for stream in &mut streams {
        stream.read_exact(&mut [0; 5]).unwrap();
    }
    server.join().unwrap();
    drop(streams);
    assert_eq!(world.counts().flows, FLOWS as u64);
}
