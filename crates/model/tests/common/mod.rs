//! What the tests share: the tiny models beside the workspace's tests.
#![allow(dead_code)] // each test file uses its own part

pub mod directory;
pub mod packed;

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use emberlora_lora::Pass;
use emberlora_model::{AttentionKind, CausalLm, FloatDtype, Input, LoadOptions, LoadReport};
use safetensors::SafeTensors;

/// Every fixture that has logits.
pub const FIXTURES: &[&str] = &[
    "llama",
    "llama3",
    "llama_bias",
    "llama_dynamic",
    "llama_linear",
    "llama_yarn",
    "mistral",
    "olmo2",
    "phi3",
    "phi3_partial",
    "qwen2",
    "qwen2_window",
    "qwen3",
];

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

pub const OPTIONS: LoadOptions =
    LoadOptions { dtype: None, compute_dtype: FloatDtype::F32, attention: AttentionKind::Fused, quantization: None };

pub fn load(name: &str) -> CausalLm {
    load_dir(&fixture(name), &OPTIONS).0
}

pub fn load_dir(dir: &Path, options: &LoadOptions) -> (CausalLm, LoadReport) {
    CausalLm::load(dir, options, &Device::flex()).unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
}

/// `(ids [2, 24], logits [2, 24, 96])` as transformers computed them.
pub fn golden(name: &str) -> (Vec<u32>, Vec<f32>) {
    golden_tensor(&fixture(name), "logits")
}

/// The same of another directory, with the logits of this name.
pub fn golden_tensor(dir: &Path, name: &str) -> (Vec<u32>, Vec<f32>) {
    let bytes = std::fs::read(dir.join("goldens.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("input_ids").unwrap();
    let ids = ids.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as u32).collect();
    let logits = file.tensor(name).unwrap();
    (ids, logits.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

pub const ROWS: usize = 2;
pub const SEQ: usize = 24;
pub const VOCAB: usize = 96;

pub fn logits(model: &CausalLm, input: &Input) -> Vec<f32> {
    floats(model.logits(model.hidden(input, &Pass::eval()), &Pass::eval()))
}

pub fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

/// Both lists have the same length and differ by no more than `tolerance`.
#[track_caller]
pub fn assert_close(got: &[f32], want: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let worst =
        got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, |a: f32, b| if b >= a { b } else { a.max(b) });
    assert!(worst <= tolerance, "{what}: off by {worst}, allowed {tolerance}");
}
