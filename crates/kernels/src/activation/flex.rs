//! The CPU body: gate and up are read once, nothing in between is written.

use burn::backend::Flex;
use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;
use rayon::prelude::*;

use super::{Gate, GluOps, generic};
use crate::flex::{Rows, f32_tensor_of};
use crate::simd::{exp, sigmoid, vectorised};

/// Elements that one worker takes at a time.
const CHUNK: usize = 1 << 14;

/// p(x) and p'(x) of silu(x) = x p(x).
#[inline(always)]
fn silu(x: f32) -> (f32, f32) {
    let (p, rest) = sigmoid(x);
    (p, p * rest)
}

/// Φ(x) and its density, by formula 7.1.26 of Abramowitz & Stegun (*Handbook of Mathematical Functions*, 1964), which is
/// off by less than 10⁻⁷.
#[inline(always)]
fn gelu(x: f32) -> (f32, f32) {
    const INV_SQRT_2_PI: f32 = 0.398_942_3;
    let density = exp(-0.5 * x * x);
    let t = 1.0 / (1.0 + 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2 * x.abs());
    let mut series = 1.061_405_4;
    for coefficient in [-1.453_152_1, 1.421_413_8, -0.284_496_72, 0.254_829_6] {
        series = series * t + coefficient;
    }
    let tail = 0.5 * series * t * density;
    (if x < 0.0 { tail } else { 1.0 - tail }, INV_SQRT_2_PI * density)
}

/// (1 + tanh u) / 2 = σ(2u) with u = √(2/π) (x + c x³), and its derivative.
#[inline(always)]
fn gelu_tanh(x: f32) -> (f32, f32) {
    const CUBIC: f32 = 0.044_715;
    const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769;
    let square = x * x;
    let (p, rest) = sigmoid(TWICE_SQRT_2_OVER_PI * x * (1.0 + CUBIC * square));
    (p, p * rest * TWICE_SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * square))
}

#[inline(always)]
fn forward(p: impl Fn(f32) -> (f32, f32), gate: &[f32], up: &[f32], y: &mut [f32]) {
    let (gate, up) = (&gate[..y.len()], &up[..y.len()]);
    for i in 0..y.len() {
        y[i] = gate[i] * p(gate[i]).0 * up[i];
    }
}

#[inline(always)]
fn backward(p: impl Fn(f32) -> (f32, f32), grad: &[f32], gate: &mut [f32], up: &mut [f32]) {
    let (gate, up) = (&mut gate[..grad.len()], &mut up[..grad.len()]);
    for i in 0..grad.len() {
        let (p, dp) = p(gate[i]);
        let dgate = grad[i] * up[i] * (p + gate[i] * dp);
        up[i] = grad[i] * gate[i] * p;
        gate[i] = dgate;
    }
}

vectorised! {
    /// act(gate) ⊙ up.
    pub(crate) fn gated(kind: Gate, gate: &[f32], up: &[f32], y: &mut [f32]) {
        match kind {
            Gate::Silu => forward(silu, gate, up, y),
            Gate::Gelu => forward(gelu, gate, up, y),
            Gate::GeluTanh => forward(gelu_tanh, gate, up, y),
        }
    }
}

vectorised! {
    /// The gradients of gate and up, over them.
    fn gated_backward(kind: Gate, grad: &[f32], gate: &mut [f32], up: &mut [f32]) {
        match kind {
            Gate::Silu => backward(silu, grad, gate, up),
            Gate::Gelu => backward(gelu, grad, gate, up),
            Gate::GeluTanh => backward(gelu_tanh, grad, gate, up),
        }
    }
}

/// The gradient of gate and up, which lie side by side in rows; it takes their memory where nothing else holds them.
pub(crate) fn side_by_side_backward(kind: Gate, grad: &[f32], mut gate_up: Rows) -> FlexTensor {
    let (width, rows_per_task) = (gate_up.width() / 2, gate_up.rows_per_task());
    gate_up
        .values_mut()
        .par_chunks_exact_mut((2 * width).max(1))
        .zip(grad.par_chunks_exact(width.max(1)))
        .with_min_len(rows_per_task)
        .for_each(|(gate_up, grad)| {
            let (gate, up) = gate_up.split_at_mut(width);
            gated_backward(kind, grad, gate, up);
        });
    gate_up.tensor()
}

impl GluOps for Flex {
    fn glu(gate: FlexTensor, up: FlexTensor, kind: Gate) -> FlexTensor {
        if gate.dtype() != DType::F32 || up.dtype() != DType::F32 {
            return generic::forward::<Self>(gate, up, kind);
        }
        let (shape, gate, up) = (gate.shape(), Rows::of(&gate), Rows::of(&up));
        let mut y = vec![0f32; gate.len()];
        y.par_chunks_mut(CHUNK)
            .zip(gate.values().par_chunks(CHUNK))
            .zip(up.values().par_chunks(CHUNK))
            .for_each(|((y, gate), up)| gated(kind, gate, up, y));
        f32_tensor_of(y, shape)
    }

    fn glu_backward(grad: FlexTensor, gate: FlexTensor, up: FlexTensor, kind: Gate) -> (FlexTensor, FlexTensor) {
        if [&grad, &gate, &up].iter().any(|t| t.dtype() != DType::F32) {
            return generic::backward::<Self>(grad, gate, up, kind);
        }
        // The tensors themselves are gone then, so that their memory may become that of the gradients.
        let [grad, mut gate, mut up] = [grad, gate, up].map(|tensor| Rows::of(&tensor));
        gate.values_mut()
            .par_chunks_mut(CHUNK)
            .zip(up.values_mut().par_chunks_mut(CHUNK))
            .zip(grad.values().par_chunks(CHUNK))
            .for_each(|((gate, up), grad)| gated_backward(kind, grad, gate, up));
        (gate.tensor(), up.tensor())
    }
}
