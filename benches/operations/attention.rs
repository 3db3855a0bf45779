//! Attention over one document: time against Burn's, which its autodiff differentiates, and memory of both.

use std::hint::black_box;

use burn::backend::Flex;
use burn::backend::tensor::IntTensor;
use burn::module::Module;
use burn::nn::RotaryEncodingConfig;
use burn::tensor::module::attention as burn_attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Int, Tensor};
use clap::ValueEnum;
use emberlora::kernels::{
    AttentionKind, AttentionOps, AttentionOptions, HeadLayout, Norms, QkvBodies, QkvContext, RotaryTables, attention,
    qkv_attention, reference,
};

use crate::support::{in_a_child, mib, peak_bytes, random, reset_peak, resident_bytes};
use crate::{Bench, Contest, HEAD_DIM, HEADS, KV_HEADS, Products, backward, raw, seed};

const LENGTHS: [usize; 3] = [512, 1024, 4096];
const MEMORY_LENGTHS: [usize; 5] = [512, 1024, 2048, 4096, 8192];
/// Burn's keeps several score matrices: at 8192 tokens more than 20 GB.
const LONGEST_BURN: usize = 4096;

#[derive(Clone, Copy, ValueEnum)]
pub enum Contender {
    Emberlora,
    Burn,
}

impl Contender {
    fn name(self) -> &'static str {
        match self {
            Self::Emberlora => "emberlora",
            Self::Burn => "burn",
        }
    }
}

/// The inputs of one call.
struct Inputs {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    /// On the plain device: constants take no part in autodiff.
    spans: Tensor<3, Int>,
    options: AttentionOptions,
}

impl Inputs {
    fn new(seq: usize, device: &Device) -> Self {
        let tensor = |heads| random([1, seq, heads, HEAD_DIM], 1.0, device).require_grad();
        // One document: every column ends with it.
        let spans: Vec<i64> = (0..seq as i64).flat_map(|position| [seq as i64, position]).collect();
        let device = device.clone().without_autodiff();
        Self {
            q: tensor(HEADS),
            k: tensor(KV_HEADS),
            v: tensor(KV_HEADS),
            spans: Tensor::<1, Int>::from_ints(spans.as_slice(), &device).reshape([1, seq, 2]),
            options: AttentionOptions::new(1.0 / (HEAD_DIM as f32).sqrt(), None, AttentionKind::Fused),
        }
    }

    fn run(&self, contender: Contender) {
        match contender {
            Contender::Emberlora => {
                let Self { q, k, v, spans, options } = self;
                backward(attention(q.clone(), k.clone(), v.clone(), spans.clone(), *options));
            }
            Contender::Burn => {
                let options = AttentionModuleOptions { scale: None, softcap: None, is_causal: true };
                let q = self.q.clone().swap_dims(1, 2);
                backward(burn_attention(q, repeated(&self.k), repeated(&self.v), None, None, options));
            }
        }
    }

    /// The operation alone, without a graph: one of the bodies.
    fn body(&self, generic: bool) {
        let Self { q, k, v, spans, options } = self;
        let (q, k, v, options) = (raw(q), raw(k), raw(v), *options);
        let spans: IntTensor<Flex> = spans.clone().try_into_primitive::<Flex>().expect("a tensor of flex");
        let forward = if generic { reference::attention::forward::<Flex> } else { Flex::packed_attention_with_lse };
        let backward = if generic { reference::attention::backward::<Flex> } else { Flex::packed_attention_backward };
        let (out, lse) = forward(q.clone(), k.clone(), v.clone(), spans.clone(), options);
        let grad = seed(out.clone());
        black_box(backward(grad, q, k, v, out, lse, spans, options));
    }
}

/// Keys or values once per query head, which Burn's attention needs.
fn repeated(t: &Tensor<4>) -> Tensor<4> {
    let [batch, seq, kv_heads, dim] = t.dims();
    let group = HEADS / kv_heads;
    t.clone()
        .swap_dims(1, 2)
        .reshape([batch, kv_heads, 1, seq, dim])
        .expand([batch, kv_heads, group, seq, dim])
        .reshape([batch, HEADS, seq, dim])
}

pub fn measure(bench: &Bench, longest: usize) {
    for seq in LENGTHS.into_iter().filter(|&seq| seq <= longest) {
        let name = format!("`attention`, {seq} tokens, {HEADS} heads over {KV_HEADS}");
        if !bench.wants(&name) {
            continue;
        }
        let inputs = Inputs::new(seq, &bench.device);
        bench.compare(Contest {
            name: &name,
            products: Some(Products { flop: flop(seq), gemm: &bench.gemm }),
            ours: &mut || inputs.run(Contender::Emberlora),
            burn: &mut || inputs.run(Contender::Burn),
            body: &mut || inputs.body(false),
            generic: &mut || inputs.body(true),
        });
    }
}

