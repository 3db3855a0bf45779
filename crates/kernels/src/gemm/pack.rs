//! Panels: W neighbouring lanes of an operand, element by element of the inner dimension, as the registers take them.

use std::ops::Range;

use half::bf16;

use super::buffer::{Buffer, Lent};
use super::source::Matrix;
use super::unit::Unit;
use crate::simd::{Avx2, interleave};

/// A matrix that is read row by row, and may be made while it is read.
pub(crate) trait Source: Sync {
    /// Writes the elements `first..first + out.len()` of `row`.
    fn read(&self, row: usize, first: usize, out: &mut [f32]);

    /// The matrix itself, where it lies in memory as it is.
    fn matrix(&self) -> Option<Matrix<'_>> {
        None
    }

    /// The elements `first..first + count` of `row`, where they lie in memory as bf16.
    fn bf16(&self, _row: usize, _first: usize, _count: usize) -> Option<&[bf16]> {
        None
    }

    /// Whether its numbers are the values of codes of a few bits, so that a product need not take all 24 bits of an f32.
    fn coarse(&self) -> bool {
        false
    }

    /// Asks the processor to fetch what reading `count` elements of `row` will need. A row that there is not is ignored.
    fn prefetch(&self, _row: usize, _first: usize, _count: usize) {}
}

impl dyn Source + '_ {
    /// The elements `first..first + count` of `row`, read into `buffer` where they do not lie in memory.
    #[inline(always)]
    pub(super) fn part<'a>(&'a self, row: usize, first: usize, count: usize, buffer: &'a mut [f32]) -> &'a [f32] {
        match self.matrix() {
            Some(matrix) => matrix.row(row, first, count),
            None => {
                self.read(row, first, &mut buffer[..count]);
                &buffer[..count]
            }
        }
    }
}

/// Which index of the source runs along the lanes of a panel; the other one is the inner dimension of the product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lanes {
    /// A lane is a row of the source: x in x Wᵀ, and W there.
    Rows,
    /// A lane is a column: W in g W.
    Columns,
}

/// One side of a product.
#[derive(Clone, Copy, derive_new::new)]
pub(crate) struct Operand<'a> {
    pub(super) source: &'a dyn Source,
    pub(super) lanes: Lanes,
}

/// Elements of a row that are read at one time where lanes are rows: W of these stay in the first-level cache.
const CHUNK: usize = 64;

/// Chunks, and rows where lanes are columns, that are asked for before they are read: a panel jumps from row to row, which
/// the processor does not foresee, and a weight comes from memory.
const CHUNKS_AHEAD: usize = 4;
const ROWS_AHEAD: usize = 16;

/// Widest range of columns that are read at one time where lanes are columns.
pub(super) const MAX_COLUMNS: usize = 576;

impl Operand<'_> {
    /// Lays out `lanes` × `inner` as panels `[lanes / W][inner][W]`; lanes that there are not are zeros.
    #[inline(always)]
    pub(super) fn pack<const W: usize>(
        &self,
        avx2: Option<Avx2>,
        lanes: Range<usize>,
        inner: Range<usize>,
        out: &mut [f32],
    ) {
        let depth = inner.len();
        assert!(out.len() == lanes.len().div_ceil(W) * W * depth && lanes.len() <= MAX_COLUMNS);
        match self.lanes {
            Lanes::Rows => {
                let chunks = depth.div_ceil(CHUNK);
                let prefetch = |chunk: usize| {
                    let (panel, first) = (chunk / chunks, chunk % chunks * CHUNK);
                    for row in (lanes.start + panel * W..lanes.end).take(W) {
                        self.source.prefetch(row, inner.start + first, CHUNK.min(depth - first));
                    }
                };
                let mut ahead = 0;
                let mut prefetch_next = || {
                    prefetch(ahead);
                    ahead += 1;
                };
                if chunks > 0 {
                    (0..CHUNKS_AHEAD).for_each(|_| prefetch_next());
                }
                for (panel, first) in out.chunks_exact_mut((depth * W).max(1)).zip(lanes.clone().step_by(W)) {
                    let mut rows = [[0f32; CHUNK]; W];
                    let count = W.min(lanes.end - first);
                    for (part, start) in panel.chunks_mut(CHUNK * W).zip(inner.clone().step_by(CHUNK)) {
                        prefetch_next();
                        let len = part.len() / W;
                        for (lane, row) in rows[..count].iter_mut().enumerate() {
                            self.source.read(first + lane, start, &mut row[..len]);
                        }
                        interleave(avx2, &rows, part.as_chunks_mut::<W>().0);
                    }
                }
            }
            Lanes::Columns => {
                let mut buffer = [0f32; MAX_COLUMNS];
                for ahead in inner.clone().take(ROWS_AHEAD) {
                    self.source.prefetch(ahead, lanes.start, lanes.len());
                }
                for (k, source_row) in inner.clone().enumerate() {
                    if source_row + ROWS_AHEAD < inner.end {
                        self.source.prefetch(source_row + ROWS_AHEAD, lanes.start, lanes.len());
                    }
                    let row = self.source.part(source_row, lanes.start, lanes.len(), &mut buffer);
                    for (panel, values) in out.chunks_exact_mut(depth * W).zip(row.chunks(W)) {
                        let element = &mut panel[k * W..][..W];
                        if let Ok(values) = <&[f32; W]>::try_from(values) {
                            element.copy_from_slice(values);
                        } else {
                            element[..values.len()].copy_from_slice(values);
                            element[values.len()..].fill(0.0);
                        }
                    }
                }
            }
        }
    }
}

/// L, which every product with it shares.
pub(crate) struct Left<'a> {
    operand: Operand<'a>,
    rows: usize,
    inner: usize,
    unit: Unit,
    /// The panels of all blocks, one behind the other, where registers multiply. The matrix unit's tasks pack rows
    /// themselves.
    panels: Option<Lent>,
}

impl<'a> Left<'a> {
    /// An operand of `rows` lanes and `inner` elements.
    pub(crate) fn new(rows: usize, inner: usize, operand: Operand<'a>) -> Self {
        Self::for_unit(Unit::of(rows), rows, inner, operand)
    }

    /// An operand for one unit of the processor, which then computes the products with it.
    pub(super) fn for_unit(unit: Unit, rows: usize, inner: usize, operand: Operand<'a>) -> Self {
        Self { panels: unit.pack_left(rows, inner, &operand), operand, rows, inner, unit }
    }

    pub(super) fn operand(&self) -> &Operand<'a> {
        &self.operand
    }

    pub(super) fn unit(&self) -> Unit {
        self.unit
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn inner(&self) -> usize {
        self.inner
    }

    pub(super) fn panels(&self) -> Option<&Buffer> {
        self.panels.as_deref()
    }
}
