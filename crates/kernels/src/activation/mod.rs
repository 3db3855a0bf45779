//! Gated activations (Shazeer: *GLU Variants Improve Transformer*, 2020): `act(gate) ⊙ up`.
//!
//! Only gate and up are saved; the activation and its derivative are computed again in the backward pass.

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

/// The function of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// silu(x) = x σ(x): SwiGLU.
    Silu,
    /// x Φ(x) with the normal distribution's Φ through erf: GeGLU.
    Gelu,
    /// x Φ(x) with Φ through tanh (Hendrycks, Gimpel: *Gaussian Error Linear Units*, 2016).
    GeluTanh,
}

/// Gated activations on one backend. All tensors have one shape and dtype.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Remote: cfg(feature = "remote")
)]
pub trait GluOps: Backend {
    /// act(gate) ⊙ up.
    fn glu(gate: FloatTensor<Self>, up: FloatTensor<Self>, kind: Gate) -> FloatTensor<Self> {
        generic::forward::<Self>(gate, up, kind)
    }

    /// (dgate, dup) = (dy ⊙ up ⊙ act'(gate), dy ⊙ act(gate)).
    fn glu_backward(
        grad: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        kind: Gate,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        generic::backward::<Self>(grad, gate, up, kind)
    }
}

plain_backends!(GluOps);
#[derive(Clone, Debug)]
struct GluState {
    gate: NodeId,
    up: NodeId,
    kind: Gate,
}

#[derive(Debug)]
struct GluBackward;

impl<B: GluOps> Backward<B, 2> for GluBackward {
    type State = GluState;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [gate_node, up_node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let GluState { gate, up, kind } = ops.state;
        let gate = checkpointer.retrieve_node_output::<FloatTensor<B>>(gate);
        let up = checkpointer.retrieve_node_output::<FloatTensor<B>>(up);
        let (dgate, dup) = B::glu_backward(grad, gate, up, kind);
        if let Some(node) = gate_node {
            grads.register::<B>(node.id, dgate);
        }
        if let Some(node) = up_node {
            grads.register::<B>(node.id, dup);
        }
    }
}

impl<B: GluOps, C: CheckpointStrategy> GluOps for Autodiff<B, C> {
    fn glu(gate: FloatTensor<Self>, up: FloatTensor<Self>, kind: Gate) -> FloatTensor<Self> {
        match GluBackward.prepare::<C>([gate.node(), up.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let state = GluState { gate: prep.checkpoint(&gate), up: prep.checkpoint(&up), kind };
                let y = B::glu(gate.into_primitive(), up.into_primitive(), kind);
                prep.finish(state, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::glu(gate.into_primitive(), up.into_primitive(), kind)),
        }
    }
}

/// `act(gate) ⊙ up` with one of the gates.
///
/// # Shapes
/// * `gate`, `up`, result: one and the same
pub fn glu<const D: usize>(gate: Tensor<D>, up: Tensor<D>, kind: Gate) -> Tensor<D> {
    assert_eq!(gate.dims(), up.dims(), "glu: gate and up differ in shape");
    Tensor::from_dispatch(<Dispatch as GluOps>::glu(gate.into_dispatch(), up.into_dispatch(), kind))
}

/// `silu(gate) ⊙ up`.
///
/// # Shapes
/// * `gate`, `up`, result: one and the same
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    glu(gate, up, Gate::Silu)
}
