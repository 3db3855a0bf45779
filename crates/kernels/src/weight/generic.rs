//! Unpacking by integer operations that every backend has.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{DType, Shape, Slice, TensorData};
use emberlora_quant::{CODE_SCALE, NESTED_BLOCK};

use super::{FourBitFormat, NestedFormat, Weight};
use crate::body::cast;

/// By how many bits the codes of an integer's elements are shifted, in the order of the elements: the even element of a
/// byte is its high half.
const FOUR_BIT_SHIFTS: [u32; 8] = [4, 0, 12, 8, 20, 16, 28, 24];

/// See [`FOUR_BIT_SHIFTS`].
const EIGHT_BIT_SHIFTS: [u32; 4] = [0, 8, 16, 24];

/// See [`WeightOps::dequantise`](super::WeightOps::dequantise). It holds some ten times the packed bytes while it runs.
pub fn dequantise<B: Backend>(weight: Weight<B>, dtype: DType) -> FloatTensor<B> {
    let weight = match weight {
        Weight::Dense(weight) => weight,
        Weight::FourBit { codes, scales, format } => four_bit::<B>(codes, scales, format),
        Weight::FourBitDouble { codes, scale_codes, scales, format, nested } => {
            let scales = block_scales::<B>(scale_codes, scales, format, &nested);
            four_bit::<B>(codes, scales, format)
        }
        Weight::Int8 { codes, scales, format: super::Int8Format { shape: [n, k], .. } } => {
            let codes = int8_codes::<B>(codes, [n, k]);
            let factors = B::float_mul_scalar(scales, CODE_SCALE.into());
            B::float_mul(codes, B::float_reshape(factors, Shape::new([n, 1])))
        }
    };
    cast::<B>(weight, dtype)
}

/// See [`WeightOps::int8_codes`](super::WeightOps::int8_codes).
pub fn int8_codes<B: Backend>(codes: IntTensor<B>, [n, k]: [usize; 2]) -> FloatTensor<B> {
    // Two's complement in the low byte: with its sign bit turned over it is the number + 128.
    let bytes = unpack::<B>(codes, &EIGHT_BIT_SHIFTS, 255, n * k);
    let shifted = B::bitwise_xor_scalar(bytes, 128.into());
    let codes = B::float_sub_scalar(B::int_into_float(shifted, DType::F32.into()), 128.0.into());
    B::float_reshape(codes, Shape::new([n, k]))
}

/// Values of codes times the scales of their blocks.
fn four_bit<B: Backend>(codes: IntTensor<B>, scales: FloatTensor<B>, format: FourBitFormat) -> FloatTensor<B> {
    let FourBitFormat { shape: [n, k], codebook, block_size } = format;
    let (count, whole) = (n * k, n * k / block_size);
    let codes = unpack::<B>(codes, &FOUR_BIT_SHIFTS, 15, count);
    let values = look_up::<B>(codebook.values(), codes);
    let part = |values: &FloatTensor<B>, from: usize, to: usize| B::float_slice(values.clone(), &[(from..to).into()]);
    let mut parts = Vec::with_capacity(2);
    if whole > 0 {
        let blocks = B::float_reshape(part(&values, 0, whole * block_size), Shape::new([whole, block_size]));
        let scales = B::float_reshape(part(&scales, 0, whole), Shape::new([whole, 1]));
        parts.push(B::float_reshape(B::float_mul(blocks, scales), Shape::new([whole * block_size])));
    }
    if whole * block_size < count {
        let last = part(&scales, whole, whole + 1);
        parts.push(B::float_mul(part(&values, whole * block_size, count), last));
    }
    let values = if parts.len() == 1 { parts.remove(0) } else { B::float_cat(parts, 0) };
    B::float_reshape(values, Shape::new([n, k]))
}

/// The scale of every block, from 8 bits.
fn block_scales<B: Backend>(
    codes: IntTensor<B>,
    absmax: FloatTensor<B>,
    format: FourBitFormat,
    nested: &NestedFormat,
) -> FloatTensor<B> {
    let blocks = (format.shape[0] * format.shape[1]).div_ceil(format.block_size);
    let values = look_up::<B>(&*nested.map, unpack::<B>(codes, &EIGHT_BIT_SHIFTS, 255, blocks));
    let [groups] = absmax.shape().dims();
    let absmax = B::float_reshape(absmax, Shape::new([groups, 1]));
    let absmax = B::float_expand(absmax, Shape::new([groups, NESTED_BLOCK]));
    let absmax = B::float_reshape(absmax, Shape::new([groups * NESTED_BLOCK]));
    let absmax = B::float_slice(absmax, &[Slice::from(0..blocks)]);
    B::float_add_scalar(B::float_mul(values, absmax), nested.offset.into())
}

/// The first `count` codes of packed integers, one per element.
fn unpack<B: Backend>(words: IntTensor<B>, shifts: &[u32], mask: i32, count: usize) -> IntTensor<B> {
    let [len] = words.shape().dims();
    let words = B::int_reshape(words, Shape::new([len, 1]));
    // The shift keeps the sign, which the mask takes off again.
    let shifted = |&shift: &u32| match shift {
        0 => words.clone(),
        _ => B::bitwise_right_shift_scalar(words.clone(), (shift as i32).into()),
    };
    let all = B::int_cat(shifts.iter().map(shifted).collect(), 1);
    let codes = B::int_reshape(B::bitwise_and_scalar(all, mask.into()), Shape::new([len * shifts.len()]));
    B::int_slice(codes, &[Slice::from(0..count)])
}

/// The table's value of every code.
fn look_up<B: Backend>(table: &[f32], codes: IntTensor<B>) -> FloatTensor<B> {
    let data = TensorData::new(table.to_vec(), [table.len()]);
    B::float_select(B::float_from_data(data, &codes.device()), 0, codes)
}
