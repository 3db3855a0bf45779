//! The CPU body: one pass over a row that stays in cache.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;
use rayon::prelude::*;

use super::{NormOps, generic};
use crate::flex::{Rows, f32_tensor};
use crate::simd::{lane_sum, vectorised};

/// f of a row.
#[inline(always)]
fn factor_of(x: &[f32], eps: f32) -> f32 {
    1.0 / (lane_sum(x.len(), |i| x[i] * x[i]) / x.len() as f32 + eps).sqrt()
}

vectorised! {
    /// Writes w ⊙ x · f and returns f.
    pub(crate) fn forward_row(x: &[f32], w: &[f32], y: &mut [f32], eps: f32) -> f32 {
        let n = x.len();
        let (w, y) = (&w[..n], &mut y[..n]);
        let factor = factor_of(x, eps);
        for i in 0..n {
            y[i] = x[i] * factor * w[i];
        }
        factor
    }
}

vectorised! {
    fn factor(x: &[f32], eps: f32) -> f32 {
        factor_of(x, eps)
    }
}

vectorised! {
    /// dx over the gradient of the norm.
    fn backward_over(grad: &mut [f32], x: &[f32], w: &[f32], factor: f32) {
        let n = x.len();
        let (grad, w) = (&mut grad[..n], &w[..n]);
        let mean = lane_sum(n, |i| grad[i] * w[i] * (x[i] * factor)) / n as f32;
        for i in 0..n {
            grad[i] = factor * (grad[i] * w[i] - x[i] * factor * mean);
        }
    }
}

vectorised! {
    /// [`backward_over`] where f was not kept.
    pub(crate) fn backward_row(grad: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
        backward_over(grad, x, w, factor_of(x, eps));
    }
}

/// f of each row.
pub(crate) fn factors(x: &Rows, eps: f32) -> Vec<f32> {
    x.par_iter().with_min_len(x.rows_per_task()).map(|x| factor(x, eps)).collect()
}

/// Turns the gradient of the norm into that of x.
pub(crate) fn backward_in_place(grad: &mut [f32], x: &Rows, w: &Rows, factors: &[f32]) {
    grad.par_chunks_mut(x.width())
        .zip(x.par_iter())
        .zip(factors)
        .with_min_len(x.rows_per_task())
        .for_each(|((grad, x), factor)| backward_over(grad, x, w.values(), *factor));
}

impl NormOps for Flex {
    fn rms_norm(x: FlexTensor, w: FlexTensor, eps: f32) -> FlexTensor {
        Self::rms_norm_with_factor(x, w, eps).0
    }

    fn rms_norm_with_factor(x: FlexTensor, w: FlexTensor, eps: f32) -> (FlexTensor, FlexTensor) {
        if x.dtype() != DType::F32 || w.dtype() != DType::F32 {
            return generic::forward::<Self>(x, w, eps);
        }
        let (x, w) = (Rows::of(&x), Rows::of(&w));
        let (mut y, mut factors) = (vec![0f32; x.len()], vec![0f32; x.count()]);
        y.par_chunks_mut(x.width())
            .zip(&mut factors)
            .zip(x.par_iter())
            .with_min_len(x.rows_per_task())
            .for_each(|((y, factor), x)| *factor = forward_row(x, w.values(), y, eps));
        (f32_tensor(y, [x.count(), x.width()]), f32_tensor(factors, [x.count(), 1]))
    }

    fn rms_norm_backward(grad: FlexTensor, x: FlexTensor, w: FlexTensor, factor: FlexTensor) -> FlexTensor {
        if [&grad, &x, &w].iter().any(|t| t.dtype() != DType::F32) {
            return generic::backward::<Self>(grad, x, w, factor);
        }
        let (x, w, factor) = (Rows::of(&x), Rows::of(&w), Rows::of(&factor));
        let mut dx = Rows::of(&grad).values().to_vec();
        backward_in_place(&mut dx, &x, &w, factor.values());
        f32_tensor(dx, [x.count(), x.width()])
    }
}
