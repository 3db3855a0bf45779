//! The inner loops of vector registers: MR × NR elements of C in them.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::buffer::{Buffer, Lent};
use super::pack::{Left, Operand};
use super::target::{Target, Task};
use super::unit::Unit;
use super::{Job, Start, Term};
use crate::simd::{Avx2, Avx512};

/// The registers of a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Registers {
    Any,
    Avx2(Avx2),
    Avx512(Avx512),
}

/// Rows and columns of C in 12 of AVX2's 16 registers, and in four times as many of NEON's.
const SMALL: (usize, usize) = (6, 16);
/// Rows and columns of C in 24 of AVX-512's 32 registers.
const LARGE: (usize, usize) = (12, 32);

impl Registers {
    /// Rows and columns of C in registers.
    fn tile(self) -> (usize, usize) {
        match self {
            Self::Any | Self::Avx2(_) => SMALL,
            Self::Avx512(_) => LARGE,
        }
    }
}

/// Columns of C that a task owns.
const TASK_COLUMNS: usize = 64;

/// Elements of the inner dimension that are multiplied before C is touched again: the left panel then fits the
/// first-level cache, and the right panels of a task the second.
pub(super) const INNER: usize = 768;

/// Elements of the inner dimension whose right panels are packed at one time: a block of a long operand and the low-rank
/// ones beside it.
const DEPTH: usize = 1024;

/// Packs a left operand: for each block of the inner dimension panels `[lanes / MR][inner][MR]`.
pub(super) fn pack_left(registers: Registers, rows: usize, inner: usize, operand: &Operand) -> Lent {
    // Panels that one worker packs at a time.
    const PANELS: usize = 16;
    let (mr, _) = registers.tile();
    let padded = rows.next_multiple_of(mr);
    let mut panels = Lent::floats(padded * inner);
    let mut rest = panels.floats_mut(padded * inner);
    for range in Unit::Registers(registers).blocks(inner) {
        let part;
        (part, rest) = rest.split_at_mut(padded * range.len());
        part.par_chunks_mut((PANELS * mr * range.len()).max(1)).enumerate().for_each(|(i, part)| {
            let first = i * PANELS * mr;
            pack_lanes(registers, operand, first..rows.min(first + PANELS * mr), range.clone(), part);
        });
    }
    panels
}

fn pack_lanes(registers: Registers, operand: &Operand, lanes: Range<usize>, inner: Range<usize>, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn on_avx2<const MR: usize>(
        proof: Avx2,
        operand: &Operand,
        lanes: Range<usize>,
        inner: Range<usize>,
        out: &mut [f32],
    ) {
        operand.pack::<MR>(Some(proof), lanes, inner, out);
    }
    match registers {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has the features.
        Registers::Avx512(proof) => unsafe { on_avx2::<{ LARGE.0 }>(proof.into(), operand, lanes, inner, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has the features.
        Registers::Avx2(proof) => unsafe { on_avx2::<{ SMALL.0 }>(proof, operand, lanes, inner, out) },
        _ => operand.pack::<{ SMALL.0 }>(None, lanes, inner, out),
    }
}

/// The panels of a block of a left operand.
fn block<'a>(left: &'a Left, mr: usize, range: Range<usize>) -> &'a [f32] {
    let padded = left.rows().next_multiple_of(mr);
    &left.panels().expect("an operand for registers is packed").floats()[padded * range.start..padded * range.end]
}

thread_local! {
    /// The right panels of the task under way.
    static RIGHT: Cell<Buffer> = const { Cell::new(Buffer::NEW) };
}

/// Computes jobs. The task that owns columns of C packs their part of R.
///
/// # Safety
/// The jobs' columns are disjoint, nothing else touches `target` meanwhile, and it is initialised where a job begins with
/// what C holds.
pub(super) unsafe fn compute(registers: Registers, rows: usize, jobs: &[Job], target: &Target) {
    let columns = |job: &Job| super::ranges(job.columns, TASK_COLUMNS);
    let tasks: Vec<_> = jobs.iter().flat_map(|job| columns(job).map(move |columns| (job, columns))).collect();
    // Whole columns go round evenly as long as there are as many left as threads; the rest is cut into rows, so that no
    // thread waits for a last long task.
    let threads = rayon::current_num_threads();
    let even = tasks.len() / threads * threads;
    let pieces = if even < tasks.len() { threads.div_ceil(tasks.len() - even) } else { 1 };
    let height = rows.div_ceil(pieces).next_multiple_of(registers.tile().0);
    let whole = tasks[..even].iter().map(|(job, columns)| (*job, columns.clone(), 0..rows));
    let cut = tasks[even..]
        .iter()
        .flat_map(|(job, columns)| super::ranges(rows, height).map(|rows| (*job, columns.clone(), rows)));
    let tasks: Vec<_> = whole.chain(cut).collect();
    tasks.into_par_iter().with_max_len(1).for_each(|(job, columns, rows)| {
        let mut right = RIGHT.take();
        // SAFETY: the tasks are disjoint, as jobs have disjoint columns and tasks of a job disjoint columns or disjoint
        // rows of the same columns; the caller's promise is passed on.
        unsafe { run(registers, &Task { job, columns, rows }, target, &mut right) };
        RIGHT.set(right);
    });
}

/// Computes a task, with a buffer for its right panels.
///
/// # Safety
/// No other thread may touch the task's elements of `target` meanwhile.
unsafe fn run(registers: Registers, task: &Task, target: &Target, right: &mut Buffer) {
    #[cfg(target_arch = "x86_64")]
    /// # Safety
    /// That of [`run`].
    #[target_feature(enable = "avx2,fma")]
    unsafe fn on_avx2(task: &Task, target: &Target, proof: Avx2, right: &mut Buffer) {
        // SAFETY: the caller's promise is passed on.
        unsafe { body::<true, { SMALL.0 }, { SMALL.1 }>(Some(proof), task, target, right) }
    }
    #[cfg(target_arch = "x86_64")]
    /// # Safety
    /// That of [`run`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    unsafe fn on_avx512(task: &Task, target: &Target, proof: Avx2, right: &mut Buffer) {
        // SAFETY: the caller's promise is passed on.
        unsafe { body::<true, { LARGE.0 }, { LARGE.1 }>(Some(proof), task, target, right) }
    }
    match registers {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has the features; the caller's promise is passed on.
        Registers::Avx512(proof) => unsafe { on_avx512(task, target, proof.into(), right) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has the features; the caller's promise is passed on.
        Registers::Avx2(proof) => unsafe { on_avx2(task, target, proof, right) },
        // On x86 without FMA a fused operation would be a call into the C library.
        // SAFETY: the caller's promise is passed on.
        _ => unsafe {
            body::<{ cfg!(not(target_arch = "x86_64")) }, { SMALL.0 }, { SMALL.1 }>(None, task, target, right);
        },
    }
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
unsafe fn body<const FMA: bool, const MR: usize, const NR: usize>(
    avx2: Option<Avx2>,
    task: &Task,
    target: &Target,
    buffer: &mut Buffer,
) {
    let Task { job, columns, rows } = task;
    let panels = columns.len().div_ceil(NR);
    let mut blocks = job
        .terms
        .iter()
        .flat_map(|Term { left, right }| {
            left.unit().blocks(left.inner()).map(move |inner| (right, inner.clone(), block(left, MR, inner)))
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
                    sums = multiply::<FMA, MR, NR>(sums, left, right);
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
fn multiply<const FMA: bool, const MR: usize, const NR: usize>(
    mut sums: [[f32; NR]; MR],
    left: &[f32],
    right: &[f32],
) -> [[f32; NR]; MR] {
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
