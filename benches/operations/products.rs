//! Products with frozen weights: projections with and without an adapter, and the head with its loss.

use std::hint::black_box;

use burn::backend::Flex;
use burn::backend::tensor::IntTensor;
use burn::module::{Lora, Module};
use burn::nn::LinearConfig;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::tensor::{DType, Int, Tensor};
use emberlora::kernels::checkpoint::Values;
use emberlora::kernels::{
    AdapterPath, CrossEntropyBodies, Input, LinearBodies, LowRank, Optional, Projected, Projection, ProjectionAdapter,
    Prologue, Weight, frozen_linear, linear_cross_entropy, project, reference,
};

use crate::support::{Gemm, alternate, random};
use crate::{Bench, Contest, HIDDEN, INTERMEDIATE, Products, RANK, VOCABULARY, backward, raw, seed};

/// (in, out) of the gate projection and of the one that goes back.
const PROJECTIONS: [(usize, usize); 2] = [(HIDDEN, INTERMEDIATE), (INTERMEDIATE, HIDDEN)];
const SCALE: f32 = 2.0;
/// Rows of logits at one time, about as many as the operation itself chooses.
const CHUNK: usize = 256;

/// A random projection with an adapter.
pub fn adapted(k: usize, n: usize, bench: &Bench) -> Projection {
    let random = |shape| random(shape, 0.05, &bench.device);
    let (a, b) = (random([RANK, k]).require_grad(), random([n, RANK]).require_grad());
    let adapter = ProjectionAdapter { a, b, path: AdapterPath::new(SCALE, None) };
    Projection { weight: random([n, k]).into(), bias: None, adapter: Some(adapter) }
}

/// A projection as bodies take it.
pub fn projected(projection: &Projection) -> Projected<Flex> {
    let (adapter, path) = match &projection.adapter {
        Some(ProjectionAdapter { a, b, path }) => (LowRank::Present { a: raw(a), b: raw(b) }, *path),
        None => (LowRank::Absent, AdapterPath::new(1.0, None)),
    };
    Projected { weight: Weight::Dense(raw(&projection.weight.dequantise())), bias: Optional::Absent, adapter, path }
}

/// Forward and backward of one projection through a pair of bodies.
macro_rules! body {
    ($forward:path, $backward:path, $x:expr, $projection:expr) => {
        &mut || {
            let (x, projected) = (raw($x), vec![projected($projection)]);
            let y = $forward(x.clone(), Prologue::Plain, projected.clone(), None);
            black_box($backward(seed(y), x, Prologue::Plain, projected, true));
        }
    };
}

pub fn measure(bench: &Bench) {
    for (k, n) in PROJECTIONS {
        frozen(bench, k, n);
        lora(bench, k, n);
    }
    for rows in [bench.tokens / 4, bench.tokens] {
        head(bench, rows);
    }
}

fn frozen(bench: &Bench, k: usize, n: usize) {
    let name = format!("`frozen_linear` {k} → {n}, against `nn::Linear`");
    if !bench.wants(&name) {
        return;
    }
    let Bench { device, tokens, .. } = bench;
    let x = random([*tokens, k], 1.0, device).require_grad();
    let weight = random([n, k], 0.05, device);
    let frozen = Projection { weight: weight.clone().into(), bias: None, adapter: None };
    let burn = LinearConfig::new(k, n).with_bias(false).init(device).no_grad();
    let gemm = Gemm::new(*tokens, n, k, device);
    bench.compare(Contest {
        name: &name,
        products: Some(Products { flop: gemm.flop(), gemm: &gemm }),
        ours: &mut || backward(frozen_linear(x.clone(), weight.clone())),
        burn: &mut || backward(burn.forward(x.clone())),
        body: body!(Flex::project_forward, Flex::project_backward, &x, &frozen),
        generic: body!(reference::linear::forward::<Flex>, reference::linear::backward::<Flex>, &x, &frozen),
    });
}

fn lora(bench: &Bench, k: usize, n: usize) {
    let name = format!("`project` {k} → {n}, r {RANK}, against `apply_lora`");
    if !bench.wants(&name) {
        return;
    }
    let Bench { device, tokens, .. } = bench;
    let x = random([*tokens, k], 1.0, device).require_grad();
    let projection = adapted(k, n, bench);
    let burn = LinearConfig::new(k, n).with_bias(false).init(device).apply_lora(Lora::new(RANK, 32.0));
    let gemm = Gemm::new(*tokens, n, k, device);
    // Forward: x Aᵀ and its product with Bᵀ. Backward: dy B, dA, dB and the part of dx that goes through the adapter.
    let adapter = 6.0 * (tokens * RANK * (k + n)) as f64;
    bench.compare(Contest {
        name: &name,
        products: Some(Products { flop: gemm.flop() + adapter, gemm: &gemm }),
        ours: &mut || backward(project(x.clone(), Input::Plain, std::slice::from_ref(&projection), None, Values::Read)),
        burn: &mut || backward(burn.forward(x.clone())),
        body: body!(Flex::project_forward, Flex::project_backward, &x, &projection),
        generic: body!(reference::linear::forward::<Flex>, reference::linear::backward::<Flex>, &x, &projection),
    });
}

