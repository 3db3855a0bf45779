//! What writing quantised and merged models takes, in a process of its own.
#![cfg(target_os = "linux")]

#[path = "common/large_model.rs"]
mod large_model;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use emberlora_model::export::{ExportReport, MergeOptions, merge, quantise};
use emberlora_model::{FloatDtype, QuantizationOptions};
use emberlora_quant::{BlockSize, QuantKind, Scheme};
use emberlora_train::peak_memory_bytes;
use large_model::{HIDDEN, INNER, LAYERS, write_model};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize};
use serde_json::json;

/// An adapter for every `down_proj`.
fn write_adapter(dir: &Path) {
    const RANK: usize = 2;
    let numbers: Vec<u8> = (0..RANK * INNER).flat_map(|i| ((i % 7) as f32 * 0.01).to_le_bytes()).collect();
    let view =
        |shape: [usize; 2]| TensorView::new(Dtype::F32, shape.to_vec(), &numbers[..shape[0] * shape[1] * 4]).unwrap();
    let mut tensors = BTreeMap::new();
    for layer in 0..LAYERS {
        let name = |factor: &str| format!("base_model.model.model.layers.{layer}.mlp.down_proj.lora_{factor}.weight");
        tensors.insert(name("A"), view([RANK, INNER]));
        tensors.insert(name("B"), view([HIDDEN, RANK]));
    }
    fs::create_dir(dir).unwrap();
    fs::write(dir.join("adapter_model.safetensors"), serialize(tensors, None).unwrap()).unwrap();
    let config = json!({"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["down_proj"]});
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
}

#[test]
fn no_more_than_one_projection_is_in_memory_while_models_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let [model, adapter, packed] = ["model", "adapter", "packed"].map(|name| dir.path().join(name));
    fs::create_dir(&model).unwrap();
    write_model(&model);
    write_adapter(&adapter);
    let scheme = Scheme::new(QuantKind::Nf4, BlockSize::default(), true);
    let options = QuantizationOptions::new(scheme, vec!["lm_head".to_owned()], 6.0);

    let before = peak_memory_bytes().unwrap();
    let check = |what: &str, report: ExportReport| {
        let taken = peak_memory_bytes().unwrap() - before;
        // The largest projection is 8 MB in bf16, and 16 MB in f32; the model is ten times that.
        assert!(report.bytes_read.max(report.bytes_written) > 90 << 20, "{report:?}");
        assert!(taken < 24 << 20, "{what}: {taken} bytes");
    };
    check("quantise", quantise(&model, &packed, &options, FloatDtype::F32, &mut ()).unwrap());
    for (what, base, quantization) in
        [("from dense", &model, None), ("from packed", &packed, None), ("while packing", &model, Some(options))]
    {
        let out = dir.path().join(what);
        let options = MergeOptions::new(quantization, Some(FloatDtype::Bf16));
        check(what, merge(base, &adapter, &out, &options, &mut ()).unwrap());
    }
}
