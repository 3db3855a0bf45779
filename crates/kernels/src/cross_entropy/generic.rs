//! The body over any backend; the reference that the others are tested against.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{DType, IndexingUpdateOp, Shape, Slice};

use crate::body::cast;
use crate::linear::generic::dense;
use crate::weight::{Weight, WeightOps};

/// See [`CrossEntropyBodies::head_loss`](super::CrossEntropyBodies::head_loss).
pub fn head_loss<B: WeightOps>(
    hidden: FloatTensor<B>,
    w: Weight<B>,
    targets: IntTensor<B>,
    weights: FloatTensor<B>,
    with_grad: bool,
    chunk: usize,
) -> (FloatTensor<B>, Option<FloatTensor<B>>) {
    let dtype = hidden.dtype();
    let [rows, _] = hidden.shape().dims();
    let w = dense::<B>(w, dtype);
    let mut loss = B::float_zeros(Shape::new([1]), &hidden.device(), DType::F32.into());
    let mut grads = Vec::new();
    for first in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - first);
        let range = [Slice::from(first..first + count)];
        let hidden = B::float_slice(hidden.clone(), &[range[0], Slice::full()]);
        let targets = B::int_reshape(B::int_slice(targets.clone(), &range), Shape::new([count, 1]));
        let weights = B::float_reshape(B::float_slice(weights.clone(), &range), Shape::new([count, 1]));
        let logits = cast::<B>(B::float_matmul(hidden, B::float_transpose(w.clone())), DType::F32);
        let (chunk_loss, dlogits) = weighted_nll::<B>(logits, targets, weights, with_grad);
        loss = B::float_add(loss, chunk_loss);
        grads.extend(dlogits.map(|dlogits| B::float_matmul(cast::<B>(dlogits, dtype), w.clone())));
    }
    let grad = match grads.len() {
        _ if !with_grad => None,
        0 => Some(hidden), // no rows: nothing to differentiate, and the shape is right
        1 => grads.pop(),
        _ => Some(B::float_cat(grads, 0)),
    };
    (loss, grad)
}

/// Σ weight · −log `softmax(logits)[target]`, and its gradient to the logits where it is asked for.
fn weighted_nll<B: Backend>(
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
