//! How much of a command's standard input may be under way to it.

use crate::bounds::STDIN_WINDOW;

/// The machine tells of more input than there was, or of less than before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no count of the input that was taken")]
pub struct BadWindow;

/// What was sent of an input, and what of that was taken: with [`STDIN_WINDOW`] between them at most,
/// whoever is between them can always pass on what comes, and so sees the end behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    sent: u64,
    taken: u64,
}

impl Window {
    /// Bytes that may be sent now.
    pub fn room(self) -> usize {
        let under_way = usize::try_from(self.sent - self.taken).unwrap_or(usize::MAX);
        STDIN_WINDOW.saturating_sub(under_way)
    }

    /// So many were sent.
    pub fn sent(&mut self, bytes: usize) {
        self.sent = self.sent.saturating_add(bytes as u64);
    }

    /// So many were taken altogether.
    ///
    /// # Errors
    /// When that can't be.
    pub fn taken(&mut self, total: u64) -> Result<(), BadWindow> {
        if !(self.taken..=self.sent).contains(&total) {
            return Err(BadWindow);
        }
        self.taken = total;
        Ok(())
    }

    /// Payload of a [`super::output::Kind::Taken`] frame: the total, big-endian.
    pub fn bytes(total: u64) -> [u8; 8] {
        total.to_be_bytes()
    }

    /// From such a payload.
    ///
    /// # Errors
    /// When it is none.
    pub fn parse(bytes: &[u8]) -> Result<u64, BadWindow> {
        bytes.try_into().map(u64::from_be_bytes).map_err(|_| BadWindow)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the machine tells: what is under way stays within the window.
        #[test]
        fn no_more_is_under_way(steps in prop::collection::vec((any::<bool>(), any::<u64>()), 0..60)) {
            let mut window = Window::default();
            let (mut sent, mut taken) = (0_u64, 0_u64);
            for (send, n) in steps {
                if send {
                    let n = window.room().min(usize::try_from(n).unwrap_or(usize::MAX));
                    window.sent(n);
                    sent += n as u64;
                } else {
                    // Mostly something that may be so.
                    let total = if n % 4 == 0 { n } else { n % (sent + 2) };
                    let told = window.taken(total);
                    prop_assert_eq!(told.is_ok(), total >= taken && total <= sent);
                    if told.is_ok() {
                        taken = total;
                    }
                }
                prop_assert!(sent - taken <= STDIN_WINDOW as u64);
                prop_assert_eq!(window.room() as u64, STDIN_WINDOW as u64 - (sent - taken));
            }
        }
    }

    #[test]
    fn a_count_is_eight_bytes() {
        assert_eq!(Window::parse(&Window::bytes(77)), Ok(77));
        for bad in [&b""[..], b"1234567", b"123456789"] {
            assert_eq!(Window::parse(bad), Err(BadWindow));
        }
    }
}
