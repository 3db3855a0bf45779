//! The CPU body: products straight on the tensors' storage through the `gemm` crate.
//!
//! The adapter's product is accumulated into the output of the frozen one, so a second `[M, N]` buffer never exists.
//! A bf16 or f16 weight is widened a panel of rows at a time: half the memory of f32, and no dense copy.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, bf16, f16};
use rayon::prelude::*;

use super::{AdapterPath, LinearOps, generic};
use crate::flex::{Mat, contiguous, f32_tensor, gemm, half_to_f32};
use crate::simd::{lane_sum, vectorised};

/// Elements of a widened panel: 1 MiB of f32, which stays in the last-level cache while it is multiplied.
const PANEL: usize = 1 << 18;

/// Formats that the bodies below compute in, and views that run forwards; the default bodies take the rest.
fn supported(w: &FlexTensor, others: &[&FlexTensor]) -> bool {
    let forwards = |t: &FlexTensor| t.layout().strides().iter().all(|stride| *stride >= 0);
    matches!(w.dtype(), DType::F32 | DType::BF16 | DType::F16)
        && forwards(w)
        && others.iter().all(|t| t.dtype() == DType::F32 && forwards(t))
}

/// Calls `f(first row, panel)` for consecutive rows of `w`, as f32.
fn panels(w: &FlexTensor, mut f: impl FnMut(usize, Mat)) {
    if w.dtype() == DType::F32 {
        return f(0, Mat::of(w));
    }
    let w = contiguous(w);
    let (rows, columns) = (w.layout().shape()[0], w.layout().shape()[1]);
    let step = (PANEL / columns.max(1)).clamp(1, rows.max(1));
    let mut scratch = vec![0f32; step * columns];
    for first in (0..rows).step_by(step) {
        let count = step.min(rows - first);
        let range = first * columns..(first + count) * columns;
        let panel = &mut scratch[..count * columns];
        match w.dtype() {
            DType::BF16 => half_to_f32(&w.storage::<bf16>()[w.layout().start_offset()..][range], panel, bf16::to_f32),
            _ => half_to_f32(&w.storage::<f16>()[w.layout().start_offset()..][range], panel, f16::to_f32),
        }
        f(first, Mat::slice(panel, count, columns));
    }
}

fn small(lhs: Mat, rhs: Mat) -> Vec<f32> {
    let mut out = vec![0f32; lhs.rows * rhs.cols];
    gemm(&mut out, rhs.cols, false, 1.0, lhs, rhs);
    out
}

/// Rows of x up to which a product is limited by reading the weight, so that it is read once and widened on the way.
const FEW_ROWS: usize = 2;

vectorised! {
    fn dot_bf16(x: &[f32], w: &[bf16]) -> f32 {
        let w = &w[..x.len()];
        lane_sum(x.len(), |i| x[i] * f32::from_bits(u32::from(w[i].to_bits()) << 16))
    }
}

/// y = x Wᵀ for a few rows of x, as a generated token has, and a contiguous bf16 weight.
fn few_rows(x: Mat, w: &[bf16], y: &mut [f32]) {
    let n = y.len() / x.rows;
    for (row, y) in y.chunks_exact_mut(n).enumerate() {
        let x = x.row(row);
        y.par_iter_mut().zip(w.par_chunks_exact(x.len())).with_min_len(64).for_each(|(y, w)| *y = dot_bf16(x, w));
    }
}

/// y = x Wᵀ into a fresh buffer.
fn base_forward(x: Mat, w: &FlexTensor) -> Vec<f32> {
    let [n, k] = [w.layout().shape()[0], w.layout().shape()[1]];
    let mut y = vec![0f32; x.rows * n];
    if (1..=FEW_ROWS).contains(&x.rows)
        && k > 0
        && x.has_contiguous_rows()
        && w.dtype() == DType::BF16
        && w.is_contiguous()
    {
        few_rows(x, &w.storage::<bf16>()[w.layout().start_offset()..][..n * k], &mut y);
    } else if x.rows > 0 {
        panels(w, |first, panel| gemm(&mut y[first..], n, false, 1.0, x, panel.t()));
    }
    y
}

