//! The body over any backend; the reference that the others are tested against.

use burn::backend::Backend;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::IndexingUpdateOp;

/// Σ weight · −log `softmax(logits)[target]`, and its gradient to the logits where it is asked for.
pub fn weighted_nll<B: Backend>(
    logits: FloatTensor<B>,
    targets: IntTensor<B>,
    weights: FloatTensor<B>,
    with_grad: bool,
) -> (FloatTensor<B>, Option<FloatTensor<B>>) {
    let max = B::float_max_dim(logits.clone(), 1);
    let target = B::float_sub(B::float_gather(1, logits.clone(), targets.clone()), max.clone());
    let exp = B::float_exp(B::float_sub(logits, max));
    let sum = B::float_sum_dim(exp.clone(), 1);
    let nll = B::float_sub(B::float_log(sum.clone()), target);
    let loss = B::float_sum(B::float_mul(nll, weights.clone()));
    let grad = with_grad.then(|| {
        // weight · softmax, then −weight at the target
        let softmax = B::float_mul(exp, B::float_div(weights.clone(), sum));
        B::float_scatter(1, softmax, targets, B::float_neg(weights), IndexingUpdateOp::Add)
    });
    (loss, grad)
}
