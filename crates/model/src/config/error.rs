//! Why a `config.json` could not be understood.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// A `config.json` that is absent, malformed, or asks for something this crate does not compute.
///
/// Whatever might change a model's numbers is refused rather than ignored, so that a model which loads is the model
/// that was trained.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{}: cannot be read: {source}; a model directory needs a config.json", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The file is not a JSON object.
    #[error("{}: not a JSON object: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A key without a default is absent.
    #[error("{}: `{key}` is missing", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The key's path.
        key: String,
    },
    /// A value has another type than the key asks for.
    #[error("{}: `{key}` is {found}, expected {expected}", path.display())]
    WrongType {
        /// The file.
        path: PathBuf,
        /// The key's path.
        key: String,
        /// The value, as JSON.
        found: String,
        /// What the key holds.
        expected: &'static str,
    },
    /// A value that is understood and not supported, or that contradicts another one.
    #[error("{}: `{key}` is {found}: {reason}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key's path.
        key: String,
        /// The value, as JSON.
        found: String,
        /// Why it cannot be honoured, and what can.
        reason: String,
    },
    /// Keys that are neither used nor known to be harmless.
    #[error("{}: {} not known and may change the model's numbers, so nothing is assumed about {}", path.display(),
            list(keys), if keys.len() == 1 { "it" } else { "them" })]
    Unknown {
        /// The file.
        path: PathBuf,
        /// Each key's path with its value, as JSON.
        keys: Vec<(String, String)>,
    },
}

fn list(keys: &[(String, String)]) -> String {
    let named: Vec<String> = keys.iter().map(|(key, value)| format!("`{key}` ({value})")).collect();
    format!("{} {}", named.join(", "), if keys.len() == 1 { "is" } else { "are" })
}

impl ConfigError {
    pub(super) fn unsupported(path: &Path, key: &str, found: &Value, reason: impl Into<String>) -> Self {
        Self::Unsupported { path: path.into(), key: key.into(), found: shown(found), reason: reason.into() }
    }
}

/// A value as it is shown in a message: JSON, cut where it becomes unreadable.
pub(super) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((cut, _)) => format!("{}…", &text[..cut]),
        None => text,
    }
}
