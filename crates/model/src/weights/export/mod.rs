//! Model directories made out of others: [`quantise`] packs, [`merge`] adds an adapter.
//!
//! ```text
//! shard ─▶ tensor by tensor ─▶ rewritten ─▶ shard of the same name ─┐
//! config.json ─▶ changed where the weights are ────────────────────┼─▶ directory, renamed to its place
//! tokenizer and the like ─▶ copied ────────────────────────────────┘
//! ```
//!
//! At any time one tensor is in memory, or a part of one.

mod directory;
mod error;
mod merge;
mod quantise;
mod rewrite;
mod shard;

pub use directory::check;
pub use error::ExportError;
pub use merge::{MergeOptions, merge};
pub use quantise::quantise;
pub use rewrite::{ExportProgress, ExportReport};
