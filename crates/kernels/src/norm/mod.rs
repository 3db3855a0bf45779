//! Root-mean-square normalisation (Zhang, Sennrich: *Root Mean Square Layer Normalization*, 2019).
//!
//! ```text
//! y = w ⊙ x · f,   f = 1 / √(mean(x²) + ε)        over the last dimension
//! ```
//!
//! The factor is computed in f32 whatever the dtype of x is, and w multiplies after the cast back, as Hugging Face's
//! Llama does it.

#[cfg(feature = "flex")]
pub(crate) mod flex;
pub mod generic;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, backend_extension};
use burn::tensor::Tensor;

use crate::body::plain_backends;

/// RMS normalisation on one backend.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Remote: cfg(feature = "remote")
)]
pub trait NormOps: Backend {
    /// y = w ⊙ x · f. `x` `[M, K]`, `w` `[K]` of x's dtype; differentiable in `x`.
    fn rms_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        generic::forward::<Self>(x, w, eps).0
    }

    /// The result and f `[M, 1]` in f32, which the backward pass needs.
    fn rms_norm_with_factor(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        eps: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        generic::forward::<Self>(x, w, eps)
    }

    /// dx.
    fn rms_norm_backward(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        factor: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        generic::backward::<Self>(grad, x, w, factor)
    }
}

plain_backends!(NormOps);

#[derive(Clone, Debug)]
struct NormState<B: Backend> {
    x: NodeId,
    w: FloatTensor<B>,
    factor: FloatTensor<B>,
}

#[derive(Debug)]
struct NormBackward;

impl<B: NormOps> Backward<B, 1> for NormBackward {
    type State = NormState<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [parent] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let NormState { x, w, factor } = ops.state;
        let x = checkpointer.retrieve_node_output::<FloatTensor<B>>(x);
        if let Some(parent) = parent {
            grads.register::<B>(parent.id, B::rms_norm_backward(grad, x, w, factor));
        }
    }
}

impl<B: NormOps, C: CheckpointStrategy> NormOps for Autodiff<B, C> {
    fn rms_norm(x: FloatTensor<Self>, w: FloatTensor<Self>, eps: f32) -> FloatTensor<Self> {
        assert!(!w.is_tracked(), "rms_norm: the weight is tracked; freeze it with `no_grad`");
        let w = w.into_primitive();
        match NormBackward.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let id = prep.checkpoint(&x);
                let (y, factor) = B::rms_norm_with_factor(x.into_primitive(), w.clone(), eps);
                prep.finish(NormState { x: id, w, factor }, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rms_norm(x.into_primitive(), w, eps)),
        }
    }
}

/// RMS normalisation over the last dimension with a frozen weight.
///
/// # Shapes
/// * `x`: `[…, K]`, `weight`: `[K]` of x's dtype, result: `[…, K]`
///
/// `eps` is added to the mean square. The gradient flows to `x` only.
///
/// # Panics
/// When the shapes do not fit, or when `weight` is tracked by autodiff.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f32) -> Tensor<D> {
    let dims = x.dims();
    let [k] = weight.dims();
    assert_eq!(dims[D - 1], k, "rms_norm: x has {} columns, the weight {k}", dims[D - 1]);
    let rows = dims[..D - 1].iter().product::<usize>();
    let x = x.reshape([rows, k]);
    let y = <Dispatch as NormOps>::rms_norm(x.into_dispatch(), weight.into_dispatch(), eps);
    Tensor::<2>::from_dispatch(y).reshape(dims)
}
