//! Why a model's weights could not be loaded.

use std::fmt;
use std::path::PathBuf;

use emberlora_quant::bnb::BnbError;
use emberlora_quant::{FloatDtype, QuantError};

use crate::config::ConfigError;

/// Weights that are absent, damaged, or not those of the model that `config.json` describes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// `config.json` is not understood.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The directory has neither `model.safetensors` nor an index of shards.
    #[error("{}: no model.safetensors and no model.safetensors.index.json{hint}", dir.display())]
    NoWeights {
        /// The model directory.
        dir: PathBuf,
        /// What was found in their place.
        hint: String,
    },
    /// A file could not be opened or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The shard index is not what it should be.
    #[error("{}: {reason}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The shard index names a file that is not inside the model's directory.
    #[error("{}: tensor `{tensor}` is said to be in `{shard}`, which is outside the model's directory", path.display())]
    ShardOutside {
        /// The index file.
        path: PathBuf,
        /// A tensor that is mapped to it.
        tensor: String,
        /// The file as the index names it.
        shard: String,
    },
    /// A file is shorter than its header says.
    #[error("{}: truncated: {found} bytes, but its header describes {expected}; download it again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that the header accounts for.
        expected: u64,
        /// Bytes that there are.
        found: u64,
    },
    /// A file is not a well-formed safetensors file.
    #[error("{}: not a valid safetensors file: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The invariant that it breaks.
        reason: String,
    },
    /// A tensor has a number format that no weight has.
    #[error("{}: tensor `{tensor}` is {found}; weights are F32, F16 or BF16", path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its format as safetensors names it.
        found: String,
    },
    /// The tensors are not those that `config.json` describes.
    #[error("{}: the weights do not fit config.json{mismatch}", dir.display())]
    Mismatch {
        /// The model directory.
        dir: PathBuf,
        /// Everything that does not fit.
        mismatch: Mismatch,
    },
    /// A weight cannot be packed.
    #[error("{}: {source}", path.display())]
    Pack {
        /// The file.
        path: PathBuf,
        /// Why, with the tensor.
        source: QuantError,
    },
    /// A weight that is stored packed cannot be read.
    #[error("{}: {source}", path.display())]
    Packed {
        /// The file.
        path: PathBuf,
        /// Why, with the tensor.
        source: BnbError,
    },
    /// A projection is stored in another way than it should be.
    #[error("{}: `{what}` is {found}; expected {expected}, {because}", path.display())]
    Quantization {
        /// The file.
        path: PathBuf,
        /// The tensor, or the key of `config.json`.
        what: String,
        /// How it is stored.
        found: String,
        /// How it should be.
        expected: String,
        /// Who says so.
        because: DecidedBy,
    },
    /// The device cannot hold or compute in the format that was asked for.
    #[error("{device} does not support {dtype}; choose f32")]
    UnsupportedDtype {
        /// The format.
        dtype: FloatDtype,
        /// The device.
        device: String,
    },
}

/// Who says how a projection should be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecidedBy {
    /// The options, with which a directory that is quantised already has to agree.
    Options,
    /// The directory's own configuration.
    Config,
    /// The other weights of the directory.
    Others,
    /// The files, which hold packed weights.
    Weights,
}

impl fmt::Display for DecidedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Options => "as `quantization` says: let both agree, or leave it out to take the directory as it is",
            Self::Config => "as `quantization_config` of config.json says",
            Self::Others => "as the weights before it",
            Self::Weights => "as the files hold quantised weights: the config.json is not theirs",
        })
    }
}

/// What is between the names and shapes that a model needs and those that its files have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Mismatch {
    /// Needed and not there, each with the most similar name among the unused ones.
    pub missing: Vec<(String, Option<String>)>,
    /// There and not needed.
    pub unused: Vec<String>,
    /// There with another shape.
    pub misshaped: Vec<Misshaped>,
}

/// A tensor whose shape is not the one that `config.json` implies.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Misshaped {
    /// The tensor.
    pub name: String,
    /// The shape that the model needs.
    pub expected: Vec<usize>,
    /// The shape in the file.
    pub found: Vec<usize>,
}

impl Mismatch {
    /// Whether everything fits.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unused.is_empty() && self.misshaped.is_empty()
    }
}

/// How many tensors of one kind are listed; a wrong config makes hundreds.
const SHOWN: usize = 8;

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        section(f, "missing", &self.missing, |f, (name, nearest)| match nearest {
            Some(nearest) => write!(f, "{name} (there is an unused {nearest})"),
            None => f.write_str(name),
        })?;
        section(f, "with another shape", &self.misshaped, |f, tensor| {
            write!(f, "{}: expected {:?}, found {:?}", tensor.name, tensor.expected, tensor.found)
        })?;
        section(f, "unused", &self.unused, |f, name| f.write_str(name))
    }
}

fn section<T>(
    f: &mut fmt::Formatter<'_>,
    title: &str,
    items: &[T],
    line: impl Fn(&mut fmt::Formatter<'_>, &T) -> fmt::Result,
) -> fmt::Result {
    if items.is_empty() {
        return Ok(());
    }
    write!(f, "\n  {title} ({}):", items.len())?;
    for item in items.iter().take(SHOWN) {
        f.write_str("\n    ")?;
        line(f, item)?;
    }
    if items.len() > SHOWN {
        write!(f, "\n    … and {} more", items.len() - SHOWN)?;
    }
    Ok(())
}
