//! The operation behind [`checkpoint`](super::checkpoint): a segment that can be run and run again.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, Backend, BackendTensor, DispatchKindConversion, DispatchTensor, TensorMetadata, backend_extension,
};
use burn::module::ParamId;
use burn::tensor::Shape;

/// The gradients of a segment that was run again. All tensors are plain.
#[derive(Debug)]
pub struct SegmentGrads {
    /// The gradient of the input, where it was asked for.
    pub x: Option<DispatchTensor>,
    /// The gradients of the trainable parameters that took part.
    pub params: Vec<(ParamId, DispatchTensor)>,
}

/// A block with its module's type and its tensors' ranks erased, so that one operation serves every block.
pub trait Segment: Send + Sync + 'static {
    /// The forward pass without recording. Input and output are plain tensors.
    fn forward_plain(&self, x: DispatchTensor) -> DispatchTensor;
    /// The trainable leaves as the user holds them.
    fn trainable(&self) -> Vec<(ParamId, DispatchTensor)>;
    /// Runs again on fresh leaves and differentiates, with `grad` as the output's gradient.
    fn recompute(&self, x: DispatchTensor, grad: DispatchTensor, need_x: bool) -> SegmentGrads;
}

/// A shared segment.
pub type SegmentRef = Arc<dyn Segment>;

/// Gradient checkpointing on one backend.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Remote: cfg(feature = "remote")
)]
pub trait CheckpointOps: Backend {
    /// Runs `segment` on `x`. `anchor` is a tracked leaf that is thrown away: it makes the node tracked when `x` is not
    /// (the first block over frozen embeddings), for the segment's parameters are not the node's parents.
    fn checkpoint_segment(x: FloatTensor<Self>, anchor: FloatTensor<Self>, segment: SegmentRef) -> FloatTensor<Self>;

    /// A scalar whose backward pass hands `grad` to `y` as it is.
    fn seed_grad(y: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let _ = grad;
        Self::float_zeros(Shape::new([1]), &y.device(), y.dtype().into())
    }
}

macro_rules! plain_checkpoint_ops {
    ($backend:ty) => {
        impl CheckpointOps for $backend {
            fn checkpoint_segment(
                x: FloatTensor<Self>,
                _anchor: FloatTensor<Self>,
                segment: SegmentRef,
            ) -> FloatTensor<Self> {
                lower::<Self>(segment.forward_plain(lift::<Self>(x)))
            }
        }
    };
}
#[cfg(feature = "flex")]
plain_checkpoint_ops!(burn::backend::Flex);
#[cfg(feature = "ndarray")]
plain_checkpoint_ops!(burn_ndarray::NdArray);
#[cfg(any(feature = "wgpu", feature = "cuda"))]
plain_checkpoint_ops!(burn::backend::Cube);
#[cfg(feature = "remote")]
plain_checkpoint_ops!(burn::backend::Remote);

impl<B, C> CheckpointOps for Autodiff<B, C>
where
    B: Backend,
    C: CheckpointStrategy,
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B, C>>,
{
    fn checkpoint_segment(x: FloatTensor<Self>, anchor: FloatTensor<Self>, segment: SegmentRef) -> FloatTensor<Self> {
        let param_nodes: HashMap<ParamId, NodeId> =
            segment.trainable().into_iter().map(|(id, t)| (id, lower::<Self>(t).id())).collect();
        let (x, x_node) = x.into_parts();
        let out = lower::<B>(segment.forward_plain(lift::<B>(x.clone())));
        match SegmentBackward.prepare::<C>([x_node, anchor.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(SegmentState { x, segment, param_nodes: Arc::new(param_nodes) }, out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    fn seed_grad(y: FloatTensor<Self>, grad: FloatTensor<Self>) -> FloatTensor<Self> {
        let (y, node) = y.into_parts();
        let out = B::float_zeros(Shape::new([1]), &y.device(), y.dtype().into());
        drop(y); // the output is not needed for its own gradient
        match SeedBackward.prepare::<C>([node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(grad.into_primitive(), out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }
}

#[derive(Clone)]
struct SegmentState<B: Backend> {
    x: FloatTensor<B>,
    segment: SegmentRef,
    param_nodes: Arc<HashMap<ParamId, NodeId>>,
}

impl<B: Backend> fmt::Debug for SegmentState<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SegmentState").field("x", &self.x).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct SegmentBackward;

impl<B> Backward<B, 2> for SegmentBackward
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = SegmentState<B>;

    // The outer graph is locked while this runs, so the segment must not touch a node of it: every tensor of the
    // second run is a fresh leaf, and results are registered by the ids of the user's own parameters.
    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x_node, _anchor] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let SegmentState { x, segment, param_nodes } = ops.state;
        let out = segment.recompute(lift::<B>(x), lift::<B>(grad), x_node.is_some());
        if let (Some(node), Some(dx)) = (x_node, out.x) {
            grads.register::<B>(node.id, lower::<B>(dx));
        }
        for (id, gradient) in out.params {
            grads.register::<B>(param_nodes[&id], lower::<B>(gradient));
        }
    }
}

#[derive(Debug)]
struct SeedBackward;

impl<B: Backend> Backward<B, 1> for SeedBackward {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [y] = ops.parents;
        grads.consume::<B>(&ops.node);
        if let Some(node) = y {
            grads.register::<B>(node.id, ops.state);
        }
    }
}

fn lift<B: Backend>(t: FloatTensor<B>) -> DispatchTensor
where
    DispatchTensor: DispatchKindConversion<B>,
{
    <DispatchTensor as DispatchKindConversion<B>>::from_backend(BackendTensor::Float(t))
}

fn lower<B: Backend>(t: DispatchTensor) -> FloatTensor<B>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    match <DispatchTensor as DispatchKindConversion<B>>::try_into_backend(t) {
        Ok(BackendTensor::Float(t)) => t,
        Ok(_) => panic!("checkpoint: expected a float tensor"),
        Err(error) => panic!("checkpoint: {error}"),
    }
}
