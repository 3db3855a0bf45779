//! Bodies over any backend; the reference that the others are tested against.

use burn::backend::Backend;
use burn::backend::tensor::FloatTensor;
use burn::tensor::DType;

use super::{AdamWStep, Factors};
use crate::body::cast;

/// (p, m, v) after the update.
pub fn adamw<B: Backend>(
    param: FloatTensor<B>,
    grad: FloatTensor<B>,
    first: FloatTensor<B>,
    second: FloatTensor<B>,
    step: AdamWStep,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let Factors { gradient, first: [b1, rest1], second: [b2, rest2], decay, rate, root, eps } = step.factors();
    let scaled = |t: FloatTensor<B>, factor: f32| B::float_mul_scalar(t, factor.into());
    let grad = if gradient == 1.0 { grad } else { scaled(grad, gradient) };
    let square = B::float_mul(grad.clone(), grad.clone());
    let first = B::float_add(scaled(first, b1), scaled(grad, rest1));
    let second = B::float_add(scaled(second, b2), scaled(square, rest2));
    let divisor = B::float_add_scalar(scaled(B::float_sqrt(second.clone()), root), eps.into());
    let change = scaled(B::float_div(first.clone(), divisor), rate);
    (B::float_sub(scaled(param, decay), change), first, second)
}

/// Σ x².
pub fn sum_squares<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let x = cast::<B>(x, DType::F32);
    B::float_sum(B::float_mul(x.clone(), x))
}
