//! The gradient, once for all backends. What is saved: q, k, v, the output and one log-sum-exp per row.

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend};

use super::{AttentionOps, AttentionOptions};

#[derive(Clone, Debug)]
struct AttentionState<B: Backend> {
    q: NodeId,
    k: NodeId,
    v: NodeId,
    out: FloatTensor<B>,
    lse: FloatTensor<B>,
    spans: IntTensor<B>,
    options: AttentionOptions,
}

#[derive(Debug)]
struct AttentionBackward;

impl<B: AttentionOps> Backward<B, 3> for AttentionBackward {
    type State = AttentionState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let parents = ops.parents;
        let grad = grads.consume::<B>(&ops.node);
        let AttentionState { q, k, v, out, lse, spans, options } = ops.state;
        let [q, k, v] = [q, k, v].map(|id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id));
        let (dq, dk, dv) = B::packed_attention_backward(grad, q, k, v, out, lse, spans, options);
        for (parent, gradient) in parents.into_iter().zip([dq, dk, dv]) {
            if let Some(node) = parent {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

impl<B: AttentionOps, C: CheckpointStrategy> AttentionOps for Autodiff<B, C> {
    fn packed_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spans: IntTensor<Self>,
        options: AttentionOptions,
    ) -> FloatTensor<Self> {
        match AttentionBackward.prepare::<C>([q.node(), k.node(), v.node()]).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let [q_id, k_id, v_id] = [&q, &k, &v].map(|t| prep.checkpoint(t));
                let (q, k, v) = (q.into_primitive(), k.into_primitive(), v.into_primitive());
                let (out, lse) = B::packed_attention_with_lse(q, k, v, spans.clone(), options);
                let state = AttentionState { q: q_id, k: k_id, v: v_id, out: out.clone(), lse, spans, options };
                prep.finish(state, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::packed_attention(
                q.into_primitive(),
                k.into_primitive(),
                v.into_primitive(),
                spans,
                options,
            )),
        }
    }
}
