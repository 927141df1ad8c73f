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

    /// Waits until all that was sent before was taken.
    fn settle(&mut self) {
        self.ask();
        while self.receive()[12..14] != [8, 6] {}
    }

    /// Asks for the gateway's card: the answer comes behind all others.
    fn ask(&mut self) {
        let mut frame = vec![0xff; 6];
        frame.extend([2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1]);
        frame.extend([172, 16, 0, 2, 0, 0, 0, 0, 0, 0, 172, 16, 0, 1]);
        self.send(&frame);
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

/// Numbers that look like chance, the same in every run.
struct Chance(u32);

impl Chance {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        self.next() as usize % end
    }

    /// A number near another one, mostly.
    fn near(&mut self, number: u32) -> u32 {
        let spread = [0, 0, 1, 3, 200, 70_000, u32::MAX][self.below(7)];
        let off = if spread == 0 { 0 } else { self.next() % spread };
        if self.next().is_multiple_of(2) {
            number.wrapping_add(off)
        } else {
            number.wrapping_sub(off)
        }
    }
}

/// World without a bound for new flows: what hits by chance opens some.
fn without_rates() -> World {
    let many =
        Budgets { new_flows_per_second: 1 << 30, new_flows_burst: 1 << 30, ..Budgets::default() };
    let world = World::new(many);
    world.set_policy(internet(&[]));
    world.gateway.set_allowance(1 << 40, false);
    world
}

#[test]
fn flows_survive_whatever_their_guest_says() {
    let mut world = without_rates();
    let listener = world.listen("203.0.113.5:7000");
    // It talks all the time, and listens.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut bytes = [0; 2000];
                while stream.write_all(&bytes).is_ok() && stream.read(&mut bytes).unwrap_or(0) > 0 {
                }
            });
        }
    });
    let mut card = Card::plug(&world);
    let mut chance = Chance(2_463_534_242);
    for port in 1000..1200 {
        let ours = chance.next();
        let mut syn = segment(port, 7000, SYN, ours, 0, b"");
        if port % 3 > 0 {
            // Options: a size of a segment, a scale, or noise.
            let size = [0, 1, 48, 536, 65_535][chance.below(5)] as u16;
            let mut options = vec![2, 4];
            options.extend(size.to_be_bytes());
            options.extend([3, 3, chance.next() as u8, 1]);
            if port % 3 == 2 {
                options.fill_with(|| chance.next() as u8);
            }
            syn[14 + 20 + 12] = 0x70;
            syn.extend(&options);
            syn[17] += options.len() as u8;
        }
        card.send(&syn);
        let mut theirs = 0;
        for _ in 0..60 {
            card.ask();
            // All that was said up to now; the last word is where they are.
            loop {
                let frame = card.receive();
                if frame[12..14] == [8, 6] {
                    break;
                }
                if frame.len() >= 54 && frame[36..38] == port.to_be_bytes() {
                    theirs = u32::from_be_bytes([frame[38], frame[39], frame[40], frame[41]]);
                }
            }
            let flags =
                [ACK, ACK, ACK | 8, ACK | 1, ACK | RST, SYN, SYN | ACK, 0, 0x3f, ACK | 0x20];
            let at = if chance.next().is_multiple_of(20) { 10 } else { 4 };
            let flags = flags[chance.below(at)];
            let data = vec![b'x'; [0, 0, 1, 7, 900][chance.below(5)]];
            let (seq, ack) =
                (chance.near(ours.wrapping_add(1)), chance.near(theirs.wrapping_add(1)));
            let mut frame = segment(port, 7000, flags, seq, ack, &data);
            let window = [0, 0, 1, 100, 0xffff][chance.below(5)] as u16;
            frame[48..50].copy_from_slice(&window.to_be_bytes());
            card.send(&frame);
        }
    }
    card.settle();
    world.plug();
    world.connect("203.0.113.5:7000").unwrap();
}

#[test]
fn garbage_is_dropped_and_all_else_goes_on() {
    let mut world = without_rates();
    let mut card = Card::plug(&world);
    let mut chance = Chance(12345);
    for round in 0..20_000_u32 {
        let mut frame = segment(9, 7000, (round % 64) as u8, 1, 1, b"data");
        // Broken in a few places, or cut, or nothing but noise.
        match round % 4 {
            0 => frame = (0..chance.below(200)).map(|_| chance.next() as u8).collect(),
            1 => frame.truncate(chance.below(frame.len())),
            _ => {
                for _ in 0..=chance.below(4) {
                    let at = chance.below(frame.len());
                    frame[at] = chance.next() as u8;
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
    card.ask();
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
