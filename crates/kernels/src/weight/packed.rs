use std::sync::Arc;

use burn::backend::Dispatch;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use emberlora_quant::{Codebook, PackedWeight, QuantKind, Scales};

use super::Weight;

/// A packed weight on a device.
#[derive(Clone, Debug)]
pub struct PackedTensor {
    /// The packed bytes as 32-bit integers, little-endian, the last one filled with zeros.
    pub codes: Tensor<1, Int>,
    /// With double quantisation, and only then, the codes of the blocks' scales, likewise.
    pub scale_codes: Option<Tensor<1, Int>>,
    /// f32: the scale of every block (4 bits), of every 256 scales (double quantisation), or of every row (INT8).
    pub scales: Tensor<1>,
    /// What the codes mean.
    pub format: PackedFormat,
}

/// What the codes of a packed weight mean.
#[derive(Clone, Debug, PartialEq)]
pub enum PackedFormat {
    /// NF4 or FP4.
    FourBit {
        /// Codes of elements.
        format: FourBitFormat,
        /// Codes of scales, with double quantisation.
        nested: Option<NestedFormat>,
    },
    /// INT8.
    Int8(Int8Format),
}

/// What 4-bit codes mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FourBitFormat {
    /// `[N, K]`.
    pub shape: [usize; 2],
    /// The sixteen values.
    pub codebook: Codebook,
    /// Elements of the flattened weight that share a scale.
    pub block_size: usize,
}

/// What the 8-bit codes of scales mean: a scale is `map[code] · absmax + offset`.
#[derive(Clone, Debug, PartialEq)]
pub struct NestedFormat {
    /// What is added to every scale.
    pub offset: f32,
    /// The 256 values.
    pub map: Arc<[f32; 256]>,
}

/// What 8-bit codes mean: a code is worth its row's scale / 127.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Int8Format {
    /// `[N, K]`.
    pub shape: [usize; 2],
    /// Above 0 the forward product is LLM.int8()'s: activations in 8 bits too, those of columns that reach this
    /// magnitude in full precision. 0 multiplies with the dequantised weight.
    pub threshold: f32,
}

impl PackedFormat {
    /// `[N, K]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::FourBit { format, .. } => format.shape,
            Self::Int8(format) => format.shape,
        }
    }

    /// The format's name.
    pub fn kind(&self) -> QuantKind {
        match self {
            Self::FourBit { format, .. } => format.codebook.into(),
            Self::Int8(_) => QuantKind::Int8,
        }
    }
}

impl PackedTensor {
    /// Copies a packed weight to `device`. `threshold` is that of [`Int8Format`]; 4-bit weights have none.
    pub fn upload(weight: &PackedWeight, threshold: f32, device: &Device) -> Self {
        let device = device.clone().without_autodiff();
        let bytes = |bytes: &[u8]| {
            let (whole, rest) = bytes.as_chunks::<4>();
            let mut last = [0; 4];
            last[..rest.len()].copy_from_slice(rest);
            let words = whole.iter().chain((!rest.is_empty()).then_some(&last));
            let words: Vec<i32> = words.map(|word| i32::from_le_bytes(*word)).collect();
            let count = words.len();
            Tensor::<1, Int>::from_data(TensorData::new(words, [count]), (&device, DType::I32))
        };
        let floats = |values: &[f32]| {
            Tensor::<1>::from_data(TensorData::new(values.to_vec(), [values.len()]), (&device, DType::F32))
        };
        match weight {
            PackedWeight::FourBit(weight) => {
                let (shape, codebook) = (weight.shape(), weight.codebook());
                let format = FourBitFormat { shape, codebook, block_size: weight.block_size().get() };
                let codes = bytes(weight.codes());
                match weight.scales() {
                    Scales::Plain(absmax) => Self {
                        codes,
                        scale_codes: None,
                        scales: floats(absmax),
                        format: PackedFormat::FourBit { format, nested: None },
                    },
                    Scales::Double(double) => {
                        let nested = NestedFormat { offset: double.offset(), map: double.map().clone() };
                        Self {
                            codes,
                            scale_codes: Some(bytes(double.codes())),
                            scales: floats(double.absmax()),
                            format: PackedFormat::FourBit { format, nested: Some(nested) },
                        }
                    }
                }
            }
            PackedWeight::Int8(weight) => {
                let format = PackedFormat::Int8(Int8Format { shape: weight.shape(), threshold });
                Self {
                    codes: bytes(bytemuck::cast_slice(weight.codes())),
                    scale_codes: None,
                    scales: floats(weight.scales()),
                    format,
                }
            }
        }
    }

    /// Bytes that codes and scales take on the device.
    pub fn bytes(&self) -> usize {
        let words = self.codes.dims()[0] + self.scale_codes.as_ref().map_or(0, |codes| codes.dims()[0]);
        4 * (words + self.scales.dims()[0])
    }

    pub(super) fn to_dispatch(&self) -> Weight<Dispatch> {
        let Self { codes, scale_codes, scales, format } = self;
        let (codes, scales) = (codes.clone().into_dispatch(), scales.clone().into_dispatch());
        match (format.clone(), scale_codes) {
            (PackedFormat::FourBit { format, nested: Some(nested) }, Some(scale_codes)) => {
                let scale_codes = scale_codes.clone().into_dispatch();
                Weight::FourBitDouble { codes, scale_codes, scales, format, nested }
            }
            (PackedFormat::FourBit { format, nested: None }, None) => Weight::FourBit { codes, scales, format },
            (PackedFormat::Int8(format), None) => Weight::Int8 { codes, scales, format },
            _ => panic!("a packed weight has codes of scales where its format is nested, and nowhere else"),
        }
    }
}
