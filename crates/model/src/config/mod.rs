//! `config.json` of every supported family, resolved into one [`ModelConfig`].
//!
//! The files differ in what they leave out: a default of one family is another default elsewhere, and some choices
//! (Qwen2's biases, OLMo2's norms) are made by the family's code alone. All of that ends here; the layers read what is
//! resolved. A key that may change the numbers and is not supported is an error, see [`ConfigError`].

mod error;
mod families;
mod fields;
mod rope;

use std::path::Path;

use emberlora_quant::bnb;
use serde_json::{Map, Value};

pub use error::ConfigError;
pub use families::Family;
use fields::{Fields, TokenIds};

use crate::rope::RopeConfig;

/// Which RMSNorm the queries and keys pass before they are rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// One over each head's dimensions (Qwen3).
    PerHead,
    /// One over the whole projection (OLMo2).
    Projection,
}

/// Where a block's two norms stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before attention and MLP: `x + f(norm(x))`.
    Pre,
    /// Behind them, inside the residual: `x + norm(f(x))` (OLMo2).
    Post,
}

/// A decoder-only model, every choice made.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    /// Whose layout it is.
    pub family: Family,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads, a divisor of the query heads.
    pub num_key_value_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// The epsilon of every RMSNorm.
    pub rms_norm_eps: f64,
    /// The context length that the model was made for.
    pub max_position_embeddings: usize,
    /// The rotary embedding.
    pub rope: RopeConfig,
    /// Whether the head is the embedding table.
    pub tie_word_embeddings: bool,
    /// One `qkv_proj` in place of `q_proj`, `k_proj` and `v_proj`.
    pub fused_qkv: bool,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// A bias on `o_proj`.
    pub output_bias: bool,
    /// The norm of queries and keys.
    pub qk_norm: QkNorm,
    /// One `gate_up_proj` in place of `gate_proj` and `up_proj`.
    pub fused_gate_up: bool,
    /// Biases on the MLP's projections.
    pub mlp_bias: bool,
    /// Where the block's norms stand.
    pub norms: NormPlacement,
    /// For each block the number of most recent tokens (itself included) that a token attends to; `None` is all.
    pub windows: Vec<Option<usize>>,
    /// How bitsandbytes quantised the projections that the files hold; `None` where they are dense.
    pub quantization: Option<bnb::Config>,
    /// Tokens that end a generation, as `config.json` lists them; see [`stop_tokens`].
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Whether a token's place on its path depends on how long its document becomes, as with dynamic rotation. Documents
    /// that begin alike then cannot share the tokens of their beginning.
    pub fn positions_depend_on_length(&self) -> bool {
        self.rope.depends_on_length()
    }

    /// Reads `config.json` of a model directory.
    ///
    /// # Errors
    /// Any [`ConfigError`].
    pub fn from_dir(dir: &Path) -> Result<Self, ConfigError> {
        Self::from_file(&dir.join("config.json"))
    }

    /// Reads a file that holds what a `config.json` holds.
    ///
    /// # Errors
    /// Any [`ConfigError`].
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        Self::from_map(read_object(path)?, path)
    }

    /// Reads the text of a `config.json`; `path` is the file that messages name.
    ///
    /// # Errors
    /// Any [`ConfigError`] but [`ConfigError::Read`].
    pub fn from_json(text: &str, path: &Path) -> Result<Self, ConfigError> {
        Self::from_map(parse_object(text, path)?, path)
    }

    fn from_map(map: Map<String, Value>, path: &Path) -> Result<Self, ConfigError> {
        let (config, unknown) = families::read(Fields::new(path, "", map))?;
        if unknown.is_empty() { Ok(config) } else { Err(ConfigError::Unknown { path: path.into(), keys: unknown }) }
    }

    /// Columns of the query projection's output.
    pub fn query_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Columns of the key (and of the value) projection's output.
    pub fn key_value_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }
}

/// The tokens that end a generation: `eos_token_id` of `generation_config.json`, where transformers looks first, or
/// else that of `config.json`. Either file may name one id or several.
///
/// # Errors
/// A file that is there and malformed.
pub fn stop_tokens(dir: &Path) -> Result<Vec<u32>, ConfigError> {
    let generation = dir.join("generation_config.json");
    for path in [generation, dir.join("config.json")] {
        if !path.exists() {
            continue;
        }
        let mut fields = Fields::new(&path, "", read_object(&path)?);
        if let Some(TokenIds(ids)) = fields.optional("eos_token_id")? {
            return Ok(ids);
        }
    }
    Ok(Vec::new())
}

/// The settings of `generation_config.json` that change which token transformers takes next, also when it takes the
/// likeliest, and that [`generate`](crate::generate) does not apply: each as `key: value`.
///
/// # Errors
/// A file that is there and malformed.
pub fn unapplied_settings(dir: &Path) -> Result<Vec<String>, ConfigError> {
    /// Each with the value that changes nothing.
    const SETTINGS: [(&str, f64); 4] =
        [("repetition_penalty", 1.0), ("no_repeat_ngram_size", 0.0), ("min_length", 0.0), ("min_new_tokens", 0.0)];
    let path = dir.join("generation_config.json");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let mut fields = Fields::new(&path, "", read_object(&path)?);
    let mut found = Vec::new();
    for (key, neutral) in SETTINGS {
        let value = fields.or(key, neutral)?;
        if value != neutral {
            found.push(format!("{key}: {value}"));
        }
    }
    Ok(found)
}

pub(crate) fn read_object(path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse_object(&text, path)
}

fn parse_object(text: &str, path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let json = |reason: String| ConfigError::Json { path: path.to_owned(), reason };
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(json(format!("it holds {}", error::shown(&other)))),
        Err(error) => Err(json(error.to_string())),
    }
}

#[cfg(test)]
mod tests;
