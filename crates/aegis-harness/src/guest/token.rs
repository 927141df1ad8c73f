//! The capability token (contracts/aegis.md 3): in memory only, and there no longer than it counts.

/// A token. It has no `Debug`, `Clone` or `Serialize`, so that it gets nowhere by accident.
pub struct Token(String);

impl Token {
    /// Keeps it.
    pub fn new(token: String) -> Token {
        Token(token)
    }

    /// For the host alone.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.0).into_bytes();
        bytes.fill(0);
        // Seen from outside, so that the zeros are really written.
        std::hint::black_box(&bytes);
    }
}
