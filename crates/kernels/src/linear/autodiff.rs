//! The gradients, once for all backends. What is saved: x (through the checkpointer, so that a cheap x can be
//! recomputed) and handles on the parameters.

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend};

use super::{Group, LinearBodies, LinearOps, LowRank, Optional, Projected, Prologue, ops};
use crate::checkpoint::Values;

/// x, the residual, then A and B of up to three projections.
const PARENTS: usize = 8;

#[derive(Clone, Debug)]
struct State<B: Backend> {
    x: NodeId,
    prologue: Prologue<B>,
    projections: Vec<Projected<B>>,
    has_residual: bool,
}

#[derive(Debug)]
struct ProjectBackward;

impl<B: LinearBodies> Backward<B, PARENTS> for ProjectBackward {
    type State = State<B>;

    fn backward(self, ops: Ops<Self::State, PARENTS>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [x_node, residual, factors @ ..] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let State { x, prologue, projections, has_residual } = ops.state;
        let x = checkpointer.retrieve_node_output::<FloatTensor<B>>(x);
        if let (Some(node), true) = (residual, has_residual) {
            grads.register::<B>(node.id, grad.clone());
        }
        let out = B::project_backward(grad, x, prologue, projections, x_node.is_some());
        if let (Some(node), Some(dx)) = (x_node, out.dx) {
            grads.register::<B>(node.id, dx);
        }
        for (nodes, gradients) in factors.chunks_exact(2).zip(out.adapters) {
            let Some((da, db)) = gradients else { continue };
            for (node, gradient) in nodes.iter().zip([da, db]) {
                if let Some(node) = node {
                    grads.register::<B>(node.id, gradient);
                }
            }
        }
    }
}

impl<B: LinearBodies, C: CheckpointStrategy> LinearOps for Autodiff<B, C> {
    fn project(
        x: FloatTensor<Self>,
        prologue: Prologue<Self>,
        group: Group<Self>,
        residual: Optional<Self>,
        values: Values,
    ) -> FloatTensor<Self> {
        let residual = residual.into_option();
        // A parent that there is not has x's node in its place, and never gets a gradient.
        let mut parents = [const { None }; PARENTS];
        parents[0] = Some(x.node());
        parents[1] = residual.as_ref().map(|residual| residual.node());
        let projections: Vec<Projected<B>> = group
            .into_vec()
            .into_iter()
            .zip(parents[2..].chunks_exact_mut(2))
            .map(|(projection, nodes)| {
                let Projected { weight, bias, adapter, path } = projection;
                let adapter = match adapter {
                    LowRank::Absent => LowRank::Absent,
                    LowRank::Present { a, b } => {
                        (nodes[0], nodes[1]) = (Some(a.node()), Some(b.node()));
                        LowRank::Present { a: a.into_primitive(), b: b.into_primitive() }
                    }
                };
                Projected {
                    weight: weight.map_floats(constant::<B, C>),
                    bias: match bias {
                        Optional::Absent => Optional::Absent,
                        Optional::Present(bias) => Optional::Present(constant::<B, C>(bias)),
                    },
                    adapter,
                    path,
                }
            })
            .collect();
        let prologue = match prologue {
            Prologue::Plain => Prologue::Plain,
            Prologue::Normed { weight, eps } => Prologue::Normed { weight: constant::<B, C>(weight), eps },
            Prologue::Gated(gate) => Prologue::Gated(gate),
        };
        let parents = parents.map(|node| node.unwrap_or_else(|| x.node()));
        let has_residual = residual.is_some();
        let residual = residual.map(|residual| residual.into_primitive());
        match ProjectBackward.prepare::<C>(parents).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let id = prep.checkpoint(&x);
                let x = x.into_primitive();
                let y = ops::result_of::<B>(x, prologue.clone(), projections.clone(), residual, values);
                prep.finish(State { x: id, prologue, projections, has_residual }, y)
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(ops::result_of::<B>(x.into_primitive(), prologue, projections, residual, values))
            }
        }
    }
}

/// A frozen tensor.
fn constant<B: Backend, C: CheckpointStrategy>(tensor: FloatTensor<Autodiff<B, C>>) -> FloatTensor<B> {
    assert!(!tensor.is_tracked(), "project: a frozen tensor is tracked; freeze it with `no_grad`");
    tensor.into_primitive()
}
