//! The words of the house: ids, names and amounts, parsed once at the edge and valid from then on.
//!
//! Units are types. `MB` is 2^20 bytes where it is machine memory (as every VMM counts), `GB` is
//! 10^9 bytes where it is disk or network (as contracts/couch.md 6 counts).

mod amounts;
mod ids;
mod limits;
mod reference;
mod time;

pub use amounts::{CpuMillis, DiskBytes, EgressBytes, LlmTokens, MemoryMb, Number, Share};
pub use ids::{
    BadWord, CommitId, GuestId, Handle, ImageRef, InstanceId, InviteCode, InviteId, Label, Port,
    PublicKey, SecretName, Tree, Uuid,
};
pub use limits::{Limit, Limits, OnLimit, Permissions, Usage, Violation};
pub use reference::{Reference, is_digest, is_loopback};
pub use time::{DurationMs, Time};
