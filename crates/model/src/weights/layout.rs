//! Which tensors a model has, by the names and shapes that transformers saves them with.

use crate::config::{ModelConfig, NormPlacement, QkNorm};

pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(super) const FINAL_NORM: &str = "model.norm.weight";
pub(super) const HEAD: &str = "lm_head.weight";
pub(super) const HEAD_MODULE: &str = "lm_head";

/// Every tensor that the files must have but the embedding and the head, which depend on each other.
pub(super) fn tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let mut all = vec![(FINAL_NORM.to_owned(), vec![config.hidden_size])];
    for layer in 0..config.num_hidden_layers {
        let prefix = block_prefix(layer);
        all.extend(block(config).into_iter().map(|(name, shape)| (format!("{prefix}{name}"), shape)));
    }
    all
}

pub(super) fn block_prefix(layer: usize) -> String {
    format!("model.layers.{layer}.")
}

/// The two norms of a block: attention's and the MLP's.
pub(super) fn norms(placement: NormPlacement) -> [&'static str; 2] {
    match placement {
        NormPlacement::Pre => ["input_layernorm.weight", "post_attention_layernorm.weight"],
        NormPlacement::Post => ["post_attention_layernorm.weight", "post_feedforward_layernorm.weight"],
    }
}

fn block(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.query_size(), config.key_value_size());
    let mut all: Vec<(String, Vec<usize>)> =
        norms(config.norms).into_iter().map(|name| (name.to_owned(), vec![hidden])).collect();
    let mut linear = |name: &str, out: usize, width: usize, bias: bool| {
        all.push((format!("{name}.weight"), vec![out, width]));
        if bias {
            all.push((format!("{name}.bias"), vec![out]));
        }
    };
    if config.fused_qkv {
        linear("self_attn.qkv_proj", q + 2 * kv, hidden, config.qkv_bias);
    } else {
        linear("self_attn.q_proj", q, hidden, config.qkv_bias);
        linear("self_attn.k_proj", kv, hidden, config.qkv_bias);
        linear("self_attn.v_proj", kv, hidden, config.qkv_bias);
    }
    linear("self_attn.o_proj", hidden, q, config.output_bias);
    if config.fused_gate_up {
        linear("mlp.gate_up_proj", 2 * inner, hidden, config.mlp_bias);
    } else {
        linear("mlp.gate_proj", inner, hidden, config.mlp_bias);
        linear("mlp.up_proj", inner, hidden, config.mlp_bias);
    }
    linear("mlp.down_proj", hidden, inner, config.mlp_bias);
    let norm_widths = match config.qk_norm {
        QkNorm::None => None,
        QkNorm::PerHead => Some((config.head_dim, config.head_dim)),
        QkNorm::Projection => Some((q, kv)),
    };
    if let Some((q, k)) = norm_widths {
        all.push(("self_attn.q_norm.weight".to_owned(), vec![q]));
        all.push(("self_attn.k_norm.weight".to_owned(), vec![k]));
    }
    all
}
