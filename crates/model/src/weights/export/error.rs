//! Why a model directory could not be written.

use std::io;
use std::path::{Path, PathBuf};

use emberlora_lora::peft::PeftError;
use emberlora_quant::{FloatDtype, QuantKind};

use crate::config::ConfigError;
use crate::weights::LoadError;

/// A model directory that could not be made out of another one. Nothing is then left of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The model cannot be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The model is quantised already.
    #[error(
        "{} is already quantised ({kind}): weights can only be quantised from their original bf16, f16 or f32 values",
        dir.display()
    )]
    AlreadyQuantised {
        /// The model directory.
        dir: PathBuf,
        /// Its format.
        kind: QuantKind,
    },
    /// A projection is to be left out by something that transformers would read as more than a name.
    #[error(
        "`{name}` cannot be skipped: transformers would read it as a regular expression, and only names of modules or \
         their beginnings and ends are supported"
    )]
    SkipPattern {
        /// What was given.
        name: String,
    },
    /// The adapter is not one of this model.
    #[error("adapter {}: {source}", dir.display())]
    Adapter {
        /// The adapter's directory.
        dir: PathBuf,
        /// Why.
        source: PeftError,
    },
    /// A number has no place in the format.
    #[error(
        "`{tensor}` would hold {value} at [{row}, {column}], which {}",
        if value.is_finite() { format!("{dtype} cannot store: choose bf16 or f32") } else { "is no weight".to_owned() }
    )]
    Unstorable {
        /// The tensor.
        tensor: String,
        /// Row of the first such element.
        row: usize,
        /// Its column.
        column: usize,
        /// What it is.
        value: f32,
        /// The format.
        dtype: FloatDtype,
    },
    /// Something is in the place of the directory.
    #[error("{} {}; choose another output", out.display(), match is_directory {
        true => "exists and is not empty",
        false => "is not a directory",
    })]
    Occupied {
        /// The directory that was to be written.
        out: PathBuf,
        /// Whether what is there is one.
        is_directory: bool,
    },
    /// A file could not be written.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// What was tried: `create`, `write`, …
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        source: io::Error,
    },
    /// It was called off.
    #[error("interrupted: nothing was written to {}", out.display())]
    Interrupted {
        /// The directory that was to be written.
        out: PathBuf,
    },
}

impl ExportError {
    /// Whether what was asked for is to blame, so that trying again changes nothing.
    pub fn is_wrong_input(&self) -> bool {
        !matches!(self, Self::Io { .. } | Self::Interrupted { .. })
    }
}

impl From<ConfigError> for ExportError {
    fn from(error: ConfigError) -> Self {
        Self::Load(error.into())
    }
}

/// For `map_err` where `action` on `path` failed.
pub(super) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ExportError {
    let path = path.to_owned();
    move |source| ExportError::Io { action, path, source }
}
