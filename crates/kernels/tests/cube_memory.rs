//! What attention and the loss hold on CubeCL's runtimes: blocks of scores and chunks of logits, whatever the length.
//!
//! One test, in a process of its own: a device counts the memory of all that runs on it.
#![cfg(feature = "wgpu")]

mod support;

use burn::tensor::{Device, DeviceKind, Tensor};
use emberlora_kernels::{AttentionKind, AttentionOptions, attention, linear_cross_entropy};
use support::forest::Forest;
use support::*;

/// The largest tensor that the device has held so far, in bytes.
fn largest(device: &Device) -> u64 {
    device.sync().unwrap();
    let pools = device.memory_pool_report().expect("CubeCL's runtimes report");
    pools.iter().map(|pool| pool.largest_alloc).max().expect("something was allocated")
}

#[test]
fn no_matrix_of_all_scores_and_none_of_all_logits_exists() {
    let device = Device::wgpu(DeviceKind::DefaultDevice).autodiff();
    let bytes = |elements: usize| (elements * size_of::<f32>()) as u64;

    let (seq, heads, dim) = (2048, 2, 4);
    let tensor = || normal([1, seq, heads, dim], 1.0, &device).require_grad();
    let (q, k, v) = (tensor(), tensor(), tensor());
    let spans = ints(&Forest::chain(seq).spans(), [1, seq, 2], &device);
    let out = attention(q.clone(), k, v, spans, AttentionOptions::new(0.5, None, AttentionKind::Fused));
    let grads = out.sum().backward();
    assert!(values(&q.grad(&grads).unwrap()).iter().all(|gradient| gradient.is_finite()));
    let (found, all) = (largest(&device), bytes(heads * seq * seq));
    assert!(found <= all / 2, "a tensor of {found} bytes; all scores are {all}");

    let (rows, columns, vocabulary) = (256, 4, 100_000);
    let hidden = normal([rows, columns], 1.0, &device).require_grad();
    let head = normal([vocabulary, columns], 0.1, &device.clone().without_autodiff());
    let targets = ints(&vec![7; rows], [rows], &device);
    let loss = linear_cross_entropy(hidden.clone(), head, targets, Tensor::ones([rows], &device));
    let grads = loss.backward();
    assert!(values(&hidden.grad(&grads).unwrap()).iter().all(|gradient| gradient.is_finite()));
    let (found, all) = (largest(&device), bytes(rows * vocabulary));
    assert!(found <= all / 2, "a tensor of {found} bytes; all logits are {all}");
}
