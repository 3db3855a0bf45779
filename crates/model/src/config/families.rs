//! What each family's `configuration_*.py` and `modeling_*.py` in transformers 5.23 make of the keys.

use std::fmt;

use emberlora_quant::bnb;
use serde_json::Value;

use super::error::ConfigError;
use super::fields::{Fields, TokenIds};
use super::{ModelConfig, NormPlacement, QkNorm, rope};

/// A supported architecture, named as `model_type` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// Llama 1 to 3.2 and what shares their layout.
    Llama,
    /// Qwen2 and Qwen2.5: biases on queries, keys and values.
    Qwen2,
    /// Qwen3: a norm on each head's queries and keys.
    Qwen3,
    /// Mistral: sliding-window attention.
    Mistral,
    /// OLMo2: norms behind attention and MLP, and over whole query and key projections.
    ///
    /// In f32 it computes what transformers computes. In bf16 and f16 it rounds as the other families do, which
    /// transformers' OLMo2 does not: there the norms multiply by their weight in f32 and round afterwards, and the
    /// rotary tables stay in f32; here both are rounded to the compute dtype first. The results differ by roundings of
    /// that dtype.
    Olmo2,
    /// Phi-3: fused projections, partially rotated heads.
    Phi3,
}

impl Family {
    const ALL: [Self; 6] = [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Mistral, Self::Olmo2, Self::Phi3];

    /// The value of `model_type`.
    pub const fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Mistral => "mistral",
            Self::Olmo2 => "olmo2",
            Self::Phi3 => "phi3",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.model_type())
    }
}

/// Keys that say something about the file, the tokenizer or a task, and nothing about the numbers.
const HARMLESS: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "custom_pipelines",
    "decoder_start_token_id",
    "dtype",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "initializer_range",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "label2id",
    "language",
    "max_window_layers",
    "model_max_length",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pad_token",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "use_cache",
    // How to generate; transformers reads these from generation_config.json.
    "do_sample",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_p",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
];

/// Dropout that other libraries would apply in training and this one does not.
const DROPOUTS: &[&str] = &[
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "embd_pdrop",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_pdrop",
];

/// Blocks of the deepest model that is believed; the deepest published ones have a few hundred.
const MAX_LAYERS: usize = 10_000;

/// The widest dimension that is believed, the vocabulary included. Products of two such widths fit into 64 bits.
const MAX_WIDTH: usize = 1 << 24;

/// Resolves a whole `config.json`; the second part is the keys that nobody knows.
pub(super) fn read(mut fields: Fields<'_>) -> Result<(ModelConfig, Vec<(String, String)>), ConfigError> {
    let family = family(&mut fields)?;
    refuse_what_is_never_supported(&mut fields)?;

    let hidden_size = fields.count("hidden_size", MAX_WIDTH)?;
    let num_hidden_layers = fields.count("num_hidden_layers", MAX_LAYERS)?;
    let num_attention_heads = fields.count("num_attention_heads", MAX_WIDTH)?;
    let num_key_value_heads = key_value_heads(&mut fields, family, num_attention_heads)?;
    let head_dim = head_dim(&mut fields, family, hidden_size, num_attention_heads)?;
    let max_position_embeddings = match fields.optional("max_position_embeddings")? {
        Some(0) => return Err(fields.unsupported("max_position_embeddings", &Value::from(0), "must be at least 1")),
        Some(n) => n,
        None => default_context(family),
    };
    let context = rope::Context {
        head_dim,
        max_position_embeddings,
        partial: family == Family::Phi3,
        scaling: family != Family::Phi3,
    };
    let (rope, mut unknown) = rope::read(&mut fields, &context)?;

    // A projection's bias is a key in some families and fixed by the code in the others.
    let attention_bias = match family {
        Family::Llama | Family::Qwen3 | Family::Olmo2 => fields.or("attention_bias", false)?,
        Family::Qwen2 | Family::Mistral | Family::Phi3 => false,
    };
    let default_eps = if matches!(family, Family::Olmo2 | Family::Phi3) { 1e-5 } else { 1e-6 };
    let config = ModelConfig {
        family,
        vocab_size: fields.count("vocab_size", MAX_WIDTH)?,
        hidden_size,
        intermediate_size: fields.count("intermediate_size", MAX_WIDTH)?,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        rms_norm_eps: fields.or("rms_norm_eps", default_eps)?,
        max_position_embeddings,
        rope,
        tie_word_embeddings: fields.or("tie_word_embeddings", false)?,
        fused_qkv: family == Family::Phi3,
        qkv_bias: attention_bias || family == Family::Qwen2,
        output_bias: attention_bias,
        qk_norm: match family {
            Family::Qwen3 => QkNorm::PerHead,
            Family::Olmo2 => QkNorm::Projection,
            _ => QkNorm::None,
        },
        fused_gate_up: family == Family::Phi3,
        mlp_bias: family == Family::Llama && fields.or("mlp_bias", false)?,
        norms: if family == Family::Olmo2 { NormPlacement::Post } else { NormPlacement::Pre },
        windows: windows(&mut fields, family, num_hidden_layers)?,
        quantization: quantization(&mut fields)?,
        eos_token_ids: fields.optional::<TokenIds>("eos_token_id")?.map(|ids| ids.0).unwrap_or_default(),
    };
    unknown.extend(fields.unread(HARMLESS));
    Ok((config, unknown))
}

fn family(fields: &mut Fields<'_>) -> Result<Family, ConfigError> {
    let name: String = fields.required("model_type")?;
    Family::ALL.into_iter().find(|family| family.model_type() == name).ok_or_else(|| {
        let known = Family::ALL.map(Family::model_type).join(", ");
        fields.unsupported("model_type", &Value::from(name), format!("supported families are {known}"))
    })
}

