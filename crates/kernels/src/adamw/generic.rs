//! Bodies over any backend; the reference that the others are tested against.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata, get_or_init_device_settings};
use burn::tensor::{DType, Shape};

use super::{AdamWStep, Factors};
use crate::body::cast;

/// (p, m, v) after the update, or as they were where `factor` is negative.
pub fn adamw<B: Backend>(
    param: FloatTensor<B>,
    grad: FloatTensor<B>,
    first: FloatTensor<B>,
    second: FloatTensor<B>,
    factor: FloatTensor<B>,
    step: AdamWStep,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let Factors { first: [b1, rest1], second: [b2, rest2], decay, rate, root, eps } = step.factors();
    let scaled = |t: FloatTensor<B>, factor: f32| B::float_mul_scalar(t, factor.into());
    let shape = param.shape();
    let one_of_each = Shape::from(vec![1; shape.num_dims()]);
    let factor = B::float_reshape(cast::<B>(factor, grad.dtype()), one_of_each);
    let out = get_or_init_device_settings::<B>(&param.device()).bool_dtype;
    let unchanged = B::bool_expand(B::float_lower_elem(factor.clone(), 0f32.into(), out), shape);

    let grad = B::float_mul(grad, factor);
    let square = B::float_mul(grad.clone(), grad.clone());
    let m = B::float_add(scaled(first.clone(), b1), scaled(grad, rest1));
    let v = B::float_add(scaled(second.clone(), b2), scaled(square, rest2));
    let divisor = B::float_add_scalar(scaled(B::float_sqrt(v.clone()), root), eps.into());
    let change = scaled(B::float_div(m.clone(), divisor), rate);
    let p = B::float_sub(scaled(param.clone(), decay), change);
    let unless = |new: FloatTensor<B>, old: FloatTensor<B>| B::float_mask_where(new, unchanged.clone(), old);
    (unless(p, param), unless(m, first), unless(v, second))
}

/// Σ x².
pub fn sum_squares<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let x = cast::<B>(x, DType::F32);
    B::float_sum(B::float_mul(x.clone(), x))
}
