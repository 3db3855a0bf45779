//! Why a model could not be found or fetched.

use std::path::{Path, PathBuf};

use crate::config::ConfigError;
use crate::weights::{INDEX, LoadError, SINGLE};

/// A model that could not be found or fetched, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// It is written like a path, and there is no such directory.
    #[error("{} It does not read like an id on the hub (`org/name`)", absent(.0))]
    NoSuchDirectory(String),
    /// A revision was asked for of a model that is a local directory.
    #[error(
        "`{}` is a local directory, which has no revisions, but `model.revision` is `{revision}`: leave \
         it at `main`, or name the model by its id on the hub",
        dir.display()
    )]
    RevisionOfDirectory {
        /// The directory.
        dir: PathBuf,
        /// The revision.
        revision: String,
    },
    /// The hub has no such repository, or not this revision or file of it.
    #[error(
        "{} {endpoint} has no {what} of that name at revision `{revision}`; a private repository looks the same \
         without a token in HF_TOKEN",
        absent(id)
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
        "{} {endpoint} refuses access to an id of that name (HTTP {status}): {}",
        absent(id),
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
    #[error(
        "{} As an id on the hub: {endpoint} cannot be reached, and there is no complete copy in {}: {reason}",
        absent(id),
        cache.display()
    )]
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
    /// The hub could not be reached, and the copy in the cache is not all that is needed.
    #[error(
        "`{id}`: {endpoint} cannot be reached, and the copy in {} has no {missing}: run once with a connection, which \
         fetches only what is missing, or put the file there: {reason}",
        dir.display()
    )]
    Incomplete {
        /// The id.
        id: String,
        /// The hub's address.
        endpoint: String,
        /// The copy.
        dir: PathBuf,
        /// The first file that it lacks.
        missing: String,
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

/// Says first what is most often the mistake: a path that is wrong, or a model that was not fetched yet.
fn absent(source: &str) -> String {
    let mut text = format!("there is no directory `{source}` here");
    if looks_like_a_path(source) {
        text.push_str(": fetch the model into it, or correct the path (relative to where the command runs)");
    }
    text.push('.');
    text
}

/// Whether somebody who wrote `source` probably meant a directory, though it may read like an id.
fn looks_like_a_path(source: &str) -> bool {
    let parents = Path::new(source).parent().filter(|parent| !parent.as_os_str().is_empty());
    source.starts_with(['.', '/', '~'])
        || source.starts_with("models/")
        || source.matches('/').count() > 1
        || parents.is_some_and(Path::is_dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_recognised_although_they_read_like_ids() {
        for path in ["models/smollm2", "./model", "/models/x", "~/model", "a/b/c", "src/hub"] {
            assert!(looks_like_a_path(path), "{path}");
        }
        for id in ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"] {
            assert!(!looks_like_a_path(id), "{id}");
        }
    }
}
