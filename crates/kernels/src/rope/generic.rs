//! The body over any backend; the reference that the others are tested against.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::Slice;

use crate::body::cast;

/// `x` `[B, S, H, D]` turned by `cos` and `sin` `[B, S, R/2]`.
pub fn rope<B: Backend>(x: FloatTensor<B>, cos: FloatTensor<B>, sin: FloatTensor<B>) -> FloatTensor<B> {
    let [batch, seq, _, dim] = x.shape().dims();
    let [_, _, half] = cos.shape().dims();
    let table = |t: FloatTensor<B>| cast::<B>(B::float_reshape(t, [batch, seq, 1, half].into()), x.dtype());
    let (cos, sin) = (table(cos), table(sin));
    let part = |from: usize, to: usize| {
        let mut slices = [Slice::full(); 4];
        slices[3] = Slice::from(from..to);
        B::float_slice(x.clone(), &slices)
    };
    let (first, second) = (part(0, half), part(half, 2 * half));
    let rotated_first =
        B::float_sub(B::float_mul(first.clone(), cos.clone()), B::float_mul(second.clone(), sin.clone()));
    let rotated_second = B::float_add(B::float_mul(second, cos), B::float_mul(first, sin));
    let mut parts = vec![rotated_first, rotated_second];
    if 2 * half < dim {
        parts.push(part(2 * half, dim));
    }
    B::float_cat(parts, 3)
}