fn refuse_what_is_never_supported(fields: &mut Fields<'_>) -> Result<(), ConfigError> {
    match fields.optional::<String>("hidden_act")?.as_deref() {
        None | Some("silu" | "swish") => {}
        Some(other) => return Err(fields.unsupported("hidden_act", &Value::from(other), "only silu is supported")),
    }
    for key in DROPOUTS {
        match fields.optional::<f64>(key)? {
            None | Some(0.0) => {}
            Some(p) => {
                let reason = "dropout in the base model is not supported; set it to 0 or use the adapter's dropout";
                return Err(fields.unsupported(key, &Value::from(p), reason));
            }
        }
    }
    Ok(())
}

/// How bitsandbytes quantised the weights. What other methods made, this crate cannot read.
fn quantization(fields: &mut Fields<'_>) -> Result<Option<bnb::Config>, ConfigError> {
    let Some(value) = fields.take("quantization_config") else { return Ok(None) };
    bnb::Config::from_json(&value).map(Some).map_err(|bnb::ConfigError { key, found, expected }| {
        ConfigError::Unsupported {
            path: fields.path().to_owned(),
            key: fields.full(&format!("quantization_config.{key}")),
            found,
            reason: format!("expected {expected}; else use the model's bf16, f16 or f32 weights"),
        }
    })
}

fn key_value_heads(fields: &mut Fields<'_>, family: Family, heads: usize) -> Result<usize, ConfigError> {
    let default = match family {
        Family::Mistral => 8,
        Family::Qwen2 | Family::Qwen3 => 32,
        Family::Llama | Family::Olmo2 | Family::Phi3 => heads,
    };
    // An explicit null means one per query head, unlike an absent key.
    let explicit_null = fields.is_null("num_key_value_heads");
    let kv = fields.or("num_key_value_heads", if explicit_null { heads } else { default })?;
    if kv == 0 || !heads.is_multiple_of(kv) {
        let reason = format!("must divide num_attention_heads, which is {heads}");
        return Err(fields.unsupported("num_key_value_heads", &Value::from(kv), reason));
    }
    Ok(kv)
}

fn head_dim(fields: &mut Fields<'_>, family: Family, hidden: usize, heads: usize) -> Result<usize, ConfigError> {
    let dim = match (fields.optional("head_dim")?, family) {
        (Some(dim), _) => dim,
        (None, Family::Qwen3) => 128,
        (None, _) if hidden.is_multiple_of(heads) => hidden / heads,
        (None, _) => {
            let reason = format!("must be a multiple of num_attention_heads ({heads}) where head_dim is not given");
            return Err(fields.unsupported("hidden_size", &Value::from(hidden), reason));
        }
    };
    if dim == 0 || !dim.is_multiple_of(2) {
        return Err(fields.unsupported("head_dim", &Value::from(dim), "rotation needs an even number of dimensions"));
    }
    // The keys and values are no wider than the queries, so this bounds all three.
    if heads.checked_mul(dim).is_none_or(|width| width > MAX_WIDTH) {
        let reason = format!("times num_attention_heads ({heads}) it must be at most {MAX_WIDTH}");
        return Err(fields.unsupported("head_dim", &Value::from(dim), reason));
    }
    Ok(dim)
}

const fn default_context(family: Family) -> usize {
    match family {
        Family::Llama | Family::Olmo2 => 2048,
        Family::Qwen2 | Family::Qwen3 => 32_768,
        Family::Mistral => 4096 * 32,
        Family::Phi3 => 4096,
    }
}

fn windows(fields: &mut Fields<'_>, family: Family, layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    let explicit_null = fields.is_null("sliding_window");
    let window = match family {
        // Not a key of these families: left to the check for unknown keys.
        Family::Llama | Family::Olmo2 => None,
        Family::Phi3 => fields.optional::<usize>("sliding_window")?,
        // Absent means the class's default of 4096.
        Family::Mistral | Family::Qwen2 | Family::Qwen3 => {
            fields.optional::<usize>("sliding_window")?.or((!explicit_null).then_some(4096))
        }
    };
    if window == Some(0) {
        return Err(fields.unsupported("sliding_window", &Value::from(0), "must be at least 1, or null for none"));
    }
    // No index exceeds an i32, in which backends compare distances, so a wider window hides nothing either.
    let window = window.map(|window| window.min(i32::MAX as usize));
    let types = fields.optional::<Vec<String>>("layer_types")?;
    let resolved: Vec<Option<usize>> = match family {
        Family::Qwen2 | Family::Qwen3 => {
            let window = if fields.or("use_sliding_window", false)? { window } else { None };
            let first = fields.or("max_window_layers", 28)?;
            match &types {
                None => (0..layers).map(|layer| window.filter(|_| layer >= first)).collect(),
                Some(types) => types.iter().map(|kind| window.filter(|_| kind == SLIDING)).collect(),
            }
        }
        _ => vec![window; layers],
    };
    if let Some(types) = types {
        let named = |window: &Option<usize>| if window.is_some() { SLIDING } else { "full_attention" };
        if !types.iter().map(String::as_str).eq(resolved.iter().map(named)) || types.len() != layers {
            let reason = format!("does not agree with {layers} layers and the sliding-window keys of {family}");
            return Err(fields.unsupported("layer_types", &Value::from(types), reason));
        }
    }
    Ok(resolved)
}

const SLIDING: &str = "sliding_attention";
