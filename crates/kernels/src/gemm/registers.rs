//! The inner loops of vector registers: [`MR`] × [`NR`] elements of C in them, for AVX2 and for any other processor.

use std::ops::Range;

use rayon::prelude::*;

use super::buffer::{Buffer, Lent};
use super::pack::{Left, Operand};
use super::target::{Target, Task};
use super::unit::Unit;
use super::{Start, Term};
use crate::simd::Avx2;

/// Rows of C in registers. With [`NR`] this fills 12 of AVX2's 16 registers with sums.
pub(super) const MR: usize = 6;
/// Columns of C in registers: two AVX2 registers, four of NEON.
const NR: usize = 16;

/// Columns of C that a task owns.
pub(super) const TASK_COLUMNS: usize = 4 * NR;

/// Elements of the inner dimension that are multiplied before C is touched again: the left panel then fits the
/// first-level cache, and the right panels of a task the second.
pub(super) const INNER: usize = 768;

/// Elements of the inner dimension whose right panels are packed at one time: a block of a long operand and the low-rank
/// ones beside it.
const DEPTH: usize = 1024;

type Sums = [[f32; NR]; MR];

/// Packs a left operand: for each block of the inner dimension panels `[lanes / MR][inner][MR]`.
pub(super) fn pack_left(unit: Unit, avx2: Option<Avx2>, rows: usize, inner: usize, operand: &Operand) -> Lent {
    // Panels that one worker packs at a time.
    const PANELS: usize = 16;
    let padded = rows.next_multiple_of(MR);
    let mut panels = Lent::floats(padded * inner);
    let mut rest = panels.floats_mut(padded * inner);
    for range in unit.blocks(inner) {
        let part;
        (part, rest) = rest.split_at_mut(padded * range.len());
        part.par_chunks_mut((PANELS * MR * range.len()).max(1)).enumerate().for_each(|(i, part)| {
            let first = i * PANELS * MR;
            pack_lanes(avx2, operand, first..rows.min(first + PANELS * MR), range.clone(), part);
        });
    }
    panels
}

fn pack_lanes(avx2: Option<Avx2>, operand: &Operand, lanes: Range<usize>, inner: Range<usize>, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if let Some(proof) = avx2 {
        #[target_feature(enable = "avx2,fma")]
        fn on_avx2(proof: Avx2, operand: &Operand, lanes: Range<usize>, inner: Range<usize>, out: &mut [f32]) {
            operand.pack::<MR>(Some(proof), lanes, inner, out);
        }
        // SAFETY: the processor has the features.
        return unsafe { on_avx2(proof, operand, lanes, inner, out) };
    }
    operand.pack::<MR>(avx2, lanes, inner, out);
}

/// The panels of a block of a left operand.
fn block(left: &Left, range: Range<usize>) -> &[f32] {
    let padded = left.rows().next_multiple_of(MR);
    &left.panels().floats()[padded * range.start..padded * range.end]
}

/// Computes a task, with a buffer for its right panels.
///
/// # Safety
/// No other thread may touch the task's elements of `target` meanwhile.
pub(super) unsafe fn run(avx2: Option<Avx2>, task: &Task, target: &Target, right: &mut Buffer) {
    #[cfg(target_arch = "x86_64")]
    if let Some(proof) = avx2 {
        /// # Safety
        /// That of [`run`].
        #[target_feature(enable = "avx2,fma")]
        unsafe fn on_avx2(proof: Avx2, task: &Task, target: &Target, right: &mut Buffer) {
            // SAFETY: the caller's promise is passed on.
            unsafe { body::<true>(Some(proof), task, target, right) }
        }
        // SAFETY: the processor has the features; the caller's promise is passed on.
        return unsafe { on_avx2(proof, task, target, right) };
    }
    // On x86 without FMA a fused operation would be a call into the C library.
    // SAFETY: the caller's promise is passed on.
    unsafe { body::<{ cfg!(not(target_arch = "x86_64")) }>(avx2, task, target, right) }
}

/// A stretch of the inner dimension: left panels, and the place of the right ones in the task's buffer.
struct Stretch<'a> {
    left: &'a [f32],
    right: usize,
    depth: usize,
}

/// # Safety
/// That of [`run`].
#[inline(always)]
unsafe fn body<const FMA: bool>(avx2: Option<Avx2>, task: &Task, target: &Target, buffer: &mut Buffer) {
    let Task { job, columns, rows } = task;
    let panels = columns.len().div_ceil(NR);
    let mut blocks = job
        .terms
        .iter()
        .flat_map(|Term { left, right }| {
            left.unit().blocks(left.inner()).map(move |inner| (right, inner.clone(), block(left, inner)))
        })
        .peekable();
    let mut start = job.start;
    loop {
        // As many stretches as fit the buffer go into the same sums.
        let mut stretches: Vec<Stretch> = Vec::with_capacity(4);
        let mut depth = 0;
        while let Some((operand, inner, left)) =
            blocks.next_if(|(_, inner, _)| depth == 0 || depth + inner.len() <= DEPTH)
        {
            let (from, len) = (depth * panels * NR, inner.len() * panels * NR);
            depth += inner.len();
            stretches.push(Stretch { left, right: from, depth: inner.len() });
            operand.pack::<NR>(avx2, columns.clone(), inner, &mut buffer.floats_mut(from + len)[from..]);
        }
        let right = buffer.floats();
        for panel in rows.start / MR..rows.end.div_ceil(MR) {
            let height = MR.min(rows.end - panel * MR);
            for j in 0..panels {
                let mut sums = [[0f32; NR]; MR];
                for Stretch { left, right: from, depth } in &stretches {
                    let left = &left[panel * MR * depth..][..MR * depth];
                    let right = &right[from + j * NR * depth..][..NR * depth];
                    sums = multiply::<FMA>(sums, left, right);
                }
                for (i, sums) in sums[..height].iter().enumerate() {
                    // SAFETY: the task owns these elements, as the caller promises. `Kept` is what the caller asks for an
                    // initialised C, and what follows the first round, which wrote every element.
                    unsafe { task.write(target, panel * MR + i, columns.start + j * NR, start, sums) };
                }
            }
        }
        start = Start::Kept;
        if blocks.peek().is_none() {
            return;
        }
    }
}

/// `sums` + left panel · right panel.
#[inline(always)]
fn multiply<const FMA: bool>(mut sums: Sums, left: &[f32], right: &[f32]) -> Sums {
    let (left, right) = (left.as_chunks::<MR>().0, right.as_chunks::<NR>().0);
    for (l, r) in left.iter().zip(right) {
        for i in 0..MR {
            for j in 0..NR {
                sums[i][j] = if FMA { l[i].mul_add(r[j], sums[i][j]) } else { l[i] * r[j] + sums[i][j] };
            }
        }
    }
    sums
}
