//! Decoder-only language models read from Hugging Face directories, with a place for adapters in every projection.
//!
//! ```text
//! hub id or directory ─▶ hub ─▶ config.json ─▶ ModelConfig ─┐
//!                               *.safetensors ─▶ weights ───┴─▶ CausalLm ─▶ hidden ─▶ loss | logits ─▶ generate
//! ```
//!
//! * [`hub`] turns what a user wrote into a directory, downloading what is needed and no more;
//! * [`ModelConfig`] is `config.json` of any supported family with every choice made;
//! * [`CausalLm::load`] maps or packs the weights and checks their names in both directions;
//! * [`CausalLm`] computes: hidden states, the loss of labelled positions, logits;
//! * [`generate`] streams tokens with a cache of keys and values;
//! * [`hash_files`] says which files a model was.
//!
//! This crate knows no recipe, no text and no optimizer.

mod attention;
mod block;
mod cache;
mod causal_lm;
mod checkpointing;
pub mod config;
pub mod generate;
mod hash;
pub mod hub;
mod input;
mod labelled;
mod mlp;
pub mod rope;
mod weights;

pub use cache::KvCache;
pub use causal_lm::CausalLm;
pub use checkpointing::Checkpointing;
pub use config::{ConfigError, Family, ModelConfig, NormPlacement, QkNorm, stop_tokens, unapplied_settings};
pub use emberlora_kernels::AttentionKind;
pub use emberlora_quant::FloatDtype;
pub use hash::hash_files;
pub use input::{Input, InputError};
pub use labelled::{Labelled, Labels, Uploader};
pub use weights::export;
pub use weights::{DecidedBy, LoadError, LoadOptions, LoadReport, Mismatch, Misshaped, QuantizationOptions};