fn head(bench: &Bench, rows: usize) {
    let name = format!("`linear_cross_entropy`, {rows} rows");
    if !bench.wants(&name) {
        return;
    }
    let device = &bench.device;
    let hidden = random([rows, HIDDEN], 1.0, device).require_grad();
    let head = random([VOCABULARY, HIDDEN], 0.05, device);
    let tracked = Tensor::<1, Int>::arange(0..rows as i64, device);
    let targets = tracked.clone().inner();
    let weights = Tensor::<1>::ones([rows], device) / rows as f32;
    let burn = CrossEntropyLossConfig::new().init(device);
    let gemm = Gemm::new(rows, VOCABULARY, HIDDEN, device);
    let ids = || -> IntTensor<Flex> { targets.clone().try_into_primitive::<Flex>().expect("a tensor of flex") };
    bench.compare(Contest {
        name: &name,
        products: Some(Products { flop: gemm.flop(), gemm: &gemm }),
        ours: &mut || {
            backward(linear_cross_entropy(hidden.clone(), head.clone(), tracked.clone(), weights.clone()));
        },
        burn: &mut || backward(burn.forward(hidden.clone().matmul(head.clone().transpose()), tracked.clone())),
        body: &mut || {
            black_box(Flex::head_loss(raw(&hidden), Weight::Dense(raw(&head)), ids(), raw(&weights), true, CHUNK));
        },
        generic: &mut || {
            let (hidden, head, weights) = (raw(&hidden), Weight::Dense(raw(&head)), raw(&weights));
            black_box(reference::cross_entropy::head_loss::<Flex>(hidden, head, ids(), weights, true, rows));
        },
    });
}

/// What it costs to keep the frozen weight in half the memory.
pub fn formats(bench: &Bench) {
    let name = "`frozen_linear` by format of the weight";
    if !bench.wants(name) {
        return;
    }
    println!("\n| {name}, forward + backward | f32 (ms) | bf16 (ms) | f16 (ms) | bf16 / f32 | f16 / f32 |");
    println!("|---|---|---|---|---|---|");
    let Bench { device, tokens, .. } = bench;
    for (k, n) in PROJECTIONS {
        let x = random([*tokens, k], 1.0, device).require_grad();
        let weight = random([n, k], 0.05, device);
        let (bf16, f16) = (weight.clone().cast(DType::BF16), weight.clone().cast(DType::F16));
        let run = |weight: &Tensor<2>| backward(frozen_linear(x.clone(), weight.clone()));
        let [f32, bf16, f16] = alternate(bench.rounds, [&mut || run(&weight), &mut || run(&bf16), &mut || run(&f16)]);
        println!(
            "| {tokens} × {k} → {n} | {:.2} | {:.2} | {:.2} | {:.2} | {:.2} |",
            f32 * 1e3,
            bf16 * 1e3,
            f16 * 1e3,
            bf16 / f32,
            f16 / f32,
        );
    }
}

/// What multiplying with a frozen weight costs whatever the number of rows: packing it into the order of the inner loop, and
/// starting. It is the intercept of a line through the times, and the most that could be saved by packing a weight once and
/// keeping it beside the original.
pub fn packing(bench: &Bench) {
    const ROWS: [usize; 4] = [128, 256, 512, 1024];
    let name = "`frozen_linear` by rows";
    if !bench.wants(name) {
        return;
    }
    let rows = ROWS.map(|rows| rows.to_string()).join(" | ");
    println!("\n| {name}, weight in bf16, forward (ms) | {rows} | whatever the rows | of 256 | of 1024 |");
    println!("|---|---|---|---|---|---|---|---|");
    for (k, n) in PROJECTIONS {
        let weight = raw(&random([n, k], 0.05, &bench.device).cast(DType::BF16));
        let x = ROWS.map(|rows| raw(&random([rows, k], 1.0, &bench.device)));
        let run = |i: usize| {
            let (weight, path) = (Weight::Dense(weight.clone()), AdapterPath::new(1.0, None));
            let frozen = Projected { weight, bias: Optional::Absent, adapter: LowRank::Absent, path };
            black_box(Flex::project_forward(x[i].clone(), Prologue::Plain, vec![frozen], None));
        };
        let seconds = alternate(bench.rounds, [&mut || run(0), &mut || run(1), &mut || run(2), &mut || run(3)]);
        let fixed = intercept(ROWS.map(|rows| rows as f64), seconds);
        let times = seconds.map(|seconds| format!("{:.2}", seconds * 1e3)).join(" | ");
        let share = |i: usize| 100.0 * fixed / seconds[i];
        println!("| {k} → {n} | {times} | {:.2} | {:.0}% | {:.0}% |", fixed * 1e3, share(1), share(3));
    }
}

/// Where the line that fits the points best crosses x = 0.
fn intercept<const N: usize>(x: [f64; N], y: [f64; N]) -> f64 {
    let mean = |values: &[f64; N]| values.iter().sum::<f64>() / N as f64;
    let (mean_x, mean_y) = (mean(&x), mean(&y));
    let slope = x.iter().zip(&y).map(|(x, y)| (x - mean_x) * (y - mean_y)).sum::<f64>()
        / x.iter().map(|x| (x - mean_x).powi(2)).sum::<f64>();
    mean_y - slope * mean_x
}
