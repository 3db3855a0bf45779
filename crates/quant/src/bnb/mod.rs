//! The layout in which bitsandbytes and transformers keep quantised weights in a checkpoint.
//!
//! Beside a 4-bit `….weight`, whose bytes are the packed codes, stand
//!
//! | tensor | holds |
//! |---|---|
//! | `….weight.absmax` | the scales: f32, or u8 with double quantisation |
//! | `….weight.quant_map` | the sixteen values of the codes |
//! | `….weight.nested_absmax`, `….weight.nested_quant_map` | the second level of double quantisation |
//! | `….weight.quant_state.bitsandbytes__nf4` or `…__fp4` | shape, dtype, block sizes and offset: JSON, one byte per element |
//!
//! and beside an INT8 `….weight` the row scales, `….SCB`, and `….weight_format`, which is 0 for rows.
//!
//! Nothing here opens a file. Reading takes a function that finds tensors by name, writing returns tensors.

mod config;
mod error;
mod parts;
mod read;
mod state;
mod write;

use std::borrow::Cow;
use std::fmt;

pub use config::{Config, ConfigError, is_skipped};
pub use error::BnbError;
pub use parts::{LONGEST_STATE, Part, parts};
pub use read::from_tensors;
pub use state::torch_name;
pub use write::to_tensors;

use crate::{Codebook, FloatDtype};

/// How far tables in a checkpoint may lie from ours: what bitsandbytes allows when it compares two.
const TABLE_TOLERANCE: f32 = 1e-6;

/// The element type of a stored tensor, as far as quantised weights have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// Unsigned bytes.
    U8,
    /// Signed bytes.
    I8,
    /// Floating point.
    Float(FloatDtype),
    /// Any other.
    Other,
}

impl Element {
    /// The type with a safetensors name: `U8`, `I8`, `F32`, …
    pub fn from_name(name: &str) -> Self {
        match name {
            "U8" => Self::U8,
            "I8" => Self::I8,
            other => other.parse().map_or(Self::Other, Self::Float),
        }
    }

    /// Bytes that one takes; `None` for a type that no quantised weight has.
    pub const fn size(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 => Some(1),
            Self::Float(dtype) => Some(dtype.size()),
            Self::Other => None,
        }
    }

    /// The safetensors name; `other` for a type that no quantised weight has.
    pub const fn name(self) -> &'static str {
        match self {
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::Float(FloatDtype::F32) => "F32",
            Self::Float(FloatDtype::Bf16) => "BF16",
            Self::Float(FloatDtype::F16) => "F16",
            Self::Other => "other",
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tensor of a checkpoint: little-endian, row-major.
#[derive(Clone, Debug, PartialEq, Eq, derive_new::new)]
pub struct Tensor<'a> {
    /// What its elements are.
    pub element: Element,
    /// Its shape; empty for a scalar.
    pub shape: Vec<usize>,
    /// Its bytes.
    #[new(into)]
    pub bytes: Cow<'a, [u8]>,
}

/// The name of a weight's 4-bit state.
fn state_name(weight: &str, codebook: Codebook) -> String {
    format!("{weight}.quant_state.bitsandbytes__{codebook}")
}

/// The name of something that stands beside a weight in its module: `q_proj.SCB` for `q_proj.weight`.
fn sibling(weight: &str, name: &str) -> String {
    match weight.strip_suffix("weight") {
        Some(module) => format!("{module}{name}"),
        None => format!("{weight}.{name}"),
    }
}

/// The weight that a tensor of this name belongs to, when it is a part of a quantised weight other than the codes:
/// `….q_proj.weight` for `….q_proj.weight.absmax` and `….q_proj.SCB`.
///
/// # Errors
/// [`BnbError::QuantType`] when the name announces a 4-bit format other than NF4 and FP4.
pub fn weight_of(tensor: &str) -> Result<Option<String>, BnbError> {
    for part in ["SCB", "weight_format"] {
        if let Some(module) = tensor.strip_suffix(part).filter(|module| module.ends_with('.')) {
            return Ok(Some(format!("{module}weight")));
        }
    }
    if let Some((weight, kind)) = tensor.split_once(".quant_state.bitsandbytes__") {
        return match kind {
            "nf4" | "fp4" => Ok(Some(weight.to_owned())),
            _ => Err(BnbError::QuantType { tensor: tensor.to_owned(), found: kind.to_owned() }),
        };
    }
    let parts = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"];
    let weight = parts.iter().find_map(|part| tensor.strip_suffix(part));
    Ok(weight.filter(|weight| weight.ends_with(".weight")).map(str::to_owned))
}
