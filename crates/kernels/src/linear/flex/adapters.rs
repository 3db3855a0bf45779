//! The adapters of a group of projections.
//!
//! ```text
//! l_i = s_i h̃_i A_iᵀ [M, r_i]    u_i = s_i g_i B_i [M, r_i]    dA_i = u_iᵀ h̃_i    dB_i = g_iᵀ l_i
//! ```
//!
//! A few rows at a time, so that h and g are read once and are then in cache for all that is made of them. As products with
//! few columns they take so little time that to pack their operands for a matrix unit would take longer.

use std::cell::RefCell;
use std::ops::Range;

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::{Factors, Part};
use crate::flex::{Mat, f32_tensor, gemm_serial};
use crate::gemm::{Dropped, Lent, Matrix, Source};

/// Bytes of h and g that are in use at one time, about half of a second-level cache.
const BLOCK_BYTES: usize = 1 << 20;

/// Most rows that are in use at one time.
const BLOCK_ROWS: usize = 64;

/// Rows whose part of dA and dB is added up in one place. Where a sum is cut decides its last bits, so it depends on the
/// shapes and on nothing else.
const SHARE_ROWS: usize = 256;

/// Bytes that all those places may take together.
const SHARES_BYTES: usize = 128 << 20;

/// The adapter of a part.
struct Adapter<'a> {
    part: &'a Part,
    factors: &'a Factors,
    /// Its columns among those of all.
    columns: Range<usize>,
}

impl Adapter<'_> {
    /// A, `[r, K]`.
    fn a(&self, inner: usize) -> Mat<'_> {
        Mat::slice(self.factors.a.values(), self.factors.rank, inner)
    }

    /// B, `[N, r]`.
    fn b(&self) -> Mat<'_> {
        Mat::slice(self.factors.b.values(), self.part.columns, self.factors.rank)
    }

    /// Elements of its gradients.
    fn gradients(&self, inner: usize) -> usize {
        self.factors.rank * (inner + self.part.columns)
    }
}

/// A matrix of r columns for each adapter, side by side in `[M, Σ r]`.
pub(super) struct Low {
    values: Vec<f32>,
    width: usize,
    /// Where the columns of each part begin, if it has an adapter.
    firsts: Vec<Option<usize>>,
}

impl Low {
    /// The matrix of each part, if it has an adapter.
    pub(super) fn matrices(&self) -> Vec<Option<Matrix<'_>>> {
        let all = Matrix::new(&self.values, self.width);
        self.firsts.iter().map(|first| Some(all.from(0, (*first)?))).collect()
    }
}

/// All adapters of a group, and `[rows, inner]`, the shape of h.
pub(super) struct Adapters<'a> {
    /// `None` for a part without.
    adapters: Vec<Option<Adapter<'a>>>,
    rows: usize,
    inner: usize,
    /// Σ r.
    width: usize,
}

