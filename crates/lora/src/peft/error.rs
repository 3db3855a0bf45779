use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::LoraError;

/// Why an adapter directory cannot be read, applied or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PeftError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The directory lacks one of the two files of an adapter.
    #[error("{} is not a PEFT adapter: it has no {file}", dir.display())]
    MissingFile {
        /// The directory.
        dir: PathBuf,
        /// Name of the file.
        file: &'static str,
    },
    /// The directory is missing because a crash cut its replacement short.
    #[error(
        "{} is missing because replacing it was cut short; the adapter that it held is in {}: rename that to it",
        dir.display(),
        aside.display()
    )]
    CutShort {
        /// The directory.
        dir: PathBuf,
        /// Where its adapter is.
        aside: PathBuf,
    },
    /// The tensors are stored as a Python pickle, which runs code when it is read.
    #[error(
        "{} holds the tensors as a Python pickle; convert it with PEFT: load the adapter and call \
         `model.save_pretrained(dir, safe_serialization=True)`",
        path.display()
    )]
    Pickle {
        /// The pickle.
        path: PathBuf,
    },
    /// The configuration is not JSON.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, with line and column.
        source: serde_json::Error,
    },
    /// A value of the configuration is not what it must be.
    #[error("{}: `{key}` is {found}; expected {expected}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value as JSON, or `missing`.
        found: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// The configuration asks for something that changes the numbers and is not supported.
    #[error("{}: `{key}` is {found}, which is not supported: {reason}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value as JSON.
        found: String,
        /// What it would mean.
        reason: &'static str,
    },
    /// The tensor file is truncated or malformed.
    #[error("{} is truncated or not a safetensors file: {source}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: safetensors::SafeTensorError,
    },
    /// A tensor of the file cannot be part of a LoRA adapter of linear layers.
    #[error("{}: tensor `{tensor}` cannot be used: {reason}", path.display())]
    UnsupportedTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Why not.
        reason: String,
    },
    /// A tensor does not fit its module and rank.
    #[error("tensor `{tensor}` has shape {found:?}; the module and the adapter's rank need {expected:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// The shape that fits.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// The tensors of the file are not those that the configuration and the model call for.
    #[error("the adapter does not fit the model: {}", mismatch(missing, unused))]
    Mismatch {
        /// Tensors that the model needs and the file lacks.
        missing: Vec<String>,
        /// Tensors that the file has and nothing takes.
        unused: Vec<String>,
    },
    /// The adapter comes with base weights, and they are not those of the model.
    #[error("tensor `{tensor}` is a base weight that differs from the model's: the adapter belongs to another model")]
    BaseWeight {
        /// The tensor.
        tensor: String,
    },
    /// The adapter's options cannot be applied to the model.
    #[error(transparent)]
    Options(#[from] LoraError),
    /// There is nothing to write.
    #[error("the model has no adapter to save")]
    NoAdapter,
    /// The adapters on the model were not made with the options that are to be written.
    #[error("`{module}` does not have the adapter that the options describe: {difference}")]
    OptionsDiffer {
        /// The module.
        module: String,
        /// How they differ.
        difference: String,
    },
    /// The place is taken by something that must not be replaced.
    #[error("{} exists and is not an adapter directory; it is left alone, choose another place", path.display())]
    Occupied {
        /// The place.
        path: PathBuf,
    },
    /// The values of a tensor cannot be read back from its device.
    #[error("cannot read tensor `{tensor}` from its device: {reason}")]
    Device {
        /// The tensor.
        tensor: String,
        /// What the backend says.
        reason: String,
    },
}

fn mismatch(missing: &[String], unused: &[String]) -> String {
    let list = |what: &str, names: &[String]| match names {
        [] => None,
        names => Some(format!("{} {what} ({})", names.len(), names.join(", "))),
    };
    [list("missing tensors", missing), list("unused tensors", unused)]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join("; ")
}
