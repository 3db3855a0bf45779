//! What loading a packed model takes, in a process of its own.
#![cfg(target_os = "linux")]

#[path = "common/large_model.rs"]
mod large_model;

use burn::tensor::Device;
use emberlora_model::{AttentionKind, CausalLm, FloatDtype, LoadOptions, QuantizationOptions};
use emberlora_quant::{BlockSize, QuantKind, Scheme};
use emberlora_train::peak_memory_bytes;
use large_model::{HIDDEN, INNER, write_model};

#[test]
fn packing_holds_no_more_than_one_dense_projection_beyond_the_packed_model() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path());
    let scheme = Scheme::new(QuantKind::Nf4, BlockSize::default(), true);
    let quantization = Some(QuantizationOptions::new(scheme, Vec::new(), 0.0));
    let options = LoadOptions { quantization, ..LoadOptions::new(None, FloatDtype::F32, AttentionKind::Fused) };

    let before = peak_memory_bytes().unwrap();
    let (_model, report) = CausalLm::load(dir.path(), &options, &Device::flex()).unwrap();
    let taken = peak_memory_bytes().unwrap() - before;
    let (packed, largest) = (report.packed_bytes as u64, (INNER * HIDDEN * 2) as u64);
    let dense = report.packed_parameters as u64 * 2;
    assert!(packed * 3 < dense);
    // Beside them the reader's buffer and what threads and the allocator keep.
    let other = 8 << 20;
    assert!(taken < packed + largest + other, "{taken} bytes for {packed} packed out of {dense}");
}
