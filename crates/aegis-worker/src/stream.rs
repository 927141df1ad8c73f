//! What QEMU saves of a running machine, made smaller on its way: pages of zeros are left out.
//!
//! QEMU writes down every page of zeros, and who takes the stream over reads every one of them to see
//! that it is; in a fresh memory file that alone makes each a page of the host's. The memory that we
//! give is fresh. So a page of zeros says something only where another one was sent before.
//!
//! The format (QEMU's `migration/ram.c`, `migration/savevm.c`; the same since 2015):
//! ```text
//! file     magic version · configuration · section … section
//! section  START id name instance version | PART id | END id, then records, then a footer with the id
//! record   offset|flags (8) · name of the block, unless CONTINUE · what the flags say
//! ```
//! Only sections of `ram` are understood, and they come first. What comes instead of them, or behind the
//! last, is passed on as it is.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};

/// `QEVM`, and the version.
const MAGIC: [u8; 8] = [0x51, 0x45, 0x56, 0x4d, 0, 0, 0, 3];
const CONFIGURATION: u8 = 7;
const START: u8 = 1;
const PART: u8 = 2;
const END: u8 = 3;
const FOOTER: u8 = 0x7e;
/// The section of the machine's memory.
const RAM: &[u8] = b"ram";
/// Size of a page, bytes; flags lie below.
const PAGE: usize = 4096;
/// Longest name of a machine type, bytes.
const NAME_MAX: u32 = 256;
/// What is read and written at once, bytes.
const BUFFER: usize = 1 << 20;

mod flag {
    pub const ZERO: u64 = 0x02;
    pub const MEM_SIZE: u64 = 0x04;
    pub const PAGE: u64 = 0x08;
    pub const EOS: u64 = 0x10;
    pub const CONTINUE: u64 = 0x20;
    pub const ALL: u64 = super::PAGE as u64 - 1;
}

/// Copies what QEMU saves to the end, without pages of zeros of the memory called `fresh` that say
/// nothing; fails when it is more than `most` bytes.
pub fn copy(from: impl Read, to: impl Write, fresh: &str, most: u64) -> io::Result<()> {
    let mut copy = Copy {
        from: BufReader::with_capacity(BUFFER, from.take(most + 1)),
        to: BufWriter::with_capacity(BUFFER, to),
        fresh: fresh.as_bytes(),
        section: None,
        whole: false,
        block: Vec::new(),
        said: Vec::new(),
        sent: HashMap::new(),
    };
    if copy.begin()? {
        while copy.section()? {}
    }
    io::copy(&mut copy.from, &mut copy.to)?;
    copy.to.flush()?;
    if copy.from.get_ref().limit() == 0 {
        return Err(io::Error::other(format!("QEMU saved more than {most} bytes")));
    }
    Ok(())
}

struct Copy<'a, R, W: Write> {
    from: BufReader<io::Take<R>>,
    to: BufWriter<W>,
    fresh: &'a [u8],
    /// Number of the memory's section.
    section: Option<[u8; 4]>,
    /// All of it came.
    whole: bool,
    /// Whose pages came last, and whose went last.
    block: Vec<u8>,
    said: Vec<u8>,
    /// Of `fresh`, by 64 pages: those that were sent as something else than zeros.
    sent: HashMap<u64, u64>,
}

