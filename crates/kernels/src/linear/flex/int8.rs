//! The product of LLM.int8(): see [`quantise_rows`] for what becomes of the activations.

use emberlora_quant::{DOT_SCALE, QuantisedRows, quantise_rows};
use rayon::prelude::*;

use super::Part;
use crate::gemm::{self, Job, Lanes, Left, Matrix, Operand, Source, Start, Term};

/// 8-bit codes as numbers. Sums of their products are exact in f32 up to K = 1040, and round in the last place beyond.
struct Codes<'a> {
    codes: &'a [i8],
    columns: usize,
}

impl Source for Codes<'_> {
    fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        let codes = &self.codes[row * self.columns + first..];
        out.iter_mut().zip(codes).for_each(|(out, code)| *out = f32::from(*code));
    }
}

/// Some columns of a source.
struct Picked<'a> {
    source: &'a dyn Source,
    columns: &'a [usize],
}

impl Source for Picked<'_> {
    fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        for (out, column) in out.chunks_exact_mut(1).zip(&self.columns[first..]) {
            self.source.read(row, *column, out);
        }
    }
}

/// h Wᵀ of one part, `[M, N]`.
pub(super) fn product(rows: usize, inner: usize, h: &dyn Source, part: &Part) -> Vec<f32> {
    let mut x = vec![0f32; rows * inner];
    x.par_chunks_exact_mut(inner).enumerate().for_each(|(row, out)| h.read(row, 0, out));
    let QuantisedRows { codes, scales, outliers } = quantise_rows(&x, inner, part.threshold);
    let (weight, weight_scales) = part.weight.int8().expect("only INT8 weights have a threshold");
    let codes = Codes { codes: &codes, columns: inner };
    let left = Left::new(rows, inner, Operand::new(&codes, Lanes::Rows));
    let terms = vec![Term { left: &left, right: Operand::new(&weight, Lanes::Rows) }];
    let job = Job { first: 0, columns: part.columns, terms, start: Start::Zero };
    let mut y = gemm::product(rows, part.columns, &[job]);
    y.par_chunks_exact_mut(part.columns).zip(&scales).for_each(|(y, scale)| {
        y.iter_mut().zip(weight_scales).for_each(|(y, weight_scale)| *y *= scale * weight_scale * DOT_SCALE);
    });
    if !outliers.is_empty() {
        let (x, weight) = (Matrix::new(&x, inner), part.weight.source());
        let [x, weight]: [&dyn Source; 2] = [&x, &*weight];
        let [x, weight] = [x, weight].map(|source| Picked { source, columns: &outliers });
        let left = Left::new(rows, outliers.len(), Operand::new(&x, Lanes::Rows));
        gemm::accumulate(
            rows,
            part.columns,
            vec![Term { left: &left, right: Operand::new(&weight, Lanes::Rows) }],
            &mut y,
        );
    }
    y
}
