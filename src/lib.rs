//! LoRA fine-tuning of language models in pure Rust, on [Burn](https://burn.dev).
//!
//! This crate gathers the others under one name. They form one path:
//!
//! * [`config`]: a run as data, read from a recipe and checked as a whole
//! * [`data`]: rows of text to packed batches of tokens with their labels
//! * [`quant`]: how frozen weights are stored
//! * [`kernels`]: the differentiable operations, as Burn backend extensions
//! * [`lora`]: [`lora::LoraLinear`], which projections get an adapter, and the PEFT format
//! * [`model`]: causal language models read from a Hugging Face directory
//! * [`train`]: the step, the loop, evaluation, and what a run writes
//! * [`cli`]: the `emberlora` command
//!
//! A trainer of one's own needs [`lora`] alone: `examples/custom_trainer.rs` wraps the linear layers of a Burn module
//! and trains them in a hand-written loop.

pub use emberlora_cli as cli;
pub use emberlora_config as config;
pub use emberlora_data as data;
pub use emberlora_kernels as kernels;
pub use emberlora_lora as lora;
pub use emberlora_model as model;
pub use emberlora_quant as quant;
pub use emberlora_train as train;
