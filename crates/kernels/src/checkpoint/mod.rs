//! Gradient checkpointing (Chen et al.: *Training Deep Nets with Sublinear Memory Cost*, 2016) as one node of Burn's
//! autodiff graph.
//!
//! Whether anything is computed again is a property of the autodiff decorator: on a device with
//! [`gradient_checkpointing`](burn::tensor::Device::gradient_checkpointing) [`checkpoint`] runs a block on the inner
//! backend, where nothing is recorded, and adds one node that saves the block's input; on any other it just runs the
//! block. In the backward pass the block runs again on fresh autodiff leaves; the gradients of its input and of its
//! trainable parameters are registered in the outer gradients, so an ordinary `loss.backward()` works.
//!
//! Everything trainable must be reachable through the module or be the input. A *tracked* tensor captured by the
//! closure belongs to the outer graph, which is locked during its backward pass; it is detected in the forward pass and
//! refused. Untracked captures (tables, masks, token ids) are fine. Random numbers must come from counters
//! ([`crate::rng`]), so that both passes draw the same.

mod ops;
mod segment;

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::module::Module;
use burn::tensor::{GradientCheckpointingStrategy, Gradients, Tensor};

/// Whether anybody reads the numbers of a result.
///
/// The second run of a block is there for what its operations save. Its result goes nowhere: the gradient comes from
/// outside, so an operation that ends a block, and saves nothing of its own result, need not compute it then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Values {
    /// They are needed.
    #[default]
    Read,
    /// Shape, dtype and place in the graph are; the numbers may be any finite ones.
    Unread,
}

pub use ops::{CheckpointOps, Segment, SegmentGrads, SegmentRef};

use segment::{ModuleSegment, device_of, trainable_of};

/// Runs `f(module, x, Values::Read)`; where the device of `x` or of the module's parameters asks for gradient
/// checkpointing, without recording it, and again in the backward pass, with [`Values::Unread`].
///
/// Without anything to differentiate, and on a device without gradient checkpointing, this is
/// `f(module, x, Values::Read)`.
///
/// # Panics
/// When `f` captured a tracked tensor, see the [module's docs](self).
pub fn checkpoint<M, F, const D: usize, const E: usize>(module: &M, x: Tensor<D>, f: F) -> Tensor<E>
where
    M: Module + Sync + 'static,
    F: Fn(&M, Tensor<D>, Values) -> Tensor<E> + Send + Sync + 'static,
{
    let trainable = trainable_of(module);
    let device = match trainable.first() {
        _ if x.is_autodiff() => x.device(),
        Some((_, parameter)) => device_of(parameter),
        None => return f(module, x, Values::Read),
    };
    if !x.is_tracked() && trainable.is_empty() {
        return f(module, x, Values::Read);
    }
    if device.gradient_checkpointing_strategy() != Some(GradientCheckpointingStrategy::Balanced) {
        return f(module, x, Values::Read);
    }
    let segment: SegmentRef = Arc::new(ModuleSegment::new(module.clone(), f));
    let anchor = Tensor::<1>::zeros([1], &device).require_grad();
    Tensor::from_dispatch(<Dispatch as CheckpointOps>::checkpoint_segment(
        x.into_dispatch(),
        anchor.into_dispatch(),
        segment,
    ))
}

/// `y.backward()` with `grad` as the gradient of `y`, which Burn has only for scalars.
pub fn backward_with<const D: usize>(y: Tensor<D>, grad: Tensor<D>) -> Gradients {
    let root = <Dispatch as CheckpointOps>::seed_grad(y.into_dispatch(), grad.inner().into_dispatch());
    Tensor::<1>::from_dispatch(root).backward()
}
