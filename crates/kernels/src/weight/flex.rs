//! Stored weights as what products read, on the CPU: they are widened or unpacked while they are packed into panels, so
//! that no dense copy of a weight exists.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Element};
use emberlora_quant::{CODE_SCALE, Codebook, NESTED_BLOCK};
use half::{bf16, f16};
use rayon::prelude::*;

use super::{FourBitFormat, NestedFormat, Weight, WeightOps};
use crate::body::cast;
use crate::flex::{contiguous, f32_tensor};
use crate::gemm::{Half, Matrix, Source};
use crate::simd::vectorised;

/// A frozen weight `[N, K]` in the format that it is stored in.
pub(crate) enum Stored {
    F32(FlexTensor),
    Bf16(FlexTensor),
    F16(FlexTensor),
    FourBit { codes: FlexTensor, scales: BlockScales, format: FourBitFormat },
    Int8 { codes: FlexTensor, scales: FlexTensor, shape: [usize; 2] },
}

impl Stored {
    /// Whether [`of`](Self::of) reads this format; asking copies nothing.
    pub(crate) fn reads(weight: &Weight<Flex>) -> bool {
        match weight {
            Weight::Dense(weight) => matches!(weight.dtype(), DType::F32 | DType::BF16 | DType::F16),
            Weight::FourBit { .. } | Weight::FourBitDouble { .. } | Weight::Int8 { .. } => true,
        }
    }

    /// `None` for a format that is not read here. A strided weight is copied.
    pub(crate) fn of(weight: &Weight<Flex>) -> Option<Self> {
        match weight {
            Weight::Dense(weight) => match weight.dtype() {
                DType::F32 => Some(Self::F32(contiguous(weight))),
                DType::BF16 => Some(Self::Bf16(contiguous(weight))),
                DType::F16 => Some(Self::F16(contiguous(weight))),
                _ => None,
            },
            Weight::FourBit { codes, scales, format } => {
                let scales = BlockScales { codes: None, scales: contiguous(scales) };
                Some(Self::FourBit { codes: contiguous(codes), scales, format: *format })
            }
            Weight::FourBitDouble { codes, scale_codes, scales, format, nested } => {
                let scales =
                    BlockScales { codes: Some((contiguous(scale_codes), nested.clone())), scales: contiguous(scales) };
                Some(Self::FourBit { codes: contiguous(codes), scales, format: *format })
            }
            Weight::Int8 { codes, scales, format } => {
                Some(Self::Int8 { codes: contiguous(codes), scales: contiguous(scales), shape: format.shape })
            }
        }
    }

    /// `[N, K]`.
    pub(crate) fn dims(&self) -> [usize; 2] {
        match self {
            Self::F32(w) | Self::Bf16(w) | Self::F16(w) => [w.layout().shape()[0], w.layout().shape()[1]],
            Self::FourBit { format, .. } => format.shape,
            Self::Int8 { shape, .. } => *shape,
        }
    }

    pub(crate) fn source(&self) -> Box<dyn Source + '_> {
        let [_, k] = self.dims();
        match self {
            Self::F32(w) => Box::new(Matrix::new(elements(w), k)),
            Self::Bf16(w) => Box::new(Half::new(elements::<bf16>(w), k)),
            Self::F16(w) => Box::new(Half::new(elements::<f16>(w), k)),
            Self::FourBit { codes, scales, format } => {
                Box::new(FourBit { codes: bytes(codes), scales: scales.view(), format: *format })
            }
            Self::Int8 { codes, scales, .. } => {
                Box::new(Int8 { codes: bytes(codes), scales: Some(elements(scales)), columns: k })
            }
        }
    }

    /// The codes of an INT8 weight as numbers, and the scales of its rows.
    pub(crate) fn int8(&self) -> Option<(Int8<'_>, &[f32])> {
        match self {
            Self::Int8 { codes, scales, shape: [_, columns] } => {
                Some((Int8 { codes: bytes(codes), scales: None, columns: *columns }, elements(scales)))
            }
            _ => None,
        }
    }
}

/// The elements of a contiguous tensor.
fn elements<E: Element + bytemuck::Pod>(tensor: &FlexTensor) -> &[E] {
    &tensor.storage::<E>()[tensor.layout().start_offset()..]
}

/// The packed bytes in a tensor of 32-bit integers.
fn bytes(words: &FlexTensor) -> &[u8] {
    const { assert!(cfg!(target_endian = "little"), "packed integers are read as bytes in their order") };
    bytemuck::cast_slice(elements::<i32>(words))
}

/// The scales of 4-bit blocks.
pub(crate) struct BlockScales {
    /// With double quantisation their codes.
    codes: Option<(FlexTensor, NestedFormat)>,
    scales: FlexTensor,
}

impl BlockScales {
    fn view(&self) -> ScaleView<'_> {
        let nested = self.codes.as_ref().map(|(codes, format)| (bytes(codes), format));
        ScaleView { nested, scales: elements(&self.scales) }
    }
}

#[derive(Clone, Copy)]
struct ScaleView<'a> {
    nested: Option<(&'a [u8], &'a NestedFormat)>,
    scales: &'a [f32],
}

impl ScaleView<'_> {
    #[inline(always)]
    fn get(&self, block: usize) -> f32 {
        match self.nested {
            None => self.scales[block],
            Some((codes, NestedFormat { offset, map })) => {
                map[usize::from(codes[block])] * self.scales[block / NESTED_BLOCK] + offset
            }
        }
    }
}

