//! Each operation of a LoRA step, forward and backward, against the same written with Burn's own parts.
//!
//! `cargo bench --bench operations` prints a Markdown table: medians of alternating runs and their ratio. The shapes are
//! those of a SmolLM2-135M layer at 512 tokens.

use std::hint::black_box;
use std::time::Instant;

use burn::module::{Lora, Module};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{LinearConfig, RmsNormConfig};
use burn::tensor::module::attention as burn_attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Distribution, Int, Tensor, activation};
use emberlora::kernels::{
    AttentionKind, AttentionOptions, attention, linear_cross_entropy, lora_linear, rms_norm, swiglu,
};

const RUNS: usize = 15;
const TOKENS: usize = 512;
const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const VOCABULARY: usize = 49_152;

fn main() {
    let device = Device::flex().autodiff();
    device.seed(0);
    println!("GEMM 512 × 1536 × 1536: {:.0} GFLOP/s\n", gemm_rate(&device));
    println!("| operation, forward + backward | emberlora (ms) | Burn (ms) | ratio |");
    println!("|---|---|---|---|");
    lora(&device);
    attend(&device, TOKENS);
    attend(&device, 2048);
    norm(&device);
    gate(&device);
    head(&device);
}

fn random<const D: usize>(shape: [usize; D], std: f64, device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, std), device)
}

fn milliseconds(f: &mut dyn FnMut()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64() * 1e3
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Runs both in turn, so that a change of the machine's speed meets both alike.
fn compare(name: &str, ours: &mut dyn FnMut(), theirs: &mut dyn FnMut()) {
    ours();
    theirs();
    let (a, b): (Vec<f64>, Vec<f64>) = (0..RUNS).map(|_| (milliseconds(ours), milliseconds(theirs))).unzip();
    let (a, b) = (median(a), median(b));
    println!("| {name} | {a:.2} | {b:.2} | {:.2} × |", b / a);
}

fn gemm_rate(device: &Device) -> f64 {
    let (a, b) = (
        random([TOKENS, INTERMEDIATE], 1.0, device).inner(),
        random([INTERMEDIATE, INTERMEDIATE], 1.0, device).inner(),
    );
    let times = (0..RUNS).map(|_| milliseconds(&mut || drop(black_box(a.clone().matmul(b.clone()))))).collect();
    2.0 * (TOKENS * INTERMEDIATE * INTERMEDIATE) as f64 / median(times) / 1e6
}

/// Backward from a sum, the same work for both contenders.
fn backward<const D: usize>(y: Tensor<D>) {
    black_box(y.sum().backward());
}

fn lora(device: &Device) {
    let x = random([TOKENS, HIDDEN], 1.0, device).require_grad();
    let w = random([INTERMEDIATE, HIDDEN], 0.05, device);
    let (a, b) =
        (random([16, HIDDEN], 0.05, device).require_grad(), random([INTERMEDIATE, 16], 0.05, device).require_grad());
    let burn = LinearConfig::new(HIDDEN, INTERMEDIATE).with_bias(false).init(device).apply_lora(Lora::new(16, 32.0));
    compare(
        "`lora_linear` r 16, against `apply_lora`",
        &mut || backward(lora_linear(x.clone(), w.clone(), a.clone(), b.clone(), 2.0, None)),
        &mut || backward(burn.forward(x.clone())),
    );
}

fn attend(device: &Device, seq: usize) {
    let tensor = |heads| random([1, seq, heads, 64], 1.0, device).require_grad();
    let (q, k, v) = (tensor(9), tensor(3), tensor(3));
    // One document: every column ends with it.
    let spans: Vec<i64> = (0..seq as i64).flat_map(|position| [seq as i64, position]).collect();
    let spans = Tensor::<1, Int>::from_ints(spans.as_slice(), device).reshape([1, seq, 2]);
    let options = AttentionOptions::new(0.125, None, AttentionKind::Fused);
    compare(
        &format!("`attention`, {seq} tokens, 9 heads over 3"),
        &mut || backward(attention(q.clone(), k.clone(), v.clone(), spans.clone(), options)),
        &mut || {
            let heads = |t: &Tensor<4>| t.clone().swap_dims(1, 2);
            let repeat = |t: &Tensor<4>| {
                heads(t)
                    .reshape([1, 3, 1, seq, 64].map(|d| d as i32))
                    .expand([1, 3, 3, seq, 64])
                    .reshape([1, 9, seq, 64])
            };
            let options = AttentionModuleOptions { scale: None, softcap: None, is_causal: true };
            backward(burn_attention(heads(&q), repeat(&k), repeat(&v), None, None, options));
        },
    );
}

fn norm(device: &Device) {
    let x = random([TOKENS, HIDDEN], 1.0, device).require_grad();
    let weight = Tensor::<1>::ones([HIDDEN], device);
    let burn = RmsNormConfig::new(HIDDEN).init(device).no_grad();
    compare("`rms_norm`", &mut || backward(rms_norm(x.clone(), weight.clone(), 1e-5)), &mut || {
        backward(burn.forward(x.clone()))
    });
}

fn gate(device: &Device) {
    let tensor = || random([TOKENS, INTERMEDIATE], 1.0, device).require_grad();
    let (gate, up) = (tensor(), tensor());
    compare("`swiglu`", &mut || backward(swiglu(gate.clone(), up.clone())), &mut || {
        backward(activation::silu(gate.clone()) * up.clone())
    });
}

fn head(device: &Device) {
    let rows = 128;
    let hidden = random([rows, HIDDEN], 1.0, device).require_grad();
    let head = random([VOCABULARY, HIDDEN], 0.05, device);
    let targets = Tensor::<1, Int>::arange(0..rows as i64, device);
    let weights = Tensor::<1>::ones([rows], device) / rows as f32;
    let burn = CrossEntropyLossConfig::new().init(device);
    compare(
        "`linear_cross_entropy`, 128 rows",
        &mut || backward(linear_cross_entropy(hidden.clone(), head.clone(), targets.clone(), weights.clone())),
        &mut || backward(burn.forward(hidden.clone().matmul(head.clone().transpose()), targets.clone())),
    );
}