impl<R: Read, W: Write> Copy<'_, R, W> {
    /// Passes on what comes before the first section; false where that is something else.
    fn begin(&mut self) -> io::Result<bool> {
        if self.pass::<8>()? != MAGIC {
            return Ok(false);
        }
        if self.next()? == Some(CONFIGURATION) {
            self.pass::<1>()?;
            let len = u32::from_be_bytes(self.pass()?);
            if len > NAME_MAX {
                return Ok(false);
            }
            self.pass_many(len as usize)?;
        }
        Ok(true)
    }

    /// Passes one section of the memory on; false at anything else.
    fn section(&mut self) -> io::Result<bool> {
        let kind = match (self.next()?, self.section) {
            (Some(START), None) => START,
            (Some(kind @ (PART | END)), Some(_)) => kind,
            // Some of it was left out already: what is not understood may mean those.
            (Some(_), Some(_)) if !self.whole => return Err(unknown("a section")),
            _ => return Ok(false),
        };
        self.pass::<1>()?;
        let id: [u8; 4] = self.pass()?;
        if kind == START {
            let name = self.name()?;
            say_name(&mut self.to, &name)?;
            // Instance and version.
            self.pass::<8>()?;
            if name != RAM {
                return Ok(false);
            }
            self.section = Some(id);
        } else if self.section != Some(id) {
            return Err(unknown("a section"));
        }
        while self.record()? {}
        if self.next()? != Some(FOOTER) || self.pass::<5>()?[1..] != id {
            return Err(unknown("the end of a section"));
        }
        self.whole = kind == END;
        Ok(!self.whole)
    }

    /// Passes one record on; false after the last one of its section.
    fn record(&mut self) -> io::Result<bool> {
        let mut head = [0; 8];
        self.from.read_exact(&mut head)?;
        let head = u64::from_be_bytes(head);
        let (offset, flags) = (head & !flag::ALL, head & flag::ALL);
        match flags & !flag::CONTINUE {
            flag::MEM_SIZE => {
                self.to.write_all(&head.to_be_bytes())?;
                self.sizes(offset)?;
                Ok(true)
            }
            flag::EOS => {
                self.to.write_all(&head.to_be_bytes())?;
                Ok(false)
            }
            kind @ (flag::ZERO | flag::PAGE) => {
                if flags & flag::CONTINUE == 0 {
                    self.block = self.name()?;
                }
                self.page(offset, kind)?;
                Ok(true)
            }
            other => Err(unknown(&format!("{other:#x}"))),
        }
    }

    /// Names and sizes of all blocks.
    fn sizes(&mut self, mut left: u64) -> io::Result<()> {
        while left > 0 {
            let name = self.name()?;
            say_name(&mut self.to, &name)?;
            let size = u64::from_be_bytes(self.pass()?);
            left = left.checked_sub(size).ok_or(io::ErrorKind::InvalidData)?;
            if size == 0 {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        Ok(())
    }

    fn page(&mut self, offset: u64, kind: u64) -> io::Result<()> {
        if self.is_fresh() {
            let number = offset / PAGE as u64;
            let (word, bit) = (number / 64, 1 << (number % 64));
            if kind == flag::PAGE {
                *self.sent.entry(word).or_default() |= bit;
            } else if self.sent.get(&word).is_none_or(|sent| sent & bit == 0) {
                return self.from.read_exact(&mut [0]);
            }
        }
        let again = if self.said == self.block { flag::CONTINUE } else { 0 };
        self.to.write_all(&(offset | kind | again).to_be_bytes())?;
        if again == 0 {
            self.said.clone_from(&self.block);
            say_name(&mut self.to, &self.said)?;
        }
        self.pass_many(if kind == flag::PAGE { PAGE } else { 1 })
    }

    /// Whether the pages that come are of memory that was given fresh. QEMU may name it with its path.
    fn is_fresh(&self) -> bool {
        self.block
            .strip_suffix(self.fresh)
            .is_some_and(|path| path.is_empty() || path.ends_with(b"/"))
    }

    /// The byte that comes next.
    fn next(&mut self) -> io::Result<Option<u8>> {
        Ok(self.from.fill_buf()?.first().copied())
    }

    /// A length in a byte, and so much.
    fn name(&mut self) -> io::Result<Vec<u8>> {
        let mut len = [0];
        self.from.read_exact(&mut len)?;
        let mut name = vec![0; len[0].into()];
        self.from.read_exact(&mut name)?;
        Ok(name)
    }

    /// Passes so many bytes on, and gives them.
    fn pass<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.from.read_exact(&mut bytes)?;
        self.to.write_all(&bytes)?;
        Ok(bytes)
    }

    /// Passes so many bytes on.
    fn pass_many(&mut self, mut left: usize) -> io::Result<()> {
        while left > 0 {
            let bytes = self.from.fill_buf()?;
            if bytes.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let now = left.min(bytes.len());
            self.to.write_all(&bytes[..now])?;
            self.from.consume(now);
            left -= now;
        }
        Ok(())
    }
}

fn unknown(what: &str) -> io::Error {
    io::Error::other(format!("QEMU saves memory in another way: {what}"))
}

fn say_name(to: &mut impl Write, name: &[u8]) -> io::Result<()> {
    to.write_all(&[u8::try_from(name.len()).unwrap_or(u8::MAX)])?;
    to.write_all(name)
}

#[cfg(test)]
mod tests;
