//! The CPU bodies: each number is read and written once, where it lies.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;
use rayon::prelude::*;

use super::{AdamWOps, AdamWStep, Factors, generic};
use crate::flex::{Rows, f32_tensor};
use crate::simd::{lane_sum, vectorised};

/// Elements that one worker takes at a time. Tensors up to this size stay on the calling thread.
const CHUNK: usize = 1 << 14;

vectorised! {
    fn update(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], gradient: f32, factors: Factors) {
        let Factors { first: [b1, rest1], second: [b2, rest2], decay, rate, root, eps } = factors;
        let n = p.len();
        let (g, m, v) = (&g[..n], &mut m[..n], &mut v[..n]);
        for i in 0..n {
            let g = g[i] * gradient;
            m[i] = m[i] * b1 + g * rest1;
            v[i] = v[i] * b2 + g * g * rest2;
            p[i] = p[i] * decay - m[i] / (v[i].sqrt() * root + eps) * rate;
        }
    }
}

vectorised! {
    fn squares(x: &[f32]) -> f32 {
        lane_sum(x.len(), |i| x[i] * x[i])
    }
}

impl AdamWOps for Flex {
    fn adamw(
        param: FlexTensor,
        grad: FlexTensor,
        first: FlexTensor,
        second: FlexTensor,
        factor: FlexTensor,
        step: AdamWStep,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        if [&param, &grad, &first, &second, &factor].iter().any(|t| t.dtype() != DType::F32) {
            return generic::adamw::<Self>(param, grad, first, second, factor, step);
        }
        let gradient = Rows::of(&factor).values()[0];
        if gradient < 0.0 {
            return (param, first, second);
        }
        let (grad, factors) = (Rows::of(&grad), step.factors());
        let [mut param, mut first, mut second] = [param, first, second].map(in_order);
        let (p, g, m, v) = (values(&mut param), grad.values(), values(&mut first), values(&mut second));
        if p.len() <= CHUNK {
            update(p, g, m, v, gradient, factors);
        } else {
            p.par_chunks_mut(CHUNK)
                .zip(g.par_chunks(CHUNK))
                .zip(m.par_chunks_mut(CHUNK))
                .zip(v.par_chunks_mut(CHUNK))
                .for_each(|(((p, g), m), v)| update(p, g, m, v, gradient, factors));
        }
        (param, first, second)
    }

    fn sum_squares(x: FlexTensor) -> FlexTensor {
        if x.dtype() != DType::F32 {
            return generic::sum_squares::<Self>(x);
        }
        let x = Rows::of(&x);
        // In f64 and in the order of the chunks, so that the sum depends neither on their number nor on the threads.
        let sum: f64 = match x.len() {
            0..=CHUNK => f64::from(squares(x.values())),
            _ => {
                let sums: Vec<f32> = x.values().par_chunks(CHUNK).map(squares).collect();
                sums.into_iter().map(f64::from).sum()
            }
        };
        f32_tensor(vec![sum as f32], [1])
    }
}

/// The tensor with neighbouring elements in order; taken over, since a second handle would make every write a copy.
fn in_order(tensor: FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() { tensor } else { tensor.to_contiguous() }
}

/// The numbers of a contiguous f32 tensor, copied first where somebody else has a handle on them.
fn values(tensor: &mut FlexTensor) -> &mut [f32] {
    let (offset, len) = (tensor.layout().start_offset(), tensor.layout().num_elements());
    &mut tensor.storage_mut::<f32>()[offset..][..len]
}
