//! As a generated token has: each row of a weight is read once, and multiplied while it is in cache.

use rayon::prelude::*;

use super::{Part, Sources};
use crate::gemm::{Dropped, Source};
use crate::simd::{lane_sum, vectorised};

vectorised! {
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        let b = &b[..a.len()];
        lane_sum(a.len(), |i| a[i] * b[i])
    }
}

/// x Rᵀ for the first `columns` rows of R: `[M, columns]`.
fn times(x: &[f32], rows: usize, inner: usize, right: &dyn Source, columns: usize) -> Vec<f32> {
    // Rows of R that one worker takes.
    const TAKEN: usize = 64;
    let mut by_column = vec![0f32; columns * rows];
    by_column.par_chunks_mut((TAKEN * rows).max(1)).enumerate().for_each(|(chunk, out)| {
        let mut row = vec![0f32; inner];
        for (i, out) in out.chunks_exact_mut(rows).enumerate() {
            right.read(chunk * TAKEN + i, 0, &mut row);
            out.iter_mut().zip(x.chunks_exact(inner)).for_each(|(out, x)| *out = dot(x, &row));
        }
    });
    (0..rows * columns).map(|at| by_column[at % columns * rows + at / columns]).collect()
}

pub(super) fn forward(
    rows: usize,
    inner: usize,
    width: usize,
    h: &dyn Source,
    parts: &[Part],
    sources: &Sources,
) -> Vec<f32> {
    let mut y = vec![0f32; rows * width];
    if y.is_empty() || inner == 0 {
        return y;
    }
    let read = |source: &dyn Source| {
        let mut values = vec![0f32; rows * inner];
        values.chunks_exact_mut(inner).enumerate().for_each(|(row, out)| source.read(row, 0, out));
        values
    };
    let x = read(h);
    for (i, part) in parts.iter().enumerate() {
        let mut out = times(&x, rows, inner, &*sources.weights[i], part.columns);
        if let Some((a, b, rank)) = &sources.factors[i] {
            let dropped = part.path.dropout.map(|dropout| read(&Dropped::new(h, inner, dropout)));
            let low = times(dropped.as_ref().unwrap_or(&x), rows, inner, a, *rank);
            let update = times(&low, rows, *rank, b, part.columns);
            out.iter_mut().zip(&update).for_each(|(out, update)| *out += part.path.scale * update);
        }
        for (y, out) in y.chunks_exact_mut(width).zip(out.chunks_exact(part.columns.max(1))) {
            y[part.first..][..part.columns].copy_from_slice(out);
        }
    }
    y
}
