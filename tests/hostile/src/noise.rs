//! What no host should have to read.

/// Bytes without an order; cheap, and the same ones each time.
pub struct Noise(u64);

impl Noise {
    /// Noise of its own.
    pub fn new(seed: u64) -> Noise {
        Noise(seed | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// So many bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            out.extend_from_slice(&self.number().to_le_bytes());
        }
        out.truncate(len);
        out
    }
}

/// Length-prefixed, as on the control stream.
pub fn framed(body: &[u8]) -> Vec<u8> {
    let mut out = (body.len() as u32).to_be_bytes().to_vec();
    out.extend_from_slice(body);
    out
}

/// JSON of about this length that takes a hundred times as much memory once it is parsed.
pub fn swollen(len: usize) -> String {
    let mut text = String::with_capacity(len + 16);
    text.push_str("[{\"\":0}");
    while text.len() < len {
        text.push_str(",{\"\":0}");
    }
    text.push(']');
    text
}
