//! The loops around the kernels.

use std::cell::Cell;
use std::ops::Range;

use rayon::prelude::*;

use super::kernel::{Configured, SIDE, Sums};
use super::plan::{Stretch, Strip, groups, strips, tasks};
use super::{Amx, ROWS, pack};
use crate::gemm::buffer::{Buffer, Lent, Tile};
use crate::gemm::pack::{Left, MAX_COLUMNS};
use crate::gemm::target::{Target, Task};
use crate::gemm::{Job, Start, ranges};

/// Columns that a worker packs at a time.
const PACKED_COLUMNS: usize = 192;

/// Steps after which the next columns are taken up: the left tiles of so many, 24 KiB, stay in the first-level cache
/// beside the others.
const NEAR_STEPS: usize = 4;

thread_local! {
    /// The left tiles of the task under way.
    static LEFT: Cell<Buffer> = const { Cell::new(Buffer::NEW) };
}

/// Computes jobs. Right tiles are packed once and shared by the tasks; left ones are packed by the task that multiplies
/// their rows, in its own cache.
///
/// # Safety
/// The jobs' columns are disjoint, nothing else touches `target` meanwhile, and it is initialised where a job begins with
/// what C holds.
pub(in crate::gemm) unsafe fn compute(proof: Amx, rows: usize, jobs: &[Job], target: &Target) {
    for group in groups(jobs) {
        let mut right = Lent::tiles(group.tiles);
        let mut rest = right.tiles_mut(group.tiles);
        let mut parts = Vec::new();
        for sheet in &group.sheets {
            for stretch in sheet.rounds.iter().flatten() {
                for columns in ranges(sheet.columns.len(), PACKED_COLUMNS) {
                    let part;
                    (part, rest) =
                        rest.split_at_mut(columns.len().div_ceil(ROWS) * stretch.steps * stretch.pieces.right());
                    let first = sheet.columns.start;
                    parts.push((stretch, first + columns.start..first + columns.end, part));
                }
            }
        }
        parts.into_par_iter().with_max_len(1).for_each(|(stretch, columns, tiles)| {
            // SAFETY: the processor has the features, as the proof says.
            unsafe { pack::right(&stretch.term.right, columns, stretch.inner.clone(), stretch.pieces.right(), tiles) };
        });
        let (right, strips) = (right.tiles(), strips(&group.sheets));
        let tasks = tasks(&strips, rows, rayon::current_num_threads());
        tasks.into_par_iter().with_max_len(1).for_each(|(rows, strips)| {
            let mut left = LEFT.take();
            // SAFETY: the processor has the features, as the proof says. Tasks are disjoint: sheets have disjoint columns,
            // strips of a sheet too, and tasks of the same strips have disjoint rows.
            unsafe { run(proof, strips, rows, target, &mut left, right) };
            LEFT.set(left);
        });
    }
}

/// Left tiles that are packed: those of some rows of a block of an operand.
struct Packed {
    operand: *const Left<'static>,
    inner: usize,
    /// Of each element.
    pieces: usize,
    first: usize,
}

