//! Grouped-query self-attention of every family.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use emberlora_kernels::{AttentionOptions, Input, attention, rms_norm, rope};
use emberlora_lora::{LoraLinear, project};

use crate::block::Context;
use crate::cache::LayerCache;

/// The projections that make queries, keys and values, named as in the files.
#[expect(clippy::large_enum_variant, reason = "all blocks of a model are of one variant")]
#[derive(Module, Debug)]
pub(crate) enum QkvProjection {
    /// Three projections.
    Split(SplitQkv),
    /// `qkv_proj`, whose output is queries, keys and values side by side (Phi-3).
    Fused(LoraLinear),
}

/// `q_proj`, `k_proj` and `v_proj`.
#[derive(Module, Debug)]
pub(crate) struct SplitQkv {
    pub q_proj: LoraLinear,
    pub k_proj: LoraLinear,
    pub v_proj: LoraLinear,
}

impl QkvProjection {
    /// In the order of their outputs.
    fn layers(&self) -> Vec<&LoraLinear> {
        match self {
            Self::Split(SplitQkv { q_proj, k_proj, v_proj }) => vec![q_proj, k_proj, v_proj],
            Self::Fused(qkv_proj) => vec![qkv_proj],
        }
    }
}

/// `self_attn` of one block.
#[derive(Module, Debug)]
pub(crate) struct Attention {
    pub qkv: QkvProjection,
    pub o_proj: LoraLinear,
    /// `[head_dim]` or the width of the projection, see [`QkNorm`](crate::QkNorm).
    pub q_norm: Option<Param<Tensor<1>>>,
    pub k_norm: Option<Param<Tensor<1>>>,
    #[module(skip)]
    pub shape: AttentionShape,
}

/// What the layer needs to know beside its weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Whether the norms see one head at a time rather than the whole projection.
    pub norm_per_head: bool,
    pub eps: f32,
    pub window: Option<usize>,
}

impl Attention {
    /// `[B, S, E]` to `[B, S, E]`, or to the rows that are [needed](Context::needed). `input` is what the projections see
    /// of `x`, and `residual` is added to the result.
    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        input: Input,
        residual: Option<Tensor<3>>,
        context: &Context,
        cache: Option<&mut LayerCache>,
    ) -> Tensor<3> {
        let [batch, seq, _] = x.dims();
        let shape = &self.shape;
        let qkv = project(x, input, &self.qkv.layers(), None, &context.pass);
        let (q, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let part = |from: usize, width: usize| qkv.clone().narrow(2, from, width);
        let (q, k, v) = (part(0, q), part(q, kv), part(q + kv, kv));
        let q = rope(self.heads(q, shape.heads, &self.q_norm), context.cos.clone(), context.sin.clone());
        let k = rope(self.heads(k, shape.kv_heads, &self.k_norm), context.cos.clone(), context.sin.clone());
        let v = v.reshape([batch, seq, shape.kv_heads, shape.head_dim]);
        let (k, v) = match cache {
            Some(cache) => cache.append(k, v),
            None => (k, v),
        };
        let scale = (shape.head_dim as f32).powf(-0.5);
        let options = AttentionOptions { scale, window: shape.window, kind: context.attention };
        let y = attention(q, k, v, context.spans.clone(), options);
        let y = context.needed(y.reshape([batch, seq, shape.heads * shape.head_dim]));
        project(y, Input::Plain, &[&self.o_proj], residual, &context.pass)
    }

    /// `[B, S, heads * head_dim]` to `[B, S, heads, head_dim]`, normalised where the family does.
    fn heads(&self, x: Tensor<3>, heads: usize, norm: &Option<Param<Tensor<1>>>) -> Tensor<4> {
        let [batch, seq, _] = x.dims();
        let split = |x: Tensor<3>| x.reshape([batch, seq, heads, self.shape.head_dim]);
        match norm {
            None => split(x),
            Some(weight) if self.shape.norm_per_head => rms_norm(split(x), weight.val(), self.shape.eps),
            Some(weight) => split(rms_norm(x, weight.val(), self.shape.eps)),
        }
    }
}
