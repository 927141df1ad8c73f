//! Signals that end this program, where something is to be put in order before.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::{Failure, Result};

/// Listens to them from when it is made.
pub struct Ends([(Signal, u8); 4]);

impl Ends {
    /// Of the keyboard's, the terminal's and `kill`'s.
    pub fn listen() -> Result<Ends> {
        let on = |kind: SignalKind| {
            let listened = signal(kind).map(|signal| (signal, 128 + kind.as_raw_value() as u8));
            listened.map_err(|e| Failure::because("cannot listen to signals", e))
        };
        Ok(Ends([
            on(SignalKind::interrupt())?,
            on(SignalKind::terminate())?,
            on(SignalKind::hangup())?,
            on(SignalKind::quit())?,
        ]))
    }

    /// The exit code after whichever comes first.
    pub async fn first(&mut self) -> u8 {
        let [a, b, c, d] = &mut self.0;
        tokio::select! {
            _ = a.0.recv() => a.1,
            _ = b.0.recv() => b.1,
            _ = c.0.recv() => c.1,
            _ = d.0.recv() => d.1,
        }
    }
}
