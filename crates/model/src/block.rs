//! One decoder block: attention and MLP, each with its norm and residual.

use burn::module::{Module, Param};
use burn::tensor::{Int, Tensor};
use emberlora_kernels::checkpoint::Values;
use emberlora_kernels::{AttentionKind, Input, rms_norm};
use emberlora_lora::{LoraLinear, Pass};

use crate::attention::{Attention, QkvProjection};
use crate::cache::LayerCache;
use crate::mlp::{GateUpProjection, Mlp};

/// What all blocks of one forward pass share. None of it is differentiated.
#[derive(Clone, Debug)]
pub(crate) struct Context {
    /// `[B, S, R/2]`.
    pub cos: Tensor<3>,
    pub sin: Tensor<3>,
    /// `[B, Sk, 2]`, see [`attention`](emberlora_kernels::attention).
    pub spans: Tensor<3, Int>,
    /// The rows that are needed behind the attention, as indices into all B · S; `None` needs them all.
    pub rows: Option<Tensor<1, Int>>,
    pub attention: AttentionKind,
    pub pass: Pass,
    /// Whether anybody reads what the block returns.
    pub values: Values,
}

impl Context {
    /// The rows of `x` `[B, S, N]` that are needed: `[1, rows, N]`, or `x` as it is.
    pub(crate) fn needed(&self, x: Tensor<3>) -> Tensor<3> {
        let Some(rows) = &self.rows else { return x };
        let [batch, seq, width] = x.dims();
        let needed = x.reshape([batch * seq, width]).select(0, rows.clone());
        needed.reshape([1, rows.dims()[0], width])
    }
}

/// A decoder block.
#[derive(Module, Debug)]
pub(crate) struct Block {
    pub self_attn: Attention,
    pub mlp: Mlp,
    /// The norm of attention: in front of it, or behind it with post-norms.
    pub attention_norm: Param<Tensor<1>>,
    /// The norm of the MLP, likewise.
    pub mlp_norm: Param<Tensor<1>>,
    pub post_norms: bool,
    pub eps: f32,
}

impl Block {
    /// `[B, S, E]` to `[B, S, E]`, or to the rows that are [needed](Context::needed).
    pub(crate) fn forward(&self, x: Tensor<3>, context: &Context, cache: Option<&mut LayerCache>) -> Tensor<3> {
        let residual = context.needed(x.clone());
        if self.post_norms {
            let y = self.self_attn.forward(x, Input::Plain, None, context, cache);
            let x = residual + self.normed(y, &self.attention_norm);
            let y = self.mlp.forward(x.clone(), Input::Plain, None, &context.pass, Values::Read);
            return x + self.normed(y, &self.mlp_norm);
        }
        let x = self.self_attn.forward(x, self.input(&self.attention_norm), Some(residual), context, cache);
        self.mlp.forward(x.clone(), self.input(&self.mlp_norm), Some(x), &context.pass, context.values)
    }

    fn normed(&self, x: Tensor<3>, norm: &Param<Tensor<1>>) -> Tensor<3> {
        rms_norm(x, norm.val(), self.eps)
    }

    fn input(&self, norm: &Param<Tensor<1>>) -> Input {
        Input::Normed { weight: norm.val(), eps: self.eps }
    }

    /// Every projection with its name inside the block.
    pub(crate) fn projections(&self) -> Vec<(&'static str, &LoraLinear)> {
        let mut all = match &self.self_attn.qkv {
            QkvProjection::Split(qkv) => vec![
                ("self_attn.q_proj", &qkv.q_proj),
                ("self_attn.k_proj", &qkv.k_proj),
                ("self_attn.v_proj", &qkv.v_proj),
            ],
            QkvProjection::Fused(qkv_proj) => vec![("self_attn.qkv_proj", qkv_proj)],
        };
        all.push(("self_attn.o_proj", &self.self_attn.o_proj));
        match &self.mlp.gate_up {
            GateUpProjection::Split(mlp) => {
                all.extend([("mlp.gate_proj", &mlp.gate_proj), ("mlp.up_proj", &mlp.up_proj)]);
            }
            GateUpProjection::Fused(gate_up_proj) => all.push(("mlp.gate_up_proj", gate_up_proj)),
        }
        all.push(("mlp.down_proj", &self.mlp.down_proj));
        all
    }

    /// The same, to be changed.
    pub(crate) fn projections_mut(&mut self) -> Vec<(&'static str, &mut LoraLinear)> {
        let mut all = match &mut self.self_attn.qkv {
            QkvProjection::Split(qkv) => vec![
                ("self_attn.q_proj", &mut qkv.q_proj),
                ("self_attn.k_proj", &mut qkv.k_proj),
                ("self_attn.v_proj", &mut qkv.v_proj),
            ],
            QkvProjection::Fused(qkv_proj) => vec![("self_attn.qkv_proj", qkv_proj)],
        };
        all.push(("self_attn.o_proj", &mut self.self_attn.o_proj));
        match &mut self.mlp.gate_up {
            GateUpProjection::Split(mlp) => {
                all.extend([("mlp.gate_proj", &mut mlp.gate_proj), ("mlp.up_proj", &mut mlp.up_proj)]);
            }
            GateUpProjection::Fused(gate_up_proj) => all.push(("mlp.gate_up_proj", gate_up_proj)),
        }
        all.push(("mlp.down_proj", &mut self.mlp.down_proj));
        all
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::attention::AttentionShape;

    fn linear(rows: usize, device: &Device) -> LoraLinear {
        LoraLinear::new(Tensor::ones([rows, 4], device), None)
    }

    #[test]
    fn a_block_leaves_out_what_nobody_reads() {
        let device = Device::flex();
        let norm = || Param::from_tensor(Tensor::ones([4], &device)).set_require_grad(false);
        let block = Block {
            self_attn: Attention {
                qkv: QkvProjection::Fused(linear(12, &device)),
                o_proj: linear(4, &device),
                q_norm: None,
                k_norm: None,
                shape: AttentionShape { heads: 1, kv_heads: 1, head_dim: 4, eps: 1e-5, window: None },
            },
            mlp: Mlp { gate_up: GateUpProjection::Fused(linear(8, &device)), down_proj: linear(4, &device) },
            attention_norm: norm(),
            mlp_norm: norm(),
            post_norms: false,
            eps: 1e-5,
        };
        let sum = |values| {
            let context = Context {
                cos: Tensor::ones([1, 2, 2], &device),
                sin: Tensor::zeros([1, 2, 2], &device),
                spans: Tensor::from_data([[[2, 0], [2, 1]]], &device),
                rows: None,
                attention: AttentionKind::Fused,
                pass: Pass::eval(),
                values,
            };
            let y = block.forward(Tensor::ones([1, 2, 4], &device), &context, None);
            assert_eq!(y.dims(), [1, 2, 4]);
            y.abs().sum().into_scalar::<f32>()
        };
        assert!(sum(Values::Read) > 1.0);
        assert_eq!(sum(Values::Unread), 0.0);
    }
}
