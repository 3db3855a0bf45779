//! Rotary position embedding (Su et al.: *RoFormer*, 2021) in Hugging Face's layout: the two halves of the rotated
//! dimensions form the pairs.
//!
//! ```text
//! y₁ = x₁ cos θ − x₂ sin θ,   y₂ = x₂ cos θ + x₁ sin θ
//! ```
//!
//! A rotation's transpose is the rotation by −θ, so the backward pass is the same operation with the sine negated and
//! needs nothing but the tables.

#[cfg(feature = "flex")]
pub(crate) mod flex;
pub mod generic;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, backend_extension};
use burn::tensor::Tensor;

use crate::body::plain_backends;

/// Rotary embedding on one backend.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Remote: cfg(feature = "remote")
)]
pub trait RopeOps: Backend {
    /// `x` `[B, S, H, D]`, `cos` and `sin` `[B, S, R/2]` with R ≤ D; the dimensions from R on pass through.
    fn rope(x: FloatTensor<Self>, cos: FloatTensor<Self>, sin: FloatTensor<Self>) -> FloatTensor<Self> {
        generic::rope::<Self>(x, cos, sin)
    }
}

plain_backends!(RopeOps);
#[derive(Clone, Debug)]
struct RopeState<B: Backend> {
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
}

#[derive(Debug)]
struct RopeBackward;

impl<B: RopeOps> Backward<B, 1> for RopeBackward {
    type State = RopeState<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [parent] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let RopeState { cos, sin } = ops.state;
        if let Some(parent) = parent {
            grads.register::<B>(parent.id, B::rope(grad, cos, B::float_neg(sin)));
        }
    }
}

impl<B: RopeOps, C: CheckpointStrategy> RopeOps for Autodiff<B, C> {
    fn rope(x: FloatTensor<Self>, cos: FloatTensor<Self>, sin: FloatTensor<Self>) -> FloatTensor<Self> {
        let prep = RopeBackward.prepare::<C>([x.node()]).compute_bound().stateful();
        let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
        let y = B::rope(x.into_primitive(), cos.clone(), sin.clone());
        match prep {
            OpsKind::Tracked(prep) => prep.finish(RopeState { cos, sin }, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

/// Rotates the first R of the D dimensions of every head by its position's angles.
///
/// # Shapes
/// * `x`: `[batch, seq, heads, D]`
/// * `cos`, `sin`: `[batch, seq, R/2]`, R even and at most D
/// * result: as `x`
///
/// # Panics
/// When the shapes do not fit.
pub fn rope(x: Tensor<4>, cos: Tensor<3>, sin: Tensor<3>) -> Tensor<4> {
    let [batch, seq, _, dim] = x.dims();
    let [table_batch, table_seq, half] = cos.dims();
    assert!(
        cos.dims() == sin.dims() && [batch, seq] == [table_batch, table_seq] && 2 * half <= dim,
        "rope: x is {:?}, the tables {:?} and {:?}",
        x.dims(),
        cos.dims(),
        sin.dims(),
    );
    Tensor::from_dispatch(<Dispatch as RopeOps>::rope(x.into_dispatch(), cos.into_dispatch(), sin.into_dispatch()))
}
