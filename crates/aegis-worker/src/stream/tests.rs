use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const FRESH: &str = "m0";
const ID: [u8; 4] = [0, 0, 0, 2];
const TAIL: &[u8] = b"\x04 devices, whose length nobody knows";

/// A page that is sent: of which block, which, and what all of it says.
type Sent = (u8, u64, u8);

fn name(block: u8) -> &'static [u8] {
    [&b"m0"[..], b"/objects/m0", b"rom0"][usize::from(block)]
}

/// What QEMU would save: the memory in sections, and the devices.
fn saved(sections: &[Vec<Sent>]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.push(CONFIGURATION);
    out.extend([0, 0, 0, 7]);
    out.extend(b"microvm");
    out.push(START);
    out.extend(ID);
    out.extend(b"\x03ram");
    out.extend([0, 0, 0, 0, 0, 0, 0, 4]);
    let size = 64 * PAGE as u64;
    out.extend(((3 * size) | flag::MEM_SIZE).to_be_bytes());
    for block in 0..3 {
        say_name(&mut out, name(block)).unwrap();
        out.extend(size.to_be_bytes());
    }
    end(&mut out);
    let mut last = None;
    for (at, section) in sections.iter().enumerate() {
        out.push(if at + 1 == sections.len() { END } else { PART });
        out.extend(ID);
        for (block, page, byte) in section {
            let again = if last == Some(block) { flag::CONTINUE } else { 0 };
            let kind = if *byte == 0 { flag::ZERO } else { flag::PAGE };
            out.extend(((page * PAGE as u64) | kind | again).to_be_bytes());
            if again == 0 {
                say_name(&mut out, name(*block)).unwrap();
            }
            last = Some(block);
            out.extend(vec![*byte; if *byte == 0 { 1 } else { PAGE }]);
        }
        end(&mut out);
    }
    out.extend(TAIL);
    out
}

fn end(out: &mut Vec<u8>) {
    out.extend(flag::EOS.to_be_bytes());
    out.push(FOOTER);
    out.extend(ID);
}

/// What memory that was all zeros is after it took that over, and how many pages were touched.
fn taken_over(stream: &[u8]) -> (BTreeMap<(Vec<u8>, u64), u8>, usize) {
    let (mut memory, mut touched) = (BTreeMap::new(), 0);
    let mut from = stream;
    let mut take = |n: usize| {
        let (now, rest) = from.split_at(n);
        from = rest;
        now
    };
    take(8 + 1 + 4 + 7 + 1 + 4 + 4 + 8);
    let mut block = vec![];
    let mut started = false;
    loop {
        if started && [PART, END].contains(&take(1)[0]) {
            take(4);
        } else if started {
            break;
        }
        started = true;
        loop {
            let head = u64::from_be_bytes(take(8).try_into().unwrap());
            let (at, flags) = (head & !flag::ALL, head & flag::ALL);
            if flags & flag::EOS != 0 {
                break;
            }
            if flags & flag::MEM_SIZE != 0 {
                for n in 0..3 {
                    take(1 + name(n).len() + 8);
                }
                continue;
            }
            if flags & flag::CONTINUE == 0 {
                let len = take(1)[0].into();
                block = take(len).to_vec();
            }
            let byte = take(if flags & flag::PAGE != 0 { PAGE } else { 1 })[0];
            touched += 1;
            if byte == 0 {
                memory.remove(&(block.clone(), at));
            } else {
                memory.insert((block.clone(), at), byte);
            }
        }
        assert_eq!(take(5)[0], FOOTER);
    }
    assert!(stream.ends_with(TAIL));
    (memory, touched)
}

fn copied(stream: &[u8], most: u64) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    copy(stream, &mut out, FRESH, most).map(|()| out)
}

fn pages() -> impl Strategy<Value = Vec<Vec<Sent>>> {
    let page = (0..3u8, 0..8u64, prop_oneof![3 => Just(0u8), 2 => 1..=255u8]);
    prop::collection::vec(prop::collection::vec(page, 0..30), 1..5)
}

proptest! {
    #[test]
    fn the_memory_is_the_same(sections in pages()) {
        let stream = saved(&sections);
        let small = copied(&stream, u64::MAX - 1).unwrap();
        prop_assert!(small.len() <= stream.len());
        let ((memory, _), (same, _)) = (taken_over(&stream), taken_over(&small));
        prop_assert_eq!(memory, same);
    }

    #[test]
    fn what_is_cut_off_ends(sections in pages(), at in any::<prop::sample::Index>()) {
        let stream = saved(&sections);
        // Whatever comes of it: nothing is made up, and nothing panics.
        if let Ok(out) = copied(&stream[..at.index(stream.len())], u64::MAX - 1) {
            prop_assert!(out.len() <= stream.len());
        }
    }

    #[test]
    fn what_is_not_known_is_passed_on(bytes in prop::collection::vec(any::<u8>(), 8..2000)) {
        prop_assert_eq!(copied(&bytes, u64::MAX - 1).unwrap(), bytes);
    }
}

#[test]
fn only_zeros_that_say_nothing_are_left_out() {
    let sections = [vec![(0, 1, 0), (0, 2, 7), (0, 3, 0)], vec![(0, 2, 0), (0, 4, 0), (2, 5, 0)]];
    let (_, touched) = taken_over(&copied(&saved(&sections), 1 << 20).unwrap());
    assert_eq!(touched, 3, "a page, its zeros after that, and one of memory that is not fresh");
}

#[test]
fn no_more_is_copied_than_a_machine_can_have() {
    let stream = saved(&[vec![(0, 1, 9), (0, 2, 0)]]);
    let all = stream.len() as u64;
    assert!(copied(&stream, all).is_ok());
    let error = copied(&stream, all - 1).unwrap_err();
    assert_eq!(error.to_string(), format!("QEMU saved more than {} bytes", all - 1));
}

#[test]
fn memory_that_is_saved_in_another_way_is_none() {
    let mut stream = saved(&[vec![]]);
    let at = stream.len() - TAIL.len() - 5 - 8;
    stream[at..at + 8].copy_from_slice(&0x40u64.to_be_bytes());
    assert!(copied(&stream, 1 << 20).is_err());
}
