//! The CPU body: gate and up are read once, nothing in between is written.

use burn::backend::Flex;
use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;
use rayon::prelude::*;

use super::{Gate, GluOps, generic};
use crate::flex::{Rows, f32_tensor_of};
use crate::simd::{sigmoid, vectorised};

/// Elements that one worker takes at a time.
const CHUNK: usize = 1 << 14;

vectorised! {
    fn swiglu(gate: &[f32], up: &[f32], y: &mut [f32]) {
        let (gate, up) = (&gate[..y.len()], &up[..y.len()]);
        for i in 0..y.len() {
            y[i] = gate[i] * sigmoid(gate[i]) * up[i];
        }
    }
}

vectorised! {
    fn swiglu_backward(grad: &[f32], gate: &[f32], up: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        let n = grad.len();
        let (gate, up, dgate, dup) = (&gate[..n], &up[..n], &mut dgate[..n], &mut dup[..n]);
        for i in 0..n {
            let s = sigmoid(gate[i]);
            // silu' = σ + x σ (1 − σ)
            dgate[i] = grad[i] * up[i] * (s + gate[i] * s * (1.0 - s));
            dup[i] = grad[i] * gate[i] * s;
        }
    }
}

/// The gradient of gate and up, side by side as they are themselves.
pub(crate) fn side_by_side_backward(grad: &[f32], gate_up: &Rows) -> Vec<f32> {
    let width = gate_up.width() / 2;
    let mut out = vec![0f32; gate_up.len()];
    out.par_chunks_mut(2 * width)
        .zip(gate_up.par_iter())
        .zip(grad.par_chunks(width))
        .with_min_len(gate_up.rows_per_task())
        .for_each(|((out, gate_up), grad)| {
            let ((gate, up), (dgate, dup)) = (gate_up.split_at(width), out.split_at_mut(width));
            swiglu_backward(grad, gate, up, dgate, dup);
        });
    out
}

impl GluOps for Flex {
    fn glu(gate: FlexTensor, up: FlexTensor, kind: Gate) -> FlexTensor {
        if kind != Gate::Silu || gate.dtype() != DType::F32 || up.dtype() != DType::F32 {
            return generic::forward::<Self>(gate, up, kind);
        }
        let (shape, gate, up) = (gate.shape(), Rows::of(&gate), Rows::of(&up));
        let mut y = vec![0f32; gate.len()];
        y.par_chunks_mut(CHUNK)
            .zip(gate.values().par_chunks(CHUNK))
            .zip(up.values().par_chunks(CHUNK))
            .for_each(|((y, gate), up)| swiglu(gate, up, y));
        f32_tensor_of(y, shape)
    }

    fn glu_backward(grad: FlexTensor, gate: FlexTensor, up: FlexTensor, kind: Gate) -> (FlexTensor, FlexTensor) {
        if kind != Gate::Silu || [&grad, &gate, &up].iter().any(|t| t.dtype() != DType::F32) {
            return generic::backward::<Self>(grad, gate, up, kind);
        }
        let shape = gate.shape();
        let (grad, gate, up) = (Rows::of(&grad), Rows::of(&gate), Rows::of(&up));
        let (mut dgate, mut dup) = (vec![0f32; gate.len()], vec![0f32; gate.len()]);
        dgate
            .par_chunks_mut(CHUNK)
            .zip(dup.par_chunks_mut(CHUNK))
            .zip(grad.values().par_chunks(CHUNK))
            .zip(gate.values().par_chunks(CHUNK))
            .zip(up.values().par_chunks(CHUNK))
            .for_each(|((((dgate, dup), grad), gate), up)| swiglu_backward(grad, gate, up, dgate, dup));
        (f32_tensor_of(dgate, shape.clone()), f32_tensor_of(dup, shape))
    }
}
