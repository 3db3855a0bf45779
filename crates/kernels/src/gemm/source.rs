//! What products read: plain matrices, and functions of them that never exist as a whole.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::Source;
use crate::activation::flex::gated;
use crate::flex::Mat;
use crate::simd::{prefetch, vectorised};
use crate::{Dropout, Gate};

/// A row-major f32 matrix.
#[derive(Clone, Copy, derive_new::new)]
pub(crate) struct Matrix<'a> {
    data: &'a [f32],
    /// Elements from row to row.
    stride: usize,
}

impl<'a> Matrix<'a> {
    /// Part of a row.
    #[inline(always)]
    pub(crate) fn row(&self, row: usize, first: usize, count: usize) -> &'a [f32] {
        &self.data[row * self.stride + first..][..count]
    }

    /// What lies from an element on, below it and to its right; nothing behind the last element.
    #[inline(always)]
    pub(crate) fn from(&self, row: usize, column: usize) -> Self {
        Self { data: &self.data[(row * self.stride + column).min(self.data.len())..], stride: self.stride }
    }

    /// The first `columns` elements of some rows.
    pub(crate) fn rows(&self, rows: Range<usize>, columns: usize) -> Mat<'a> {
        Mat::rows_of(self.from(rows.start, 0).data, rows.len(), columns, self.stride)
    }
}

impl Source for Matrix<'_> {
    #[inline(always)]
    fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        out.copy_from_slice(self.row(row, first, out.len()));
    }

    #[inline(always)]
    fn matrix(&self) -> Option<Matrix<'_>> {
        Some(*self)
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, first: usize, count: usize) {
        prefetch(self.data, row * self.stride + first, count);
    }
}

/// A row-major matrix in a 16-bit format.
#[derive(Clone, Copy, derive_new::new)]
pub(crate) struct Half<'a, H> {
    data: &'a [H],
    stride: usize,
}

vectorised! {
    fn widen(values: &[bf16], out: &mut [f32]) {
        for (out, value) in out.iter_mut().zip(values) {
            *out = f32::from_bits(u32::from(value.to_bits()) << 16);
        }
    }
}

impl Source for Half<'_, bf16> {
    fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        widen(&self.data[row * self.stride + first..][..out.len()], out);
    }

    fn bf16(&self, row: usize, first: usize, count: usize) -> Option<&[bf16]> {
        Some(&self.data[row * self.stride + first..][..count])
    }

    fn prefetch(&self, row: usize, first: usize, count: usize) {
        prefetch(self.data, row * self.stride + first, count);
    }
}

impl Source for Half<'_, f16> {
    fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        let values = &self.data[row * self.stride + first..][..out.len()];
        values.convert_to_f32_slice(out);
    }

    fn prefetch(&self, row: usize, first: usize, count: usize) {
        prefetch(self.data, row * self.stride + first, count);
    }
}

/// w ⊙ x · f with one factor f per row: the root-mean-square norm of x.
#[derive(Clone, Copy, derive_new::new)]
pub(crate) struct Normed<'a> {
    x: Matrix<'a>,
    weight: &'a [f32],
    factors: &'a [f32],
}

vectorised! {
    fn normed(x: &[f32], weight: &[f32], factor: f32, out: &mut [f32]) {
        let (x, weight) = (&x[..out.len()], &weight[..out.len()]);
        for i in 0..out.len() {
            out[i] = x[i] * factor * weight[i];
        }
    }
}

impl Source for Normed<'_> {
    fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        normed(self.x.row(row, first, out.len()), &self.weight[first..], self.factors[row], out);
    }

    fn prefetch(&self, row: usize, first: usize, count: usize) {
        self.x.prefetch(row, first, count);
    }
}

/// act(gate) ⊙ up, where a row is gate and up side by side.
#[derive(Clone, Copy, derive_new::new)]
pub(crate) struct Gated<'a> {
    gate: Gate,
    gate_up: Matrix<'a>,
    width: usize,
}

impl Source for Gated<'_> {
    fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        let gate = self.gate_up.row(row, first, out.len());
        gated(self.gate, gate, self.gate_up.row(row, self.width + first, out.len()), out);
    }

    fn prefetch(&self, row: usize, first: usize, count: usize) {
        self.gate_up.prefetch(row, first, count);
        self.gate_up.prefetch(row, self.width + first, count);
    }
}

/// A source with dropout on its elements, which are numbered row by row.
#[derive(Clone, Copy, derive_new::new)]
pub(crate) struct Dropped<'a> {
    source: &'a dyn Source,
    columns: usize,
    dropout: Dropout,
}

impl Source for Dropped<'_> {
    fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        self.source.read(row, first, out);
        let begin = row * self.columns + first;
        for (i, value) in out.iter_mut().enumerate() {
            *value *= self.dropout.factor(begin + i);
        }
    }

    fn prefetch(&self, row: usize, first: usize, count: usize) {
        self.source.prefetch(row, first, count);
    }
}

/// The rows of a source from one on.
#[derive(Clone, Copy, derive_new::new)]
pub(crate) struct Below<'a> {
    source: &'a dyn Source,
    first: usize,
}

impl Source for Below<'_> {
    fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        self.source.read(self.first + row, first, out);
    }

    fn matrix(&self) -> Option<Matrix<'_>> {
        Some(self.source.matrix()?.from(self.first, 0))
    }

    fn bf16(&self, row: usize, first: usize, count: usize) -> Option<&[bf16]> {
        self.source.bf16(self.first + row, first, count)
    }

    fn prefetch(&self, row: usize, first: usize, count: usize) {
        self.source.prefetch(self.first + row, first, count);
    }
}
