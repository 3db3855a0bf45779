//! Models whose projections are packed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use emberlora_kernels::PackedTensor;
use emberlora_lora::Projections;
use emberlora_model::{CausalLm, LoadError, LoadOptions, QuantizationOptions};
use emberlora_quant::{BlockSize, QuantKind, Scheme};

use super::{OPTIONS, fixture};

pub fn scheme(kind: QuantKind, double_quant: bool) -> Scheme {
    Scheme::new(kind, BlockSize::default(), double_quant)
}

/// What transformers and bitsandbytes saved.
pub const QUANTISED: [(&str, QuantKind, bool); 3] = [
    ("llama_nf4_double", QuantKind::Nf4, true),
    ("llama_fp4", QuantKind::Fp4, false),
    ("llama_int8", QuantKind::Int8, false),
];

pub fn packing(scheme: Scheme, skip: &[&str]) -> LoadOptions {
    let skip = skip.iter().map(|&name| name.to_owned()).collect();
    LoadOptions { quantization: Some(QuantizationOptions::new(scheme, skip, 0.0)), ..OPTIONS }
}

/// nf4, double quantised, everything but the head.
pub fn nf4() -> LoadOptions {
    packing(scheme(QuantKind::Nf4, true), &["lm_head"])
}

pub fn with_threshold(threshold: f32) -> LoadOptions {
    let skip = vec!["lm_head".to_owned()];
    LoadOptions { quantization: Some(QuantizationOptions::new(Scheme::Int8, skip, threshold)), ..OPTIONS }
}

pub fn quantised(name: &str) -> PathBuf {
    fixture("quant").join(name)
}

/// Every part of every packed projection, by its name.
pub fn packed(model: &CausalLm) -> BTreeMap<String, Vec<Vec<u8>>> {
    let mut all = BTreeMap::new();
    model.projections(&mut |name, linear| {
        if let Some(PackedTensor { codes, scale_codes, scales, .. }) = linear.weight.as_packed() {
            let parts = [Some(codes.into_data()), scale_codes.map(|codes| codes.into_data()), Some(scales.into_data())];
            let parts = parts.into_iter().flatten().map(|data| data.as_bytes().to_vec());
            all.insert(name.to_owned(), parts.collect());
        }
    });
    all
}

pub fn refused(dir: &Path, options: &LoadOptions) -> (LoadError, String) {
    let error = CausalLm::load(dir, options, &Device::flex()).unwrap_err();
    let text = error.to_string();
    (error, text)
}
