//! The head's projection, log-softmax and loss in one pass over chunks of rows.
//!
//! ```text
//! loss = Σ_i weight_i · (log Σ_j exp z_ij − z_{i, target_i}),    z = hidden · Wᵀ
//! dhidden_i = weight_i · (softmax(z_i) − onehot(target_i)) W
//! ```
//!
//! The logits of all rows never exist at once: those of a chunk of rows become the chunk's gradient and are dropped. What
//! is saved for the backward pass is the gradient of the hidden rows.

#[cfg(feature = "flex")]
mod flex;
pub mod generic;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, Dispatch, TensorMetadata, backend_extension};
use burn::tensor::{Int, Shape, Tensor};

use crate::body::{cast, plain_backends};
use crate::weight::{FrozenWeight, Weight, WeightOps};

/// Logits that exist at one time: 24 MiB of f32.
const CHUNK_ELEMENTS: usize = 3 << 21;

/// The fused head and loss, differentiable.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Remote: cfg(feature = "remote")
)]
pub trait CrossEntropyOps: Backend {
    /// The loss `[1]` in f32. `hidden` `[M, E]`, `w` `[V, E]` frozen, `targets` `[M]`, `weights` `[M]` in f32.
    fn linear_cross_entropy(
        hidden: FloatTensor<Self>,
        #[extension_type] w: Weight<Self>,
        targets: IntTensor<Self>,
        weights: FloatTensor<Self>,
    ) -> FloatTensor<Self>;
}

/// The body on a backend without autodiff. The default one runs anywhere and is the reference for the others.
pub trait CrossEntropyBodies: WeightOps {
    /// The loss, and where it is asked for its gradient to `hidden`. At most `chunk` rows of logits exist at one time.
    fn head_loss(
        hidden: FloatTensor<Self>,
        w: Weight<Self>,
        targets: IntTensor<Self>,
        weights: FloatTensor<Self>,
        with_grad: bool,
        chunk: usize,
    ) -> (FloatTensor<Self>, Option<FloatTensor<Self>>) {
        generic::head_loss::<Self>(hidden, w, targets, weights, with_grad, chunk)
    }
}

macro_rules! plain_cross_entropy_ops {
    ($backend:ty) => {
        impl CrossEntropyOps for $backend {
            fn linear_cross_entropy(
                hidden: FloatTensor<Self>,
                w: Weight<Self>,
                targets: IntTensor<Self>,
                weights: FloatTensor<Self>,
            ) -> FloatTensor<Self> {
                let chunk = chunk::<Self>(&hidden, &w);
                Self::head_loss(hidden, w, targets, weights, false, chunk).0
            }
        }
    };
}
#[cfg(feature = "flex")]
plain_cross_entropy_ops!(burn::backend::Flex);
#[cfg(feature = "ndarray")]
plain_cross_entropy_ops!(burn_ndarray::NdArray);
#[cfg(any(feature = "wgpu", feature = "cuda"))]
plain_cross_entropy_ops!(burn::backend::Cube);
#[cfg(feature = "remote")]
plain_cross_entropy_ops!(burn::backend::Remote);

plain_backends!(CrossEntropyBodies);

/// Rows of logits at one time: equal chunks of at most [`CHUNK_ELEMENTS`].
fn chunk<B: Backend>(hidden: &FloatTensor<B>, w: &Weight<B>) -> usize {
    let ([rows, _], [vocabulary, _]) = (hidden.shape().dims(), w.dims());
    let most = (CHUNK_ELEMENTS / vocabulary.max(1)).max(1);
    rows.div_ceil(rows.div_ceil(most).max(1)).max(1)
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

impl<B: CrossEntropyBodies, C: CheckpointStrategy> CrossEntropyOps for Autodiff<B, C> {
    fn linear_cross_entropy(
        hidden: FloatTensor<Self>,
        w: Weight<Self>,
        targets: IntTensor<Self>,
        weights: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let constant = |tensor: FloatTensor<Self>| {
            assert!(
                !tensor.is_tracked(),
                "linear_cross_entropy: the head and the weights are constants; freeze them with `no_grad`"
            );
            tensor.into_primitive()
        };
        let prep = CrossEntropyBackward.prepare::<C>([hidden.node()]).compute_bound().stateful();
        let (hidden, w, weights) = (hidden.into_primitive(), w.map_floats(constant), constant(weights));
        let chunk = chunk::<B>(&hidden, &w);
        match prep {
            OpsKind::Tracked(prep) => {
                let (loss, grad) = B::head_loss(hidden, w, targets, weights, true, chunk);
                prep.finish(grad.expect("asked for"), loss)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::head_loss(hidden, w, targets, weights, false, chunk).0),
        }
    }
}

/// Σ_i weight_i · cross_entropy(hidden_i · Wᵀ, target_i).
///
/// # Shapes
/// * `hidden`: `[M, E]`
/// * `head`: `[V, E]`, frozen, in any format; INT8 is multiplied with as it dequantises, whatever its threshold
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
    head: impl Into<FrozenWeight>,
    targets: Tensor<1, Int>,
    weights: Tensor<1>,
) -> Tensor<1> {
    let ([rows, columns], head) = (hidden.dims(), head.into());
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
        head.to_dispatch(),
        targets.into_dispatch(),
        weights.into_dispatch(),
    ))
}
