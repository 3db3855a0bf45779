//! Frozen weights as they are stored: dense, or packed into 4 or 8 bits per element as [`emberlora_quant`] packs them.
//!
//! Packed bytes are on the device as 32-bit integers, little-endian, the last one filled with zeros: every backend has
//! that type, and the generic bodies take the codes out by shifts.

#[cfg(any(feature = "wgpu", feature = "cuda"))]
mod cube;
#[cfg(feature = "flex")]
pub(crate) mod flex;
pub mod generic;
mod packed;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, ExtensionType, TensorMetadata, backend_extension};
use burn::tensor::{DType, Tensor};

pub use packed::{FourBitFormat, Int8Format, NestedFormat, PackedFormat, PackedTensor};

/// A frozen weight `[N, K]`, as the functions over tensors take it.
#[expect(clippy::large_enum_variant, reason = "it is a handful of handles, and made for one call")]
#[derive(Clone, Debug)]
pub enum FrozenWeight {
    /// f32, bf16 or f16 numbers, whatever the activations are in.
    Dense(Tensor<2>),
    /// Codes and scales.
    Packed(PackedTensor),
}

impl FrozenWeight {
    /// `[N, K]`.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) => weight.dims(),
            Self::Packed(weight) => weight.format.shape(),
        }
    }

    /// The weight in f32, outside of autodiff.
    pub fn dequantise(&self) -> Tensor<2> {
        match self {
            Self::Dense(weight) => weight.clone().inner().cast(DType::F32),
            Self::Packed(_) => {
                Tensor::from_dispatch(<Dispatch as WeightOps>::dequantise(self.to_dispatch(), DType::F32))
            }
        }
    }

    /// The same handles as operations take them.
    pub(crate) fn to_dispatch(&self) -> Weight<Dispatch> {
        match self {
            Self::Dense(weight) => Weight::Dense(weight.clone().into_dispatch()),
            Self::Packed(weight) => weight.to_dispatch(),
        }
    }
}

impl From<Tensor<2>> for FrozenWeight {
    fn from(weight: Tensor<2>) -> Self {
        Self::Dense(weight)
    }
}

impl From<PackedTensor> for FrozenWeight {
    fn from(weight: PackedTensor) -> Self {
        Self::Packed(weight)
    }
}

/// A frozen weight `[N, K]` on one backend.
#[derive(Clone, Debug, ExtensionType)]
pub enum Weight<B: Backend> {
    /// f32, bf16 or f16 numbers.
    Dense(FloatTensor<B>),
    /// NF4 or FP4.
    FourBit {
        /// Eight codes to an integer.
        codes: IntTensor<B>,
        /// A scale for every block.
        scales: FloatTensor<B>,
        /// What they mean.
        format: FourBitFormat,
    },
    /// NF4 or FP4 with the scales in 8 bits.
    FourBitDouble {
        /// Eight codes to an integer.
        codes: IntTensor<B>,
        /// The codes of the blocks' scales, four to an integer.
        scale_codes: IntTensor<B>,
        /// A scale for every [`NESTED_BLOCK`](emberlora_quant::NESTED_BLOCK) scales.
        scales: FloatTensor<B>,
        /// What the codes mean.
        format: FourBitFormat,
        /// What the scales' codes mean.
        nested: NestedFormat,
    },
    /// INT8.
    Int8 {
        /// Four codes to an integer.
        codes: IntTensor<B>,
        /// A scale for every row.
        scales: FloatTensor<B>,
        /// What they mean.
        format: Int8Format,
    },
}

impl<B: Backend> Weight<B> {
    /// `[N, K]`.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) => weight.shape().dims(),
            Self::FourBit { format, .. } | Self::FourBitDouble { format, .. } => format.shape,
            Self::Int8 { format, .. } => format.shape,
        }
    }

    /// The same weight with its float tensors mapped; integers have no gradient and are the same with autodiff.
    pub(crate) fn map_floats<C: Backend<IntTensorPrimitive = B::IntTensorPrimitive>>(
        self,
        f: impl Fn(FloatTensor<B>) -> FloatTensor<C>,
    ) -> Weight<C> {
        match self {
            Self::Dense(weight) => Weight::Dense(f(weight)),
            Self::FourBit { codes, scales, format } => Weight::FourBit { codes, scales: f(scales), format },
            Self::FourBitDouble { codes, scale_codes, scales, format, nested } => {
                Weight::FourBitDouble { codes, scale_codes, scales: f(scales), format, nested }
            }
            Self::Int8 { codes, scales, format } => Weight::Int8 { codes, scales: f(scales), format },
        }
    }
}

/// Unpacking, as an operation on one backend; on tensors outside of autodiff.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Remote: cfg(feature = "remote")
)]
pub trait WeightOps: Backend {
    /// The weight in `dtype`, `[N, K]`; its numbers are those in f32, rounded.
    fn dequantise(#[extension_type] weight: Weight<Self>, dtype: DType) -> FloatTensor<Self> {
        generic::dequantise::<Self>(weight, dtype)
    }

    /// The codes of an INT8 weight as numbers, f32 `[N, K]`.
    fn int8_codes(codes: IntTensor<Self>, shape: [usize; 2]) -> FloatTensor<Self> {
        generic::int8_codes::<Self>(codes, shape)
    }
}

#[cfg(feature = "ndarray")]
impl WeightOps for burn_ndarray::NdArray {}
#[cfg(feature = "remote")]
impl WeightOps for burn::backend::Remote {}
