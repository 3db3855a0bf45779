//! Which documents share a row.
//!
//! * [`best_fit_decreasing`]: by their lengths alone
//! * `shared`: by what each adds to the tree of a row
//! * `tree`: the tree of the prefixes that documents have in common

mod best_fit;
mod best_fit_shared;
mod shared;
mod tree;

pub use best_fit::best_fit_decreasing;
pub(crate) use shared::pack_shared;
pub(crate) use tree::{PrefixTree, common_prefix};
