//! The adapters of a group of projections.
//!
//! ```text
//! l_i = s_i h̃_i A_iᵀ [M, r_i]    u_i = s_i g_i B_i [M, r_i]    dA_i = u_iᵀ h̃_i    dB_i = (l_iᵀ g_i)ᵀ
//! ```
//!
//! A few rows at a time, so that h and g are read once and are then in cache for all that is made of them.

use std::cell::RefCell;
use std::ops::Range;

use burn::backend::flex::FlexTensor;
use rayon::prelude::*;

use super::{Factors, Part};
use crate::flex::f32_tensor;
use crate::gemm::skinny::{LANES, Panels, Side, add_transposed_product, times_narrow};
use crate::gemm::{Dropped, Lanes, Lent, Matrix, Operand, Source};
use crate::simd::{Avx2, interleave};

/// Bytes of h and g that are in use at one time, about half of a second-level cache.
const ROWS_BYTES: usize = 1 << 20;

/// Most rows that are in use at one time: longer sums gain nothing.
const MOST_ROWS: usize = 64;

/// Rows whose share of dA and dB is added up at one place. The number decides the order of a sum, so it depends on nothing
/// but the number of rows.
const SHARE_ROWS: usize = 256;

/// The adapter of a part.
struct Adapter<'a> {
    part: &'a Part,
    factors: &'a Factors,
    /// Where its columns are among those of all.
    lanes: Range<usize>,
    a: Panels,
}

impl Adapter<'_> {
    fn b(&self) -> Panels {
        let b = Matrix::new(self.factors.b.values(), self.factors.rank);
        Panels::new(&Operand::new(&b, Lanes::Columns), self.factors.rank, self.part.columns)
    }

    /// Elements of its gradients, with those of lanes that are zeros.
    fn gradients(&self, inner: usize) -> usize {
        self.lanes.len() * (inner + self.part.columns)
    }
}

/// A matrix of r columns for each adapter, side by side in `[M, width]`.
pub(super) struct Low {
    values: Vec<f32>,
    width: usize,
    /// Where the columns of each part begin, if it has an adapter.
    firsts: Vec<Option<usize>>,
}

impl Low {
    /// The matrix of a part.
    pub(super) fn part(&self, part: usize) -> Option<Matrix<'_>> {
        Some(Matrix::new(&self.values, self.width).from(0, self.firsts[part]?))
    }
}

/// All adapters of a group.
pub(super) struct Adapters<'a> {
    /// `None` for a part without.
    adapters: Vec<Option<Adapter<'a>>>,
    rows: usize,
    inner: usize,
    width: usize,
}

