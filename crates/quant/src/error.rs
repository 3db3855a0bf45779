//! Why a weight could not be packed.

use crate::FloatDtype;

/// A weight that cannot be packed, by the name that the caller gave it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum QuantError {
    /// A NaN or an infinity: its block would have no scale.
    #[error(
        "`{tensor}` holds {value} at [{row}, {column}]: only finite weights can be quantised; \
         repair the checkpoint, or leave the projection out (`quantization.skip`, `--skip`)"
    )]
    NotFinite {
        /// The weight.
        tensor: String,
        /// Row of the first such element.
        row: usize,
        /// Its column.
        column: usize,
        /// What stands there.
        value: f32,
    },
    /// INT8 packs from f16, and this finite weight is beyond it.
    #[error(
        "`{tensor}` holds {value} at [{row}, {column}], which is beyond f16's largest number, 65504: INT8 is packed \
         from f16; use a 4-bit kind, or leave the projection out (`quantization.skip`, `--skip`)"
    )]
    BeyondF16 {
        /// The weight.
        tensor: String,
        /// Row of the first such element.
        row: usize,
        /// Its column.
        column: usize,
        /// What stands there.
        value: f32,
    },
    /// Scales near f32's largest number, whose mean or 8-bit form overflows.
    #[error(
        "`{tensor}` has magnitudes up to {largest} in the {block_size} elements from [{row}, {column}] on; scales \
         this large overflow in 8 bits: keep them in f32 (`quantization.double_quant: false`, `--no-double-quant`), or \
         leave the projection out (`quantization.skip`, `--skip`)"
    )]
    ScaleOverflow {
        /// The weight.
        tensor: String,
        /// Row of the first element of the block with the largest scale.
        row: usize,
        /// Its column.
        column: usize,
        /// Elements of a block.
        block_size: usize,
        /// The largest scale in f32.
        largest: f32,
    },
    /// There is nothing to pack, or more than an address can count.
    #[error("`{tensor}` has the shape [{rows}, {columns}], which is empty or too large to address", rows = shape[0],
        columns = shape[1])]
    Shape {
        /// The weight.
        tensor: String,
        /// Its shape.
        shape: [usize; 2],
    },
    /// The bytes are not those of the announced shape.
    #[error(
        "`{tensor}` has {found} bytes where [{rows}, {columns}] in {dtype} takes {expected}: the shape, the dtype or \
         the file is wrong", rows = shape[0], columns = shape[1]
    )]
    Length {
        /// The weight.
        tensor: String,
        /// Its announced shape.
        shape: [usize; 2],
        /// Its announced format.
        dtype: FloatDtype,
        /// Bytes that these take.
        expected: usize,
        /// Bytes that were given.
        found: usize,
    },
}

/// The size is none that 4-bit blocks can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a block of {0} elements is not supported; expected 32, 64, 128, 256, 512, 1024, 2048 or 4096")]
pub struct UnknownBlockSize(pub usize);

/// The text is no quantised format's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a quantised format; expected nf4, fp4 or int8")]
pub struct UnknownKind(pub String);