/// A weight in NF4 or FP4.
struct FourBit<'a> {
    codes: &'a [u8],
    scales: ScaleView<'a>,
    format: FourBitFormat,
}

impl Source for FourBit<'_> {
    fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        let FourBitFormat { shape: [_, columns], codebook, block_size } = self.format;
        let (mut at, mut rest) = (row * columns + first, out);
        while !rest.is_empty() {
            let (now, later) = rest.split_at_mut((block_size - at % block_size).min(rest.len()));
            unpack(&self.codes[at / 2..], at % 2 == 1, codebook, self.scales.get(at / block_size), now);
            at += now.len();
            rest = later;
        }
    }

    fn coarse(&self) -> bool {
        true
    }
}

/// Values of codes times their scale, from the first byte's low half on where `from_low`.
fn unpack(codes: &[u8], from_low: bool, codebook: Codebook, scale: f32, out: &mut [f32]) {
    let values = codebook.values();
    let value = |code: u8| values[usize::from(code & 15)] * scale;
    let (mut codes, mut out) = (codes, out);
    if from_low {
        let Some((first, rest)) = std::mem::take(&mut out).split_first_mut() else { return };
        *first = value(codes[0]);
        (codes, out) = (&codes[1..], rest);
    }
    let pairs = out.len() / 2;
    let (whole, last) = out.split_at_mut(pairs * 2);
    unpack_pairs(&codes[..pairs], values, scale, whole);
    if let [last] = last {
        *last = value(codes[pairs] >> 4);
    }
}

/// Two elements to a byte, the first in its high half.
fn unpack_pairs(codes: &[u8], values: &[f32; 16], scale: f32, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { avx2::unpack_pairs(codes, values, scale, out) };
    }
    portable_pairs(codes, values, scale, out);
}

fn portable_pairs(codes: &[u8], values: &[f32; 16], scale: f32, out: &mut [f32]) {
    for ([high, low], byte) in out.as_chunks_mut().0.iter_mut().zip(codes) {
        *high = values[usize::from(byte >> 4)] * scale;
        *low = values[usize::from(byte & 15)] * scale;
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    /// Eight bytes at a time: the table is two registers, which a permutation reads and bit 3 of the code chooses from.
    #[target_feature(enable = "avx2")]
    pub(super) fn unpack_pairs(codes: &[u8], values: &[f32; 16], scale: f32, out: &mut [f32]) {
        let (groups, rest) = codes.as_chunks::<8>();
        let (below, above) = values.split_at(8);
        // SAFETY: both halves of the table are eight floats long, as many as are loaded.
        let [below, above] = [below, above].map(|half| unsafe { _mm256_loadu_ps(half.as_ptr()) });
        let scale_of_all = _mm256_set1_ps(scale);
        let [below, above] = [below, above].map(|half| _mm256_mul_ps(half, scale_of_all));
        let look_up = |codes: __m256i| {
            let choice = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
            _mm256_blendv_ps(_mm256_permutevar8x32_ps(below, codes), _mm256_permutevar8x32_ps(above, codes), choice)
        };
        for (group, chunk) in groups.iter().zip(out.as_chunks_mut::<16>().0) {
            let bytes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(*group)));
            let high = look_up(_mm256_srli_epi32::<4>(bytes));
            let low = look_up(_mm256_and_si256(bytes, _mm256_set1_epi32(15)));
            // Per half of a register: elements 0 to 3 and 8 to 11, then 4 to 7 and 12 to 15.
            let (first, second) = (_mm256_unpacklo_ps(high, low), _mm256_unpackhi_ps(high, low));
            // SAFETY: a chunk is sixteen floats long, two registers.
            unsafe {
                _mm256_storeu_ps(chunk.as_mut_ptr(), _mm256_permute2f128_ps::<0x20>(first, second));
                _mm256_storeu_ps(chunk.as_mut_ptr().add(8), _mm256_permute2f128_ps::<0x31>(first, second));
            }
        }
        super::portable_pairs(rest, values, scale, &mut out[groups.len() * 16..]);
    }
}

/// A weight in INT8, or its codes alone.
pub(crate) struct Int8<'a> {
    codes: &'a [u8],
    scales: Option<&'a [f32]>,
    columns: usize,
}

vectorised! {
    fn widen_codes(codes: &[u8], factor: f32, out: &mut [f32]) {
        for (out, code) in out.iter_mut().zip(codes) {
            *out = f32::from(code.cast_signed()) * factor;
        }
    }
}

impl Source for Int8<'_> {
    fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        let factor = self.scales.map_or(1.0, |scales| scales[row] * CODE_SCALE);
        widen_codes(&self.codes[row * self.columns + first..][..out.len()], factor, out);
    }

    fn coarse(&self) -> bool {
        true
    }
}

impl WeightOps for Flex {
    fn dequantise(weight: Weight<Self>, dtype: DType) -> FlexTensor {
        let Some(stored) = Stored::of(&weight) else { return super::generic::dequantise::<Self>(weight, dtype) };
        let ([n, k], source) = (stored.dims(), stored.source());
        let mut values = vec![0f32; n * k];
        values.par_chunks_exact_mut(k.max(1)).enumerate().for_each(|(row, out)| source.read(row, 0, out));
        cast::<Self>(f32_tensor(values, [n, k]), dtype)
    }
}