thread_local! {
    /// Rows of h.
    static HIDDEN: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl<'a> Adapters<'a> {
    pub(super) fn new(parts: &'a [Part], rows: usize, inner: usize) -> Self {
        let mut width = 0;
        let adapters = parts
            .iter()
            .map(|part| {
                let factors = part.adapter.as_ref()?;
                let a = Matrix::new(factors.a.values(), inner);
                let a = Panels::new(&Operand::new(&a, Lanes::Rows), factors.rank, inner);
                let first = width;
                width += factors.rank.next_multiple_of(LANES);
                Some(Adapter { part, factors, lanes: first..width, a })
            })
            .collect();
        Self { adapters, rows, inner, width }
    }

    fn iter(&self) -> impl Iterator<Item = &Adapter<'a>> {
        self.adapters.iter().flatten()
    }

    fn low(&self, values: Vec<f32>) -> Low {
        let firsts = self.adapters.iter().map(|adapter| Some(adapter.as_ref()?.lanes.start)).collect();
        Low { values, width: self.width, firsts }
    }

    /// Rows that are in use at one time.
    fn block(&self, of_row: usize) -> usize {
        (ROWS_BYTES / size_of::<f32>() / of_row.max(1)).clamp(8, MOST_ROWS) / 8 * 8
    }

    /// l for some rows. `f` gets each adapter's rows of h̃, its matrix where it lies in memory.
    fn each_hidden(
        &self,
        h: &dyn Source,
        rows: Range<usize>,
        low: &mut [f32],
        mut f: impl FnMut(&Adapter, Matrix, &[f32]),
    ) {
        HIDDEN.with_borrow_mut(|scratch| {
            let mut is_plain = false;
            for adapter in self.iter() {
                let dropped = adapter.part.path.dropout.map(|dropout| Dropped::new(h, self.inner, dropout));
                let source = dropped.as_ref().map_or(h, |dropped| dropped);
                let hidden = match source.matrix() {
                    Some(matrix) => matrix.from(rows.start, 0),
                    None => {
                        // Without dropout it is the same for all.
                        if !is_plain {
                            scratch.resize(scratch.len().max(rows.len() * self.inner), 0.0);
                            let each = scratch.chunks_exact_mut(self.inner.max(1)).zip(rows.clone());
                            each.for_each(|(out, row)| source.read(row, 0, out));
                        }
                        is_plain = dropped.is_none();
                        Matrix::new(scratch, self.inner)
                    }
                };
                let out = &mut low[adapter.lanes.start..];
                times_narrow(hidden, rows.len(), &adapter.a, adapter.part.path.scale, out, self.width);
                f(adapter, hidden, low);
            }
        });
    }

    /// l.
    pub(super) fn hidden(&self, h: &dyn Source) -> Low {
        let mut low = vec![0f32; self.rows * self.width];
        // An even number of blocks, so that two cores have as much to do.
        let blocks = self.rows.div_ceil(self.block(self.inner)).next_multiple_of(2);
        let block = self.rows.div_ceil(blocks.max(1)).max(1);
        low.par_chunks_mut((block * self.width).max(1)).with_max_len(1).enumerate().for_each(|(i, low)| {
            let rows = i * block..self.rows.min((i + 1) * block);
            self.each_hidden(h, rows, low, |_, _, _| ());
        });
        self.low(low)
    }

    /// u, and (dA, dB) of each part with an adapter. `g` are the gradients of the parts' outputs.
    pub(super) fn backward(&self, h: &dyn Source, g: &[Matrix]) -> (Low, Vec<Option<(FlexTensor, FlexTensor)>>) {
        let mut u = vec![0f32; self.rows * self.width];
        if self.width == 0 {
            return (self.low(u), self.adapters.iter().map(|_| None).collect());
        }
        let b: Vec<Panels> = self.iter().map(Adapter::b).collect();
        let g: Vec<Matrix> =
            self.adapters.iter().zip(g).filter_map(|(adapter, g)| adapter.as_ref().map(|_| *g)).collect();
        let size = self.iter().map(|adapter| adapter.gradients(self.inner)).sum::<usize>();
        // An even number of shares, so that two cores have as much to do.
        let share = self.rows.div_ceil(self.rows.div_ceil(SHARE_ROWS).next_multiple_of(2).max(1)).max(1);
        let shares = self.rows.div_ceil(share).max(1);
        let mut sums = Lent::floats(shares * size);
        let sums = sums.floats_mut(shares * size);
        sums[..size].fill(0.0); // there may be no rows
        let of_row = self.inner + self.iter().map(|adapter| adapter.part.columns).sum::<usize>();
        let block = self.block(of_row);
        let tasks = sums.par_chunks_exact_mut(size).zip(u.par_chunks_mut(share * self.width));
        tasks.with_max_len(1).enumerate().for_each(|(i, (sums, u))| {
            sums.fill(0.0);
            let rows = i * share..self.rows.min((i + 1) * share);
            for (u, first) in u.chunks_mut(block * self.width).zip(rows.clone().step_by(block)) {
                self.backward_block(h, &g, &b, first..rows.end.min(first + block), u, sums);
            }
        });
        (self.low(u), self.gradients(sums, size))
    }

    /// u for some rows, and what they add to the gradients: `[lanes, K]` and `[lanes, N]` of each adapter in turn.
    fn backward_block(
        &self,
        h: &dyn Source,
        g: &[Matrix],
        b: &[Panels],
        rows: Range<usize>,
        u: &mut [f32],
        sums: &mut [f32],
    ) {
        for ((adapter, g), b) in self.iter().zip(g).zip(b) {
            let out = &mut u[adapter.lanes.start..];
            times_narrow(g.from(rows.start, 0), rows.len(), b, adapter.part.path.scale, out, self.width);
        }
        let u = Matrix::new(u, self.width);
        let mut low = vec![0f32; rows.len() * self.width];
        let (mut rest, mut g) = (sums, g.iter());
        self.each_hidden(h, rows.clone(), &mut low, |adapter, hidden, low| {
            let (lanes, columns) = (adapter.lanes.len(), adapter.part.columns);
            let (da, after) = std::mem::take(&mut rest).split_at_mut(lanes * self.inner);
            let (db, after) = after.split_at_mut(lanes * columns);
            rest = after;
            let first = adapter.lanes.start;
            let (u, low) = (u.from(0, first), Matrix::new(low, self.width).from(0, first));
            let g = g.next().expect("one for each adapter").from(rows.start, 0);
            let [u, low] = [u, low].map(|matrix| Side { matrix, columns: adapter.factors.rank });
            add_transposed_product(u, Side { matrix: hidden, columns: self.inner }, rows.len(), da, self.inner);
            add_transposed_product(low, Side { matrix: g, columns }, rows.len(), db, columns);
        });
    }

    /// The sums of all shares as tensors.
    fn gradients(&self, sums: &[f32], size: usize) -> Vec<Option<(FlexTensor, FlexTensor)>> {
        let total = |at: usize, out: &mut [f32]| {
            let end = at + out.len();
            let mut shares = sums.chunks_exact(size).map(|share| &share[at..end]);
            out.copy_from_slice(shares.next().expect("there is one"));
            shares.for_each(|share| out.iter_mut().zip(share).for_each(|(out, share)| *out += share));
        };
        let mut first = 0;
        let mut of_adapter = |adapter: &Adapter| {
            let (rank, columns) = (adapter.factors.rank, adapter.part.columns);
            let mut da = vec![0f32; rank * self.inner];
            total(first, &mut da);
            let at = first + adapter.lanes.len() * self.inner;
            let mut db = vec![0f32; columns * rank];
            // Columns that are turned at one time.
            const TURNED: usize = 64;
            for (rows, column) in db.chunks_mut(TURNED * rank).zip((0..columns).step_by(TURNED)) {
                let count = rows.len() / rank;
                for lane in (0..rank).step_by(LANES) {
                    let lanes = LANES.min(rank - lane);
                    let (mut turned, mut lines) = ([[0f32; LANES]; TURNED], [[0f32; TURNED]; LANES]);
                    for (i, line) in lines[..lanes].iter_mut().enumerate() {
                        total(at + (lane + i) * columns + column, &mut line[..count]);
                    }
                    interleave(Avx2::detect(), &lines, &mut turned);
                    for (row, turned) in rows.chunks_exact_mut(rank).zip(&turned) {
                        row[lane..][..lanes].copy_from_slice(&turned[..lanes]);
                    }
                }
            }
            first += adapter.gradients(self.inner);
            (f32_tensor(da, [rank, self.inner]), f32_tensor(db, [columns, rank]))
        };
        self.adapters.iter().map(|adapter| adapter.as_ref().map(&mut of_adapter)).collect()
    }
}
