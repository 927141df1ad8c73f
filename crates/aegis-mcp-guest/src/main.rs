//! `aegis-mcp-guest`.
fn main() {}
