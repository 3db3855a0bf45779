//! Grouped-query self-attention of every family.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use emberlora_kernels::checkpoint::Values;
use emberlora_kernels::{AttentionOptions, HeadLayout, HeadNorms, Input, attention, qkv_attention, qkv_heads};
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
        let AttentionShape { heads, kv_heads, head_dim, window, .. } = self.shape;
        let layout = HeadLayout::new(heads, kv_heads, head_dim);
        let options = AttentionOptions { scale: (head_dim as f32).powf(-0.5), window, kind: context.attention };
        let (norms, tables) = (self.norms(), (context.cos.clone(), context.sin.clone()));
        let qkv = project(x, input, &self.qkv.layers(), None, &context.pass, Values::Read);
        let y = match cache {
            None => qkv_attention(qkv, norms.as_ref(), tables, context.spans.clone(), layout, options),
            Some(cache) => {
                let (q, k, v) = qkv_heads(qkv, norms.as_ref(), tables, layout);
                let (k, v) = cache.append(k, v);
                attention(q, k, v, context.spans.clone(), options).reshape([batch, seq, heads * head_dim])
            }
        };
        let y = context.needed(y);
        project(y, Input::Plain, &[&self.o_proj], residual, &context.pass, Values::Read)
    }

    fn norms(&self) -> Option<HeadNorms> {
        let (q, k) = (self.q_norm.as_ref()?.val(), self.k_norm.as_ref()?.val());
        Some(HeadNorms { q, k, eps: self.shape.eps })
    }
}