/// Computes some rows of some strips.
///
/// # Safety
/// The processor has AVX-512. No other thread may touch these elements of `target` meanwhile, and they are initialised
/// where a job begins with what C holds.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn run(proof: Amx, strips: &[Strip], rows: Range<usize>, target: &Target, buffer: &mut Buffer, right: &[Tile]) {
    let panels = rows.len().div_ceil(ROWS);
    let configured = Configured::new(proof);
    let mut sums = [Sums::ZERO; MAX_COLUMNS / SIDE];
    let rounds = strips.iter().map(|strip| strip.sheet.rounds.len()).max().unwrap_or(0);
    for round in 0..rounds {
        // Jobs share operands.
        let (mut packed, mut used) = (Vec::<Packed>::new(), 0);
        for strip in strips {
            let Some(stretches) = strip.sheet.rounds.get(round) else { continue };
            let mut place = |Stretch { term, inner, steps, pieces, .. }: &Stretch| {
                let (operand, pieces) = (std::ptr::from_ref(term.left).cast(), pieces.left());
                let wanted = (operand, inner.start, pieces);
                let known = packed.iter().find(|packed| (packed.operand, packed.inner, packed.pieces) == wanted);
                if let Some(known) = known {
                    return known.first;
                }
                let (first, count) = (used, panels * steps * pieces);
                used += count;
                let tiles = &mut buffer.tiles_mut(used)[first..];
                pack::left(term.left.operand(), rows.clone(), inner.clone(), pieces, tiles);
                packed.push(Packed { operand, inner: inner.start, pieces, first });
                first
            };
            let places: Vec<usize> = stretches.iter().map(&mut place).collect();
            let tiles = buffer.tiles();
            let stretches: Vec<(&Stretch, &[Tile])> =
                stretches.iter().zip(places).map(|(stretch, first)| (stretch, &tiles[first..])).collect();
            let task = Task { job: strip.sheet.job, columns: strip.columns.clone(), rows: rows.clone() };
            let first_panel = (strip.columns.start - strip.sheet.columns.start) / ROWS;
            // Every round before this one wrote all elements.
            let start = if round == 0 { task.job.start } else { Start::Kept };
            // SAFETY: the features are those of this function; the caller's promise is passed on.
            unsafe { run_strip(&configured, &task, &stretches, right, first_panel, start, target, &mut sums) };
        }
    }
}

/// Computes one round of a task. `stretches` come with the left tiles of the task's rows; its columns begin with the
/// `first_panel`th of those that were packed.
///
/// # Safety
/// That of [`run`], and that elements are initialised if `start` keeps them.
#[expect(clippy::too_many_arguments, reason = "the inside of a loop")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn run_strip(
    configured: &Configured,
    task: &Task,
    stretches: &[(&Stretch, &[Tile])],
    right: &[Tile],
    first_panel: usize,
    start: Start,
    target: &Target,
    sums: &mut [Sums],
) {
    let Task { columns, rows, .. } = task;
    let panels = columns.len().div_ceil(ROWS);
    let end = rows.len().div_ceil(ROWS);
    for panel in (0..end).step_by(2) {
        let first_row = rows.start + panel * ROWS;
        let rows_of_panels = first_row..rows.end.min(first_row + SIDE);
        let mut fresh = true;
        for (Stretch { steps, pieces, first, .. }, left) in stretches {
            let (of_left, of_right) = (pieces.left(), pieces.right());
            let right = &right[first + first_panel * steps * of_right..];
            for near in ranges(*steps, NEAR_STEPS) {
                let last = near.end == *steps;
                let left = |panel: usize| &left[panel * steps * of_left..][near.start * of_left..near.end * of_left];
                let right = |j: usize| &right[j * steps * of_right..][near.start * of_right..near.end * of_right];
                // A last panel is multiplied twice, and the second result is not read.
                let now = [left(panel), left((panel + 1).min(end - 1))];
                for (j, sums) in (0..panels).step_by(2).zip(&mut *sums) {
                    if last {
                        let (column, count) = (columns.start + j * ROWS, SIDE.min(columns.len() - j * ROWS));
                        rows_of_panels.clone().for_each(|row| task.prefetch(target, row, column, count));
                    }
                    let second = (j + 1 < panels).then(|| right(j + 1));
                    configured.multiply(sums, fresh, now, right(j), second, *pieces);
                }
                fresh = false;
            }
        }
        if fresh {
            sums.fill(Sums::ZERO);
        }
        // Row by row, for neighbouring lines come from memory faster.
        for (i, row) in rows_of_panels.enumerate() {
            for (column, sums) in columns.clone().step_by(SIDE).zip(&*sums) {
                // SAFETY: the task owns these elements, and they are initialised where that is needed, as the caller
                // promises.
                unsafe { task.write(target, row, column, start, &sums.0[i]) };
            }
        }
    }
}
