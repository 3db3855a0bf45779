//! Why a model could not be found or fetched.

use std::path::PathBuf;

use crate::config::ConfigError;
use crate::weights::{INDEX, LoadError, SINGLE};

/// A model that could not be found or fetched, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// It is written like a path, and there is no such directory.
    #[error("`{0}` is not a directory, and does not read like an id on the hub (`org/name`) either")]
    NoSuchDirectory(String),
    /// The hub has no such repository, or not this revision or file of it.
    #[error(
        "`{id}` is not a directory here, and {endpoint} has no {what} of that name at revision `{revision}`; a private \
         repository looks the same without a token in HF_TOKEN"
    )]
    NotFound {
        /// The id.
        id: String,
        /// The revision that was asked for.
        revision: String,
        /// The hub's address.
        endpoint: String,
        /// A repository, or one of its files.
        what: String,
    },
    /// The hub refuses.
    #[error(
        "{endpoint} refuses access to `{id}` (HTTP {status}): {}",
        if *with_token {
            "the token in HF_TOKEN does not allow it; accept the model's terms on its page, or use another token"
        } else {
            "the repository is private, gated or does not exist; set HF_TOKEN to a token that may read it"
        }
    )]
    Refused {
        /// The id.
        id: String,
        /// The hub's address.
        endpoint: String,
        /// 401 or 403.
        status: u16,
        /// Whether a token was sent.
        with_token: bool,
    },
    /// The hub could not be reached or broke off.
    #[error("`{id}`: {endpoint} cannot be reached, and there is no complete copy in {}: {reason}", cache.display())]
    Connection {
        /// The id.
        id: String,
        /// The hub's address.
        endpoint: String,
        /// Where a copy was looked for.
        cache: PathBuf,
        /// What the network said.
        reason: String,
    },
    /// The hub answered with something else than it should.
    #[error("`{id}`: {endpoint} gave an answer that is not understood: {reason}")]
    Answer {
        /// The id.
        id: String,
        /// The hub's address.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The cache could not be written.
    #[error("{}: {reason}", cache.display())]
    Cache {
        /// The cache directory.
        cache: PathBuf,
        /// What the operating system said.
        reason: String,
    },
    /// The repository has no weights in a format that can be read.
    #[error("`{id}` has no {SINGLE} and no {INDEX} at revision `{revision}`; other formats are not read")]
    NoWeights {
        /// The id.
        id: String,
        /// The revision.
        revision: String,
    },
    /// The model is of a kind that is not supported, which was found out before its weights were fetched.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The list of shards is malformed or names files outside the repository.
    #[error(transparent)]
    Index(#[from] LoadError),
}
