//! Gated activations (Shazeer: *GLU Variants Improve Transformer*, 2020): `act(gate) ⊙ up`.
//!
//! Only gate and up are saved; the activation and its derivative are computed again in the backward pass.

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
    Cube: cfg(any(feature = "wgpu", feature = "cuda"))
)]
pub trait GluOps: Backend {
    /// act(gate) ⊙ up.
    fn glu(gate: FloatTensor<Self>, up: FloatTensor<Self>, kind: Gate) -> FloatTensor<Self> {
        Self::float_mul(activate::<Self>(gate, kind).0, up)
    }

    /// (dgate, dup) = (dy ⊙ up ⊙ act'(gate), dy ⊙ act(gate)).
    fn glu_backward(
        grad: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        kind: Gate,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (value, derivative) = activate::<Self>(gate, kind);
        let dgate = Self::float_mul(Self::float_mul(grad.clone(), up), derivative());
        (dgate, Self::float_mul(grad, value))
    }
}

plain_backends!(GluOps);
#[cfg(feature = "flex")]
impl GluOps for burn::backend::Flex {}

/// act(x), and act'(x) where it is asked for.
fn activate<B: Backend>(x: FloatTensor<B>, kind: Gate) -> (FloatTensor<B>, impl FnOnce() -> FloatTensor<B>) {
    // act(x) = x p(x) for all three, so act' = p + x p'.
    let (p, u) = match kind {
        Gate::Silu => (B::sigmoid(x.clone()), None),
        Gate::Gelu => {
            let erf = B::float_erf(B::float_mul_scalar(x.clone(), std::f64::consts::FRAC_1_SQRT_2.into()));
            (half_plus_half::<B>(erf), None)
        }
        Gate::GeluTanh => {
            let cubed = B::float_mul(B::float_mul(x.clone(), x.clone()), x.clone());
            let inner = B::float_add(x.clone(), B::float_mul_scalar(cubed, GELU_CUBIC.into()));
            let tanh = B::float_tanh(B::float_mul_scalar(inner, SQRT_2_OVER_PI.into()));
            (half_plus_half::<B>(tanh.clone()), Some(tanh))
        }
    };
    let value = B::float_mul(x.clone(), p.clone());
    let derivative = move || {
        let dp = match (kind, u) {
            // p' = p (1 − p)
            (Gate::Silu, _) => B::float_sub(p.clone(), B::float_mul(p.clone(), p.clone())),
            // p' = (1 − tanh²) √(2/π) (1 + 3 c x²) / 2
            (_, Some(tanh)) => {
                let inner = B::float_mul_scalar(B::float_mul(x.clone(), x.clone()), (3.0 * GELU_CUBIC).into());
                let inner = B::float_mul_scalar(B::float_add_scalar(inner, 1f32.into()), (SQRT_2_OVER_PI / 2.0).into());
                let rest = B::float_add_scalar(B::float_neg(B::float_mul(tanh.clone(), tanh)), 1f32.into());
                B::float_mul(inner, rest)
            }
            // p' = φ(x), the normal density
            (_, None) => {
                let square = B::float_mul(x.clone(), x.clone());
                B::float_mul_scalar(B::float_exp(B::float_mul_scalar(square, (-0.5f32).into())), INV_SQRT_2_PI.into())
            }
        };
        B::float_add(p, B::float_mul(x, dp))
    };
    (value, derivative)
}

const GELU_CUBIC: f64 = 0.044_715;
const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;
const INV_SQRT_2_PI: f64 = 0.398_942_280_401_432_7;

fn half_plus_half<B: Backend>(t: FloatTensor<B>) -> FloatTensor<B> {
    B::float_add_scalar(B::float_mul_scalar(t, 0.5f32.into()), 0.5f32.into())
}

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
