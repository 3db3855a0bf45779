//! The head's projection, log-softmax and loss in one pass over chunks of rows.
//!
//! ```text
//! loss = Σ_i weight_i · (log Σ_j exp z_ij − z_{i, target_i}),    z = hidden · Wᵀ
//! dhidden_i = weight_i · (softmax(z_i) − onehot(target_i)) W
//! ```
//!
//! The logits of all rows never exist at once: a chunk's logits become its gradient and are dropped. What is saved for
//! the backward pass is the gradient of the hidden rows.

#[cfg(feature = "flex")]
mod flex;
pub mod generic;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{DType, Int, Shape, Slice, Tensor};

use crate::LinearOps;
use crate::body::{cast, plain_backends};

/// Logits that exist at one time: 32 MiB of f32.
const CHUNK_ELEMENTS: usize = 1 << 23;

/// The fused head and loss on one backend.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda"))
)]
pub trait CrossEntropyOps: LinearOps {
    /// The loss `[1]` in f32. `hidden` `[M, E]`, `w` `[V, E]` frozen, `targets` `[M]`, `weights` `[M]` in f32.
    fn linear_cross_entropy(
        hidden: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: IntTensor<Self>,
        weights: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        run::<Self>(hidden, w, targets, weights, false).0
    }

    /// The loss and its gradient to `hidden`.
    fn linear_cross_entropy_with_grad(
        hidden: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: IntTensor<Self>,
        weights: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (loss, grad) = run::<Self>(hidden, w, targets, weights, true);
        (loss, grad.expect("asked for"))
    }

    /// Σ weight · −log `softmax(logits)[target]`, and where it is asked for the gradient to the logits,
    /// weight · (softmax − onehot). `logits` `[M, V]` in f32, `targets` and `weights` `[M, 1]`.
    fn weighted_nll(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        weights: FloatTensor<Self>,
        with_grad: bool,
    ) -> (FloatTensor<Self>, Option<FloatTensor<Self>>) {
        generic::weighted_nll::<Self>(logits, targets, weights, with_grad)
    }
}

plain_backends!(CrossEntropyOps);
fn run<B: CrossEntropyOps>(
    hidden: FloatTensor<B>,
    w: FloatTensor<B>,
    targets: IntTensor<B>,
    weights: FloatTensor<B>,
    with_grad: bool,
) -> (FloatTensor<B>, Option<FloatTensor<B>>) {
    let [rows, _] = hidden.shape().dims();
    let [vocabulary, _] = w.shape().dims();
    let mut loss = B::float_zeros(Shape::new([1]), &hidden.device(), DType::F32.into());
    let mut grads = Vec::new();
    let step = (CHUNK_ELEMENTS / vocabulary).max(1);
    for first in (0..rows).step_by(step) {
        let count = step.min(rows - first);
        let range = [Slice::from(first..first + count)];
        let hidden = B::float_slice(hidden.clone(), &[range[0], Slice::full()]);
        let targets = B::int_reshape(B::int_slice(targets.clone(), &range), Shape::new([count, 1]));
        let weights = B::float_reshape(B::float_slice(weights.clone(), &range), Shape::new([count, 1]));
        let (chunk_loss, chunk_grad) = chunk::<B>(hidden, w.clone(), targets, weights, with_grad);
        loss = B::float_add(loss, chunk_loss);
        grads.extend(chunk_grad);
    }
    let grad = match grads.len() {
        _ if !with_grad => None,
        0 => Some(hidden), // no rows: nothing to differentiate, and the shape is right
        1 => grads.pop(),
        _ => Some(B::float_cat(grads, 0)),
    };
    (loss, grad)
}

/// One chunk; `targets` and `weights` are `[rows, 1]`.
fn chunk<B: CrossEntropyOps>(
    hidden: FloatTensor<B>,
    w: FloatTensor<B>,
    targets: IntTensor<B>,
    weights: FloatTensor<B>,
    with_grad: bool,
) -> (FloatTensor<B>, Option<FloatTensor<B>>) {
    let dtype = hidden.dtype();
    let logits = cast::<B>(B::frozen_linear(hidden, w.clone()), DType::F32);
    let (loss, dlogits) = B::weighted_nll(logits, targets, weights, with_grad);
    let grad = dlogits.map(|dlogits| B::frozen_linear_backward(cast::<B>(dlogits, dtype), w));
    (loss, grad)
}

#[derive(Debug)]
struct CrossEntropyBackward;

impl<B: Backend> Backward<B, 1> for CrossEntropyBackward {
    /// d loss / d hidden.
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [hidden] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        if let Some(node) = hidden {
            let grad = B::float_reshape(cast::<B>(grad, ops.state.dtype()), Shape::new([1, 1]));
            grads.register::<B>(node.id, B::float_mul(ops.state, grad));
        }
    }
}

impl<B: CrossEntropyOps, C: CheckpointStrategy> CrossEntropyOps for Autodiff<B, C> {
    fn linear_cross_entropy(
        hidden: FloatTensor<Self>,
        w: FloatTensor<Self>,
        targets: IntTensor<Self>,
        weights: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        assert!(
            !w.is_tracked() && !weights.is_tracked(),
            "linear_cross_entropy: the head and the weights are constants; freeze them with `no_grad`"
        );
        let prep = CrossEntropyBackward.prepare::<C>([hidden.node()]).compute_bound().stateful();
        let (hidden, w, weights) = (hidden.into_primitive(), w.into_primitive(), weights.into_primitive());
        match prep {
            OpsKind::Tracked(prep) => {
                let (loss, grad) = B::linear_cross_entropy_with_grad(hidden, w, targets, weights);
                prep.finish(grad, loss)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::linear_cross_entropy(hidden, w, targets, weights)),
        }
    }
}

/// Σ_i weight_i · cross_entropy(hidden_i · Wᵀ, target_i).
///
/// # Shapes
/// * `hidden`: `[M, E]`
/// * `head`: `[V, E]`, frozen, in any float format
/// * `targets`: `[M]`, each below V
/// * `weights`: `[M]`, f32
/// * result: `[1]`, f32
///
/// The gradient flows to `hidden` only.
///
/// # Panics
/// When the shapes do not fit, or when `head` or `weights` is tracked by autodiff.
pub fn linear_cross_entropy(
    hidden: Tensor<2>,
    head: Tensor<2>,
    targets: Tensor<1, Int>,
    weights: Tensor<1>,
) -> Tensor<1> {
    let [rows, columns] = hidden.dims();
    assert!(
        head.dims()[1] == columns && targets.dims() == [rows] && weights.dims() == [rows],
        "linear_cross_entropy: hidden {:?}, head {:?}, targets {:?}, weights {:?}",
        hidden.dims(),
        head.dims(),
        targets.dims(),
        weights.dims(),
    );
    Tensor::from_dispatch(<Dispatch as CrossEntropyOps>::linear_cross_entropy(
        hidden.into_dispatch(),
        head.into_dispatch(),
        targets.into_dispatch(),
        weights.into_dispatch(),
    ))
}