/// Attention as a block computes it, with the rotary embedding inside, on queries, keys and values side by side. Its
/// default body is composed of flex's own attention and rotation.
pub fn fused(bench: &Bench) {
    let Bench { device, tokens, .. } = bench;
    let name = format!("`qkv_attention` with `rope`, {tokens} tokens");
    if !bench.wants(&name) {
        return;
    }
    let layout = HeadLayout::new(HEADS, KV_HEADS, HEAD_DIM);
    let qkv = random([1, *tokens, layout.width()], 1.0, device).require_grad();
    let inputs = Inputs::new(*tokens, device);
    let angles = random([1, *tokens, HEAD_DIM / 2], 1.0, &device.clone().without_autodiff());
    let tables = (angles.clone().cos(), angles.sin());
    let rotary = RotaryEncodingConfig::new(*tokens, HEAD_DIM).init(device).no_grad();
    let context = QkvContext {
        norms: Norms::Absent,
        tables: RotaryTables { cos: raw(&tables.0), sin: raw(&tables.1) },
        spans: inputs.spans.clone().try_into_primitive::<Flex>().expect("a tensor of flex"),
        layout,
        options: inputs.options,
    };
    macro_rules! body {
        ($forward:path, $backward:path) => {
            &mut || {
                let qkv = raw(&qkv);
                let (out, lse) = $forward(qkv.clone(), &context);
                black_box($backward(seed(out.clone()), qkv, out, lse, &context));
            }
        };
    }
    bench.compare(Contest {
        name: &name,
        products: Some(Products { flop: flop(*tokens), gemm: &bench.gemm }),
        ours: &mut || {
            let spans = inputs.spans.clone();
            backward(qkv_attention(qkv.clone(), None, tables.clone(), spans, layout, inputs.options));
        },
        burn: &mut || {
            let options = AttentionModuleOptions { scale: None, softcap: None, is_causal: true };
            let heads = |t: &Tensor<4>| t.clone().swap_dims(1, 2);
            let (q, k) = (rotary.forward(heads(&inputs.q)), rotary.forward(heads(&inputs.k)));
            let k = repeated(&k.swap_dims(1, 2));
            backward(burn_attention(q, k, repeated(&inputs.v), None, None, options));
        },
        body: body!(Flex::qkv_forward, Flex::qkv_backward),
        generic: body!(reference::qkv::forward::<Flex>, reference::qkv::backward::<Flex>),
    });
}

/// Floating-point operations of one document's attention: Q Kᵀ and P V; in backward Q Kᵀ again, dP, dQ, dK and dV; each
/// over the pairs that causality leaves.
fn flop(seq: usize) -> f64 {
    7.0 * 2.0 * (HEADS * HEAD_DIM) as f64 * (seq * (seq + 1) / 2) as f64
}

/// The bytes that one forward and backward pass adds to the process at its peak, the gradients included.
pub fn peak(contender: Contender, seq: usize, device: &Device) -> u64 {
    // Starts the threads, and whatever else happens once.
    Inputs::new(64, device).run(contender);
    let inputs = Inputs::new(seq, device);
    reset_peak();
    let before = resident_bytes();
    inputs.run(contender);
    peak_bytes() - before
}

/// The table of peak memory: ours must be linear in the number of tokens.
pub fn memory(bench: &Bench, longest: usize) {
    let name = "memory of `attention`";
    if !bench.wants(name) {
        return;
    }
    println!("\n| {name}, forward + backward | emberlora (MiB) | per token (KiB) | Burn (MiB) | ratio |");
    println!("|---|---|---|---|---|");
    let measured = |contender: Contender, seq: usize| -> u64 {
        let arguments = ["--memory-of", &seq.to_string(), "--contender", contender.name()].map(str::to_owned);
        in_a_child(&arguments).trim().parse().expect("a number of bytes")
    };
    for seq in MEMORY_LENGTHS.into_iter().filter(|&seq| seq <= longest) {
        let ours = measured(Contender::Emberlora, seq);
        let burn = (seq <= LONGEST_BURN).then(|| measured(Contender::Burn, seq));
        let (burn, ratio) = burn.map_or(("–".to_owned(), "–".to_owned()), |burn| {
            (format!("{:.0}", mib(burn)), format!("{:.3}", ours as f64 / burn as f64))
        });
        let per_token = ours as f64 / seq as f64 / 1024.0;
        println!("| {seq} tokens | {:.1} | {per_token:.1} | {burn} | {ratio} |", mib(ours));
    }
}
