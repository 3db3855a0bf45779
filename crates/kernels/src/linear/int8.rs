//! The product of LLM.int8() (Dettmers et al.: *LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale*, 2022)
//! on any backend.
//!
//! ```text
//! y = (Σ codes_x · codes_w) · (scale_x · scale_w) / 127² + Σ over outlier columns of x · w
//! ```
//!
//! A column of x in which some row reaches the threshold is an outlier: it is left out of the first sum, and in the second
//! in full precision. The backward pass is that of the dequantised weight.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata, get_or_init_device_settings};
use burn::tensor::{DType, Shape};
use emberlora_quant::{CODE_SCALE, DOT_SCALE};
use half::f16;

use crate::body::cast;
use crate::weight::{Int8Format, WeightOps};

/// x `[M, K]` times the transposed weight, in the dtype of x.
///
/// Sums of products of codes are exact in f32 up to K = 1040, and round in the last place beyond.
pub(super) fn product<B: WeightOps>(
    x: FloatTensor<B>,
    codes: IntTensor<B>,
    scales: FloatTensor<B>,
    format: Int8Format,
) -> FloatTensor<B> {
    let (dtype, [n, k]) = (x.dtype(), format.shape);
    let x = cast::<B>(x, DType::F32);
    let weight = B::int8_codes(codes, [n, k]);
    let Quantised { codes, scales: row_scales, outlier } = quantise::<B>(x.clone(), format.threshold);
    let scales = B::float_reshape(scales, Shape::new([1, n]));
    let sums = B::float_matmul(codes, B::float_transpose(weight.clone()));
    let factors = B::float_mul_scalar(B::float_mul(row_scales, scales.clone()), DOT_SCALE.into());
    let y = B::float_mul(sums, factors);
    let outliers = B::float_matmul(B::float_mul(x, outlier), B::float_transpose(weight));
    let outliers = B::float_mul(outliers, B::float_mul_scalar(scales, CODE_SCALE.into()));
    cast::<B>(B::float_add(y, outliers), dtype)
}

struct Quantised<B: Backend> {
    /// From −127 to 127, `[M, K]`; 0 in outlier columns.
    codes: FloatTensor<B>,
    /// The largest magnitude of each row that is no outlier, `[M, 1]`.
    scales: FloatTensor<B>,
    /// 1 in outlier columns, 0 in the others, `[1, K]`.
    outlier: FloatTensor<B>,
}

/// What [`quantise_rows`](emberlora_quant::quantise_rows) does.
fn quantise<B: Backend>(x: FloatTensor<B>, threshold: f32) -> Quantised<B> {
    // So small that a row below it has only zeros for codes, and its inverse still is finite.
    const SMALLEST: f32 = 1e-30;
    let ([rows, columns], threshold) = (x.shape().dims(), f16::from_f32(threshold).to_f32());
    let x = through_f16::<B>(x);
    let magnitudes = B::float_abs(x.clone());
    // 1 where an element is an outlier.
    let at_least = |t: FloatTensor<B>| {
        let settings = get_or_init_device_settings::<B>(&t.device());
        B::bool_into_float(B::float_greater_equal_elem(t, threshold.into(), settings.bool_dtype), DType::F32.into())
    };
    let none = |mask: FloatTensor<B>| B::float_add_scalar(B::float_neg(mask), 1.0.into());
    let outlier = at_least(B::float_max_dim(magnitudes.clone(), 0));
    let inside = none(at_least(magnitudes.clone()));
    let scales = B::float_max_dim(B::float_mul(magnitudes, inside.clone()), 1);
    let inverse =
        B::float_mul_scalar(B::float_recip(B::float_clamp_min(scales.clone(), SMALLEST.into())), 127.0.into());
    let inverse = B::float_expand(inverse, Shape::new([rows, columns]));
    let codes = B::float_round(B::float_mul(B::float_mul(x, inside), inverse));
    let codes = B::float_mul(codes, none(outlier.clone()));
    Quantised { codes, scales, outlier }
}

/// Rounds to the eleven significant bits of f16, of which not every backend has a type, by Veltkamp's splitting
/// (Dekker: *A Floating-Point Technique for Extending the Available Precision*, 1971).
fn through_f16<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    const SPLITTER: f32 = 8193.0; // 2^(24 − 11) + 1
    let product = B::float_mul_scalar(x.clone(), SPLITTER.into());
    B::float_sub(product.clone(), B::float_sub(product, x))
}
