//! Panels: W neighbouring lanes of an operand, element by element of the inner dimension, as the registers take them.

use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;

use super::tile::MR;
use crate::simd::{Avx2, interleave};

/// A matrix that is read row by row, and may be made while it is read.
pub(crate) trait Source: Sync {
    /// Writes the elements `first..first + out.len()` of `row`.
    fn read(&self, row: usize, first: usize, out: &mut [f32]);

    /// Asks the processor to fetch what reading `count` elements of `row` will need. A row that there is not is ignored.
    fn prefetch(&self, _row: usize, _first: usize, _count: usize) {}
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
    source: &'a dyn Source,
    lanes: Lanes,
}

/// Elements of the inner dimension that are multiplied before C is touched again: the left panel then fits the
/// first-level cache, and the right panels of a task the second.
const INNER: usize = 768;

/// Elements of a row that are read at one time where lanes are rows: W of these stay in the first-level cache.
const CHUNK: usize = 64;

/// Chunks, and rows where lanes are columns, that are asked for before they are read: a panel jumps from row to row, which
/// the processor does not foresee, and a weight comes from memory.
const CHUNKS_AHEAD: usize = 4;
const ROWS_AHEAD: usize = 16;

/// Widest range of columns that are read at one time where lanes are columns.
pub(super) const MAX_COLUMNS: usize = 256;

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
                let mut row = [0f32; MAX_COLUMNS];
                let row = &mut row[..lanes.len().next_multiple_of(W).min(MAX_COLUMNS)];
                for ahead in inner.clone().take(ROWS_AHEAD) {
                    self.source.prefetch(ahead, lanes.start, lanes.len());
                }
                for (k, source_row) in inner.clone().enumerate() {
                    if source_row + ROWS_AHEAD < inner.end {
                        self.source.prefetch(source_row + ROWS_AHEAD, lanes.start, lanes.len());
                    }
                    self.source.read(source_row, lanes.start, &mut row[..lanes.len()]);
                    for (panel, values) in out.chunks_exact_mut(depth * W).zip(row.chunks(W)) {
                        panel[k * W..][..values.len()].copy_from_slice(values);
                        panel[k * W + values.len()..(k + 1) * W].fill(0.0);
                    }
                }
            }
        }
    }
}

/// L, packed: shared by every product with it.
pub(crate) struct Left {
    buffer: Vec<f32>,
    rows: usize,
    inner: usize,
}

/// Buffers of operands that are gone, so that the next ones need no fresh memory.
static BUFFERS: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

/// More are never in use at one time by one thread that multiplies.
const KEPT_BUFFERS: usize = 4;

fn buffers() -> std::sync::MutexGuard<'static, Vec<Vec<f32>>> {
    BUFFERS.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Left {
    /// Packs an operand of `rows` lanes and `inner` elements.
    pub(crate) fn pack(rows: usize, inner: usize, operand: Operand) -> Self {
        // Panels that one worker packs at a time.
        const PANELS: usize = 16;
        let padded = rows.next_multiple_of(MR);
        let mut buffer = take_buffer(padded * inner);
        let mut rest = &mut buffer[..padded * inner];
        for range in blocks(inner) {
            let part;
            (part, rest) = rest.split_at_mut(padded * range.len());
            part.par_chunks_mut((PANELS * MR * range.len()).max(1)).enumerate().for_each(|(i, part)| {
                let first = i * PANELS * MR;
                super::tile::pack_left(&operand, first..rows.min(first + PANELS * MR), range.clone(), part);
            });
        }
        Self { buffer, rows, inner }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// The blocks of the inner dimension, each with its panels `[rows / MR][len][MR]`.
    pub(super) fn blocks(&self) -> impl Iterator<Item = (Range<usize>, &[f32])> {
        let padded = self.rows.next_multiple_of(MR);
        blocks(self.inner).map(move |range| (range.clone(), &self.buffer[padded * range.start..padded * range.end]))
    }
}

impl Drop for Left {
    fn drop(&mut self) {
        let mut kept = buffers();
        if kept.len() < KEPT_BUFFERS {
            kept.push(std::mem::take(&mut self.buffer));
        }
    }
}

/// A buffer of at least `len` elements; what it holds is left over from earlier.
fn take_buffer(len: usize) -> Vec<f32> {
    let mut kept = buffers();
    // The smallest that is large enough, else the largest, which then grows.
    let fitting = (0..kept.len()).filter(|&i| kept[i].len() >= len).min_by_key(|&i| kept[i].len());
    let chosen = fitting.or_else(|| (0..kept.len()).max_by_key(|&i| kept[i].len()));
    let mut buffer = chosen.map(|i| kept.swap_remove(i)).unwrap_or_default();
    drop(kept);
    if buffer.len() < len {
        buffer = Vec::new(); // freed first: a growing vector would copy what nobody needs
        buffer.resize(len, 0.0);
    }
    buffer
}

/// The inner dimension in equal blocks of at most [`INNER`] elements.
fn blocks(inner: usize) -> impl Iterator<Item = Range<usize>> {
    super::ranges(inner, inner.div_ceil(inner.div_ceil(INNER).max(1)))
}