/// dx = g W into a fresh buffer.
fn base_backward(g: Mat, w: &FlexTensor) -> Vec<f32> {
    let k = w.layout().shape()[1];
    let mut dx = vec![0f32; g.rows * k];
    if g.rows > 0 {
        panels(w, |first, panel| gemm(&mut dx, k, first > 0, 1.0, g.columns(first, panel.rows), panel));
    }
    dx
}

/// x with the adapter's dropout applied, where there is one.
fn dropped(x: &FlexTensor, path: AdapterPath) -> FlexTensor {
    let Some(dropout) = path.dropout else { return x.clone() };
    let x = contiguous(x);
    let (rows, columns) = (x.layout().shape()[0], x.layout().shape()[1]);
    let values = &x.storage::<f32>()[x.layout().start_offset()..][..rows * columns];
    let out = values.par_iter().enumerate().map(|(i, value)| value * dropout.factor(i)).collect();
    f32_tensor(out, [rows, columns])
}

impl LinearOps for Flex {
    fn frozen_linear(x: FlexTensor, w: FlexTensor) -> FlexTensor {
        if !supported(&w, &[&x]) {
            return generic::frozen::<Self>(x, w);
        }
        let x = Mat::of(&x);
        f32_tensor(base_forward(x, &w), [x.rows, w.layout().shape()[0]])
    }

    fn frozen_linear_backward(grad: FlexTensor, w: FlexTensor) -> FlexTensor {
        if !supported(&w, &[&grad]) {
            return generic::frozen_backward::<Self>(grad, w);
        }
        let g = Mat::of(&grad);
        f32_tensor(base_backward(g, &w), [g.rows, w.layout().shape()[1]])
    }

    fn lora_linear(x: FlexTensor, w: FlexTensor, a: FlexTensor, b: FlexTensor, path: AdapterPath) -> FlexTensor {
        if !supported(&w, &[&x, &a, &b]) {
            return generic::lora::<Self>(x, w, a, b, path);
        }
        let dropped = dropped(&x, path);
        let (xm, am, bm) = (Mat::of(&x), Mat::of(&a), Mat::of(&b));
        let xa = small(Mat::of(&dropped), am.t());
        let mut y = base_forward(xm, &w);
        gemm(&mut y, bm.rows, true, path.scale, Mat::slice(&xa, xm.rows, am.rows), bm.t());
        f32_tensor(y, [xm.rows, bm.rows])
    }

    fn lora_linear_backward(
        grad: FlexTensor,
        x: FlexTensor,
        w: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        path: AdapterPath,
        need_dx: bool,
    ) -> (Option<FlexTensor>, FlexTensor, FlexTensor) {
        if !supported(&w, &[&grad, &x, &a, &b]) {
            return generic::lora_backward::<Self>(grad, x, w, a, b, path, need_dx);
        }
        let dropped = dropped(&x, path);
        let (g, xd, am, bm) = (Mat::of(&grad), Mat::of(&dropped), Mat::of(&a), Mat::of(&b));
        let (m, k, r, n) = (g.rows, am.cols, am.rows, bm.rows);
        let (gb, xa) = (small(g, bm), small(xd, am.t()));
        let (gb, xa) = (Mat::slice(&gb, m, r), Mat::slice(&xa, m, r));
        let mut da = vec![0f32; r * k];
        gemm(&mut da, k, false, path.scale, gb.t(), xd);
        let mut db = vec![0f32; n * r];
        gemm(&mut db, r, false, path.scale, g.t(), xa);
        let dx = need_dx.then(|| {
            let mut dx = base_backward(g, &w);
            match path.dropout {
                None => gemm(&mut dx, k, true, path.scale, gb, am),
                Some(dropout) => {
                    let through = small(gb, am);
                    let masked = through.par_iter().enumerate().map(|(i, t)| path.scale * dropout.factor(i) * t);
                    dx.par_iter_mut().zip(masked).for_each(|(dx, t)| *dx += t);
                }
            }
            f32_tensor(dx, [m, k])
        });
        (dx, f32_tensor(da, [r, k]), f32_tensor(db, [n, r]))
    }
}
