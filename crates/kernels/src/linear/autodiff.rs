//! The gradients, once for all backends. What is saved: handles on the parameters and x (through the checkpointer, so
//! that a cheap x can be recomputed); nothing for the frozen product, whose gradient needs the weight alone.

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend};

use super::{AdapterPath, LinearOps};

#[derive(Debug)]
struct FrozenBackward;

impl<B: LinearOps> Backward<B, 1> for FrozenBackward {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        if let Some(x) = x {
            grads.register::<B>(x.id, B::frozen_linear_backward(grad, ops.state));
        }
    }
}

#[derive(Clone, Debug)]
struct LoraState<B: Backend> {
    x: NodeId,
    w: FloatTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    path: AdapterPath,
}

#[derive(Debug)]
struct LoraBackward;

impl<B: LinearOps> Backward<B, 3> for LoraBackward {
    type State = LoraState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [x_node, a_node, b_node] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let LoraState { x, w, a, b, path } = ops.state;
        let x = checkpointer.retrieve_node_output::<FloatTensor<B>>(x);
        let (dx, da, db) = B::lora_linear_backward(grad, x, w, a, b, path, x_node.is_some());
        if let (Some(node), Some(dx)) = (x_node, dx) {
            grads.register::<B>(node.id, dx);
        }
        if let Some(node) = a_node {
            grads.register::<B>(node.id, da);
        }
        if let Some(node) = b_node {
            grads.register::<B>(node.id, db);
        }
    }
}

impl<B: LinearOps, C: CheckpointStrategy> LinearOps for Autodiff<B, C> {
    fn frozen_linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        assert!(!w.is_tracked(), "frozen_linear: the weight is tracked; freeze it with `no_grad`");
        let w = w.into_primitive();
        let prep = FrozenBackward.prepare::<C>([x.node()]).compute_bound().stateful();
        let y = B::frozen_linear(x.into_primitive(), w.clone());
        match prep {
            OpsKind::Tracked(prep) => prep.finish(w, y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn lora_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        path: AdapterPath,
    ) -> FloatTensor<Self> {
        assert!(!w.is_tracked(), "lora_linear: the weight is tracked; freeze it with `no_grad`");
        let w = w.into_primitive();
        let prep = LoraBackward.prepare::<C>([x.node(), a.node(), b.node()]).compute_bound().stateful();
        let (a, b) = (a.into_primitive(), b.into_primitive());
        match prep {
            OpsKind::Tracked(mut prep) => {
                let id = prep.checkpoint(&x);
                let y = B::lora_linear(x.into_primitive(), w.clone(), a.clone(), b.clone(), path);
                prep.finish(LoraState { x: id, w, a, b, path }, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::lora_linear(x.into_primitive(), w, a, b, path)),
        }
    }
}