thread_local! {
    /// Rows of h̃.
    static HIDDEN: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl<'a> Adapters<'a> {
    pub(super) fn new(parts: &'a [Part], rows: usize, inner: usize) -> Self {
        let mut width = 0;
        let adapters = parts
            .iter()
            .map(|part| {
                let factors = part.adapter.as_ref()?;
                let first = width;
                width += factors.rank;
                Some(Adapter { part, factors, columns: first..width })
            })
            .collect();
        Self { adapters, rows, inner, width }
    }

    fn iter(&self) -> impl Iterator<Item = &Adapter<'a>> {
        self.adapters.iter().flatten()
    }

    fn low(&self, values: Vec<f32>) -> Low {
        let firsts = self.adapters.iter().map(|adapter| Some(adapter.as_ref()?.columns.start)).collect();
        Low { values, width: self.width, firsts }
    }

    /// Rows that are in use at one time, of `row` elements each.
    fn block(row: usize) -> usize {
        (BLOCK_BYTES / size_of::<f32>() / row.max(1)).clamp(8, BLOCK_ROWS)
    }

    /// l for some rows. `each` gets h̃ of every adapter in turn, and l.
    fn hidden_of(
        &self,
        h: &dyn Source,
        rows: Range<usize>,
        low: &mut [f32],
        mut each: impl FnMut(&Adapter, Mat, &[f32]),
    ) {
        HIDDEN.with_borrow_mut(|buffer| {
            let mut holds_h = false;
            for adapter in self.iter() {
                let dropped = adapter.part.path.dropout.map(|dropout| Dropped::new(h, self.inner, dropout));
                let source = dropped.as_ref().map_or(h, |dropped| dropped);
                let hidden = match source.matrix() {
                    Some(matrix) => matrix.rows(rows.clone(), self.inner),
                    None => {
                        if !holds_h {
                            buffer.resize(buffer.len().max(rows.len() * self.inner), 0.0);
                            let each = buffer.chunks_exact_mut(self.inner.max(1)).zip(rows.clone());
                            each.for_each(|(out, row)| source.read(row, 0, out));
                        }
                        // Without dropout it is the same for all.
                        holds_h = dropped.is_none();
                        Mat::slice(buffer, rows.len(), self.inner)
                    }
                };
                let (out, scale) = (&mut low[adapter.columns.start..], adapter.part.path.scale);
                gemm_serial(out, self.width, false, scale, hidden, adapter.a(self.inner).t());
                each(adapter, hidden, low);
            }
        });
    }

    /// l.
    pub(super) fn hidden(&self, h: &dyn Source) -> Low {
        let mut low = vec![0f32; self.rows * self.width];
        // An even number of blocks, so that two cores have as much to do.
        let blocks = self.rows.div_ceil(Self::block(self.inner)).next_multiple_of(2);
        let block = self.rows.div_ceil(blocks.max(1)).max(1);
        low.par_chunks_mut((block * self.width).max(1)).with_max_len(1).enumerate().for_each(|(i, low)| {
            let rows = i * block..self.rows.min((i + 1) * block);
            self.hidden_of(h, rows, low, |_, _, _| ());
        });
        self.low(low)
    }

    /// u, and (dA, dB) of each part with an adapter. `g` are the gradients of the parts' outputs.
    pub(super) fn backward(&self, h: &dyn Source, g: &[Matrix]) -> (Low, Vec<Option<(FlexTensor, FlexTensor)>>) {
        let mut u = vec![0f32; self.rows * self.width];
        if self.width == 0 {
            return (self.low(u), self.adapters.iter().map(|_| None).collect());
        }
        let of_adapters = self.adapters.iter().zip(g).filter(|(adapter, _)| adapter.is_some());
        let g: Vec<Matrix> = of_adapters.map(|(_, g)| *g).collect();
        let size = self.iter().map(|adapter| adapter.gradients(self.inner)).sum::<usize>();
        let most = (SHARES_BYTES / size_of::<f32>() / size.max(1)).max(1);
        // An even number of shares, so that two cores have as much to do; but few rows are not worth being shared.
        let even = if self.rows > BLOCK_ROWS { 2 } else { 1 };
        let shares = self.rows.div_ceil(SHARE_ROWS).min(most).next_multiple_of(even).max(1);
        let share = self.rows.div_ceil(shares).max(1);
        let shares = self.rows.div_ceil(share).max(1);
        let mut sums = Lent::floats(shares * size);
        let sums = sums.floats_mut(shares * size);
        if self.rows == 0 {
            sums.fill(0.0);
        }
        let block = Self::block(self.inner + self.iter().map(|adapter| adapter.part.columns).sum::<usize>());
        let tasks = sums.par_chunks_exact_mut(size).zip(u.par_chunks_mut(share * self.width));
        tasks.with_max_len(1).enumerate().for_each(|(i, (sums, u))| {
            sums.fill(0.0);
            let mut low = vec![0f32; block * self.width];
            let rows = i * share..self.rows.min((i + 1) * share);
            for (u, first) in u.chunks_mut(block * self.width).zip(rows.clone().step_by(block)) {
                self.backward_of(h, &g, first..rows.end.min(first + block), &mut low[..u.len()], u, sums);
            }
        });
        (self.low(u), self.gradients(sums, size))
    }

    /// u and l for some rows, and what they add to the gradients, dA and dB of each adapter in turn.
    fn backward_of(
        &self,
        h: &dyn Source,
        g: &[Matrix],
        rows: Range<usize>,
        low: &mut [f32],
        u: &mut [f32],
        mut sums: &mut [f32],
    ) {
        let mut g = g.iter();
        self.hidden_of(h, rows.clone(), low, |adapter, hidden, low| {
            let (rank, columns, first) = (adapter.factors.rank, adapter.part.columns, adapter.columns.start);
            let (da, rest) = std::mem::take(&mut sums).split_at_mut(rank * self.inner);
            let (db, rest) = rest.split_at_mut(columns * rank);
            sums = rest;
            let g = g.next().expect("one for each adapter").rows(rows.clone(), columns);
            gemm_serial(&mut u[first..], self.width, false, adapter.part.path.scale, g, adapter.b());
            let [u, low] = [&*u, low].map(|low| Mat::rows_of(&low[first..], rows.len(), rank, self.width));
            gemm_serial(da, self.inner, true, 1.0, u.t(), hidden);
            gemm_serial(db, rank, true, 1.0, g.t(), low);
        });
    }

    /// The sums of all shares as tensors.
    fn gradients(&self, sums: &[f32], size: usize) -> Vec<Option<(FlexTensor, FlexTensor)>> {
        let mut first = 0;
        let mut next = |rows: usize, columns: usize| {
            let range = first..first + rows * columns;
            first = range.end;
            let mut shares = sums.chunks_exact(size).map(|share| &share[range.clone()]);
            let mut total = shares.next().expect("there is one").to_vec();
            shares.for_each(|share| total.iter_mut().zip(share).for_each(|(total, share)| *total += share));
            f32_tensor(total, [rows, columns])
        };
        let mut of_adapter = |adapter: &Adapter| {
            let rank = adapter.factors.rank;
            (next(rank, self.inner), next(adapter.part.columns, rank))
        };
        self.adapters.iter().map(|adapter| adapter.as_ref().map(&mut of_adapter)).collect()
    }
}
