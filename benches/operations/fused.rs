//! The projections of a block as it computes them: norm, gate and residual inside the product, one product for all
//! projections of an input.

use std::hint::black_box;

use burn::backend::Flex;
use burn::module::{Lora, Module};
use burn::nn::{Linear, LinearConfig, RmsNormConfig};
use burn::tensor::{Tensor, activation};
use emberlora::kernels::checkpoint::Values;
use emberlora::kernels::{Gate, Input, LinearBodies, Projection, Prologue, project, reference};

use crate::products::{adapted, projected};
use crate::support::{Gemm, random};
use crate::{Bench, Contest, HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, Products, RANK, backward, raw, seed};

const EPS: f32 = 1e-5;

pub fn measure(bench: &Bench) {
    let Bench { device, tokens, .. } = bench;
    let norm = RmsNormConfig::new(HIDDEN).init(device).no_grad();
    let input = Input::Normed { weight: Tensor::ones([HIDDEN], device), eps: EPS };
    let x = random([*tokens, HIDDEN], 1.0, device).require_grad();
    let normed = || norm.forward(x.clone());
    let (queries, keys) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    compare(bench, "norm, `q`, `k`, `v`", &x, &input, &[queries, keys, keys], None, &normed);
    compare(bench, "norm, `gate`, `up`", &x, &input, &[INTERMEDIATE, INTERMEDIATE], None, &normed);

    let x = random([*tokens, 2 * INTERMEDIATE], 1.0, device).require_grad();
    let leaf = || random([*tokens, INTERMEDIATE], 1.0, device).require_grad();
    let (gate, up) = (leaf(), leaf());
    let gated = || activation::silu(gate.clone()) * up.clone();
    let residual = random([*tokens, HIDDEN], 1.0, device).require_grad();
    compare(bench, "SwiGLU, `down`, residual", &x, &Input::Gated(Gate::Silu), &[HIDDEN], Some(&residual), &gated);
}

/// Adapted projections of what `input` makes of `x`, of these widths, against `apply_lora` on what `burn_input` gives.
fn compare(
    bench: &Bench,
    name: &str,
    x: &Tensor<2>,
    input: &Input,
    widths: &[usize],
    residual: Option<&Tensor<2>>,
    burn_input: &dyn Fn() -> Tensor<2>,
) {
    let name = format!("`project`: {name}, r {RANK}, against `apply_lora`");
    if !bench.wants(&name) {
        return;
    }
    let Bench { device, tokens, .. } = bench;
    let k = if let Input::Gated(_) = input { x.dims()[1] / 2 } else { x.dims()[1] };
    let projections: Vec<Projection> = widths.iter().map(|&n| adapted(k, n, bench)).collect();
    let layers: Vec<Linear> = widths
        .iter()
        .map(|&n| LinearConfig::new(k, n).with_bias(false).init(device).apply_lora(Lora::new(RANK, 32.0)))
        .collect();
    let gemm = Gemm::new(*tokens, widths.iter().sum(), k, device);
    let adapters: f64 = widths.iter().map(|n| 6.0 * (tokens * RANK * (k + n)) as f64).sum();
    macro_rules! body {
        ($forward:path, $backward:path) => {
            &mut || {
                let (x, projected) = (raw(x), projections.iter().map(projected).collect::<Vec<_>>());
                let y = $forward(x.clone(), prologue(input), projected.clone(), residual.map(raw));
                black_box($backward(seed(y), x, prologue(input), projected, true));
            }
        };
    }
    bench.compare(Contest {
        name: &name,
        products: Some(Products { flop: gemm.flop() + adapters, gemm: &gemm }),
        ours: &mut || backward(project(x.clone(), input.clone(), &projections, residual.cloned(), Values::Read)),
        burn: &mut || {
            let h = burn_input();
            let outputs = layers.iter().map(|layer| layer.forward(h.clone()));
            let outputs = outputs.map(|y| residual.map_or(y.clone(), |residual| y + residual.clone()).sum());
            black_box(outputs.reduce(|a, b| a + b).expect("at least one projection").backward());
        },
        body: body!(Flex::project_forward, Flex::project_backward),
        generic: body!(reference::linear::forward::<Flex>, reference::linear::backward::<Flex>),
    });
}

fn prologue(input: &Input) -> Prologue<Flex> {
    match input {
        Input::Plain => Prologue::Plain,
        Input::Normed { weight, eps } => Prologue::Normed { weight: raw(weight), eps: *eps },
        Input::Gated(gate) => Prologue::Gated(*gate),
    }
}
