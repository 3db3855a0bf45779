//! How a frozen weight is stored: densely, or packed into 4 or 8 bits per element.
//!
//! This crate knows bytes and number formats, no tensors and no files.
//!
//! | module | is |
//! |---|---|
//! | dense | f32, bf16 and f16, and exact [conversions](convert) between them |
//! | pack | a [`Packer`] takes dense bytes in pieces and returns a [`PackedWeight`] |
//! | four bit | NF4 and FP4: two codes to a byte, a scale for every block ([`FourBit`]) |
//! | double | those scales in 8 bits ([`DoubleScales`]) |
//! | int8 | a scale for every row ([`Int8`]), and [activations](quantise_rows) in the same format |
//! | [`bnb`] | the tensors and the JSON in which checkpoints hold packed weights |
//!
//! Packed bytes, scales and dequantised values are those of bitsandbytes 0.50.2 on a CPU, bit for bit.
//! `tests/fixtures/quant` at the top of the repository holds what it wrote, for tests to compare with.

pub mod bnb;
mod codebook;
mod dense;
mod double;
mod error;
mod four_bit;
mod int8;
mod pack;
mod scheme;

pub use codebook::Codebook;
pub use dense::{FloatDtype, PartialElement, UnknownDtype, convert};
pub use double::{DoubleScales, NESTED_BLOCK, dynamic_map};
pub use error::{QuantError, UnknownBlockSize, UnknownKind};
pub use four_bit::{BlockSize, FourBit, Scales};
pub use int8::{CODE_SCALE, DOT_SCALE, Int8, QuantisedRows, quantise_rows};
pub use pack::{Packer, pack};
pub use scheme::{PackedWeight, QuantKind, Scheme};
