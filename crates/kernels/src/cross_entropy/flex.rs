//! The CPU body: a row of logits becomes its own gradient while it is in cache.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;
use rayon::prelude::*;

use super::{CrossEntropyOps, generic};
use crate::flex::{Rows, f32_tensor, integers};
use crate::simd::{exp, lane_max, lane_sum, vectorised};

vectorised! {
    /// −log softmax(row)[target], and weight · softmax(row) into `out` where there is one.
    fn row(logits: &[f32], target: usize, weight: f32, out: &mut [f32]) -> f32 {
        let max = lane_max(logits);
        if out.is_empty() {
            let sum = lane_sum(logits.len(), |i| exp(logits[i] - max));
            return sum.ln() - (logits[target] - max);
        }
        let out = &mut out[..logits.len()];
        for i in 0..logits.len() {
            out[i] = exp(logits[i] - max);
        }
        let sum = lane_sum(out.len(), |i| out[i]);
        let factor = weight / sum;
        for value in out.iter_mut() {
            *value *= factor;
        }
        out[target] -= weight;
        sum.ln() - (logits[target] - max)
    }
}

impl CrossEntropyOps for Flex {
    fn weighted_nll(
        logits: FlexTensor,
        targets: FlexTensor,
        weights: FlexTensor,
        with_grad: bool,
    ) -> (FlexTensor, Option<FlexTensor>) {
        if logits.dtype() != DType::F32 || weights.dtype() != DType::F32 {
            return generic::weighted_nll::<Self>(logits, targets, weights, with_grad);
        }
        let (logits, targets, weights) = (Rows::of(&logits), integers(&targets), Rows::of(&weights));
        let (count, width) = (logits.count(), logits.width());
        let mut grad = vec![0f32; if with_grad { logits.len() } else { 0 }];
        // Without a gradient every row gets an empty slice.
        let mut outs: Vec<&mut [f32]> = match with_grad {
            true => grad.chunks_exact_mut(width).collect(),
            false => (0..count).map(|_| <&mut [f32]>::default()).collect(),
        };
        let nll: Vec<f32> = outs
            .par_iter_mut()
            .zip(logits.par_iter())
            .zip(targets.par_iter().zip(weights.values()))
            .map(|((out, logits), (&target, &weight))| weight * row(logits, target, weight, out))
            .collect();
        let loss = f32_tensor(vec![nll.iter().sum()], [1]);
        (loss, with_grad.then(|| f32_tensor(grad, [count, width])))
    }
}
