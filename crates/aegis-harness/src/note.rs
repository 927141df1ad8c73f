//! Remarks for whoever looks at a machine's kernel log. There is no other place to write to.

use std::io::Write as _;

/// Longest remark, bytes; the kernel cuts what is longer.
const REMARK_MAX: usize = 900;

/// Writes one line to the kernel log.
pub fn note(text: &str) {
    let Ok(mut kernel) = std::fs::File::options().write(true).open("/dev/kmsg") else { return };
    let cut = text.floor_char_boundary(REMARK_MAX);
    let _ = kernel.write_all(format!("<4>aegis-harness: {}", &text[..cut]).as_bytes());
}
