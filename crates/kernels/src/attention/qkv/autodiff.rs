//! The gradient, once for all backends.

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend};

use super::{HeadLayout, Norms, QkvBodies, QkvContext, QkvOps, RotaryTables};
use crate::AttentionOptions;

#[derive(Clone, Debug)]
struct State<B: Backend> {
    qkv: NodeId,
    out: FloatTensor<B>,
    lse: FloatTensor<B>,
    context: QkvContext<B>,
}

#[derive(Debug)]
struct QkvBackward;

impl<B: QkvBodies> Backward<B, 1> for QkvBackward {
    type State = State<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let [parent] = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let State { qkv, out, lse, context } = ops.state;
        let qkv = checkpointer.retrieve_node_output::<FloatTensor<B>>(qkv);
        if let Some(node) = parent {
            grads.register::<B>(node.id, B::qkv_backward(grad, qkv, out, lse, &context));
        }
    }
}

impl<B: QkvBodies, C: CheckpointStrategy> QkvOps for Autodiff<B, C> {
    fn qkv_attention(
        qkv: FloatTensor<Self>,
        norms: Norms<Self>,
        tables: RotaryTables<Self>,
        spans: IntTensor<Self>,
        layout: HeadLayout,
        options: AttentionOptions,
    ) -> FloatTensor<Self> {
        let norms = match norms {
            Norms::Absent => Norms::Absent,
            Norms::Present { q, k, eps } => {
                assert!(
                    !q.is_tracked() && !k.is_tracked(),
                    "qkv_attention: a norm is tracked; freeze it with `no_grad`"
                );
                Norms::Present { q: q.into_primitive(), k: k.into_primitive(), eps }
            }
        };
        let tables = RotaryTables { cos: tables.cos.into_primitive(), sin: tables.sin.into_primitive() };
        let context = QkvContext { norms, tables, spans, layout, options };
        match QkvBackward.prepare::<C>([qkv.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let id = prep.checkpoint(&qkv);
                let (out, lse) = B::qkv_forward(qkv.into_primitive(), &context);
                prep.finish(State { qkv: id, out: out.clone(), lse, context }, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::qkv_forward(qkv.into_primitive(), &context).0),
        }
    }
}
