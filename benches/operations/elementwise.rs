//! Operations whose time goes into memory traffic.

use std::hint::black_box;

use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;
use burn::module::Module;
use burn::nn::{RmsNormConfig, RotaryEncodingConfig};
use burn::tensor::{Tensor, activation};
use emberlora::kernels::{Gate, GluOps, NormOps, RopeOps, glu, reference, rms_norm, rope};

use crate::support::random;
use crate::{Bench, Contest, HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, backward, raw, seed};

const EPS: f32 = 1e-5;

pub fn measure(bench: &Bench) {
    norm(bench);
    rotate(bench);
    gate(bench, "`swiglu`", Gate::Silu, activation::silu);
    gate(bench, "`geglu`", Gate::Gelu, activation::gelu);
}

fn norm(bench: &Bench) {
    let name = "`rms_norm`, against `nn::RmsNorm`";
    if !bench.wants(name) {
        return;
    }
    let Bench { device, tokens, .. } = bench;
    let x = random([*tokens, HIDDEN], 1.0, device).require_grad();
    let weight = Tensor::<1>::ones([HIDDEN], device);
    let burn = RmsNormConfig::new(HIDDEN).init(device).no_grad();
    macro_rules! body {
        ($forward:path, $backward:path) => {
            &mut || {
                let (x, w) = (raw(&x), raw(&weight));
                let (y, factor) = $forward(x.clone(), w.clone(), EPS);
                black_box($backward(seed(y), x, w, factor));
            }
        };
    }
    bench.compare(Contest {
        name,
        products: None,
        ours: &mut || backward(rms_norm(x.clone(), weight.clone(), EPS)),
        burn: &mut || backward(burn.forward(x.clone())),
        body: body!(Flex::rms_norm_with_factor, Flex::rms_norm_backward),
        generic: body!(reference::norm::forward::<Flex>, reference::norm::backward::<Flex>),
    });
}

fn rotate(bench: &Bench) {
    let name = "`rope`, against `nn::RotaryEncoding`";
    if !bench.wants(name) {
        return;
    }
    let Bench { device, tokens, .. } = bench;
    let x = random([1, *tokens, HEADS, HEAD_DIM], 1.0, device).require_grad();
    let angles = random([1, *tokens, HEAD_DIM / 2], 1.0, device);
    let (cos, sin) = (angles.clone().cos(), angles.sin());
    // Burn's has the heads before the tokens.
    let by_head = x.clone().inner().swap_dims(1, 2).autodiff().require_grad();
    let burn = RotaryEncodingConfig::new(*tokens, HEAD_DIM).init(device).no_grad();
    macro_rules! body {
        ($rope:path) => {
            &mut || {
                let (cos, sin) = (raw(&cos), raw(&sin));
                let y = $rope(raw(&x), cos.clone(), sin.clone());
                black_box($rope(seed(y), cos, Flex::float_neg(sin)));
            }
        };
    }
    bench.compare(Contest {
        name,
        products: None,
        ours: &mut || backward(rope(x.clone(), cos.clone(), sin.clone())),
        burn: &mut || backward(burn.forward(by_head.clone())),
        body: body!(Flex::rope),
        generic: body!(reference::rope::rope::<Flex>),
    });
}

fn gate(bench: &Bench, name: &str, kind: Gate, burn: fn(Tensor<2>) -> Tensor<2>) {
    if !bench.wants(name) {
        return;
    }
    let tensor = || random([bench.tokens, INTERMEDIATE], 1.0, &bench.device).require_grad();
    let (gate, up) = (tensor(), tensor());
    macro_rules! body {
        ($forward:path, $backward:path) => {
            &mut || {
                let (gate, up) = (raw(&gate), raw(&up));
                let y = $forward(gate.clone(), up.clone(), kind);
                black_box($backward(seed(y), gate, up, kind));
            }
        };
    }
    bench.compare(Contest {
        name,
        products: None,
        ours: &mut || backward(glu(gate.clone(), up.clone(), kind)),
        burn: &mut || backward(burn(gate.clone()) * up.clone()),
        body: body!(Flex::glu, Flex::glu_backward),
        generic: body!(reference::activation::forward::<Flex>, reference::activation::backward::<Flex>),
    });
}
