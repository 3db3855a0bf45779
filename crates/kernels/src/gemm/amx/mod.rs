//! Intel's matrix unit (AMX): tiles of 16-bit numbers, multiplied into tiles of f32.
//!
//! It takes bf16, whose numbers have 8 significant bits, but its products are exact and its sums are f32's. An f32 with
//! its 24 bits is the sum of three bf16, so x · w is computed as
//!
//! ```text
//! w in bf16:  (x₀ + x₁ + x₂) · w                                           exact before it is summed
//! w in f32:   x₀w₀ + x₁w₀ + x₂w₀ + x₀w₁ + x₁w₁ + x₀w₂ (+ terms below 2⁻²⁴)   as f32 rounds a product
//! ```
//!
//! which is f32 arithmetic at several times the rate of the vector registers (the scheme of Henry, Tang & Heinecke,
//! *Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations*, 2019). Two differences are
//! left: numbers below 2⁻¹²⁶ count as zero, and an infinite operand makes NaN rather than an infinity.

mod kernel;
mod pack;

use std::ops::Range;
use std::sync::OnceLock;

use rayon::prelude::*;

use super::buffer::{Lent, Tile};
use super::pack::{MAX_COLUMNS, Operand};
use super::target::{Target, Task};
use super::unit::Unit;
use super::{Job, Start, Term};
use crate::simd::Avx512;
use kernel::{Configured, SIDE, Sums};

/// Rows of C that one tile holds.
pub(super) const ROWS: usize = Tile::ROWS;
/// Elements of the inner dimension in a tile.
pub(super) const STEP: usize = Tile::DEPTH;

/// Elements of the inner dimension in a block of an operand.
pub(super) const INNER: usize = 768;

/// Elements of the inner dimension whose right tiles are multiplied before C is touched again: they stay in the
/// second-level cache.
const DEPTH: usize = 1024;

/// Steps after which the next columns are taken up: the left tiles of so many, 24 KiB, stay in the first-level cache
/// beside the others.
const NEAR_STEPS: usize = 4;

/// Pieces of an f32.
const PIECES: usize = 3;

/// The proof that the processor has AMX with bf16 and AVX-512, and that the system lets this process use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Amx(());

impl Amx {
    pub(super) fn detect() -> Option<Self> {
        static FOUND: OnceLock<bool> = OnceLock::new();
        FOUND.get_or_init(|| has_features() && asks_for_tiles()).then_some(Self(()))
    }
}

fn has_features() -> bool {
    // Leaf 7 tells of tiles in bit 24 and of products of bf16 in bit 22 of EDX.
    const AMX_BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    let vectors = Avx512::detect().is_some();
    // Processors with AVX-512 have leaf 7.
    vectors && std::arch::x86_64::__cpuid_count(7, 0).edx & AMX_BF16_AND_TILE == AMX_BF16_AND_TILE
}

/// Tile registers are large, so Linux saves them only for processes that have asked for them.
fn asks_for_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and reads no memory; where the kernel does not know it, it answers an error.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// Packs a left operand: for each block of the inner dimension tiles `[lanes / 16][steps][pieces]`, each with a lane per
/// row.
pub(super) fn pack_left(proof: Amx, rows: usize, inner: usize, operand: &Operand) -> Lent {
    // SAFETY: the processor has the features, as the proof says.
    unsafe { pack::left(Unit::Amx(proof), rows, inner, operand) }
}

/// A block of one term's inner dimension.
struct Stretch<'a> {
    term: &'a Term<'a>,
    inner: Range<usize>,
    steps: usize,
    /// Of each element on the right.
    pieces: usize,
    /// Where its right tiles `[columns / 16][steps][pieces]` begin.
    first: usize,
}

/// Columns of a job whose right tiles exist at one time.
struct Sheet<'a> {
    job: &'a Job<'a>,
    /// Counted from the job's first.
    columns: Range<usize>,
    stretches: Vec<Stretch<'a>>,
}

/// Right tiles for one product: 4 MiB, so that all cores find them in the cache that they share.
const SHEETS_TILES: usize = (4 << 20) / size_of::<Tile>();

/// Columns that a worker packs at a time.
const PACKED_COLUMNS: usize = 96;

/// The columns of all jobs, in groups that are packed and multiplied one after the other, and the tiles of each group.
fn groups<'a>(jobs: &'a [Job<'a>]) -> Vec<(Vec<Sheet<'a>>, usize)> {
    let mut groups: Vec<(Vec<Sheet>, usize)> = Vec::new();
    for job in jobs {
        let stretches = |first: usize, panels: usize| {
            let blocks = job
                .terms
                .iter()
                .flat_map(|term| term.left.unit().blocks(term.left.inner()).map(move |inner| (term, inner)));
            let mut next = first;
            let stretches: Vec<Stretch> = blocks
                .map(|(term, inner)| {
                    let (steps, pieces) = (inner.len().div_ceil(STEP), pack::right_pieces(&term.right));
                    let first = next;
                    next += panels * steps * pieces;
                    Stretch { term, inner, steps, pieces, first }
                })
                .collect();
            (stretches, next)
        };
        let (_, of_a_panel) = stretches(0, 1);
        let most = (SHEETS_TILES / of_a_panel.max(1) * ROWS).clamp(MAX_COLUMNS, job.columns.max(MAX_COLUMNS));
        for columns in super::ranges(job.columns, most) {
            let panels = columns.len().div_ceil(ROWS);
            if groups.last().is_none_or(|(_, used)| used + panels * of_a_panel > SHEETS_TILES) {
                groups.push((Vec::new(), 0));
            }
            let (sheets, used) = groups.last_mut().expect("one was pushed");
            let (stretches, next) = stretches(*used, panels);
            *used = next;
            sheets.push(Sheet { job, columns, stretches });
        }
    }
    groups
}

/// Computes jobs. Right tiles are packed once and shared by the tasks.
///
/// # Safety
/// The jobs' columns are disjoint, nothing else touches `target` meanwhile, and it is initialised where a job begins with
/// what C holds.
pub(super) unsafe fn compute(proof: Amx, rows: usize, jobs: &[Job], target: &Target) {
    for (sheets, count) in groups(jobs) {
        let mut right = Lent::tiles(count);
        let mut rest = right.tiles_mut(count);
        let mut parts = Vec::new();
        for sheet in &sheets {
            for stretch in &sheet.stretches {
                for columns in super::ranges(sheet.columns.len(), PACKED_COLUMNS) {
                    let part;
                    let panels = columns.len().div_ceil(ROWS);
                    (part, rest) = rest.split_at_mut(panels * stretch.steps * stretch.pieces);
                    let first = sheet.columns.start;
                    parts.push((stretch, first + columns.start..first + columns.end, part));
                }
            }
        }
        parts.into_par_iter().with_max_len(1).for_each(|(stretch, columns, tiles)| {
            // SAFETY: the processor has the features, as the proof says.
            unsafe { pack::right(&stretch.term.right, columns, stretch.inner.clone(), stretch.pieces, tiles) };
        });
        let right = right.tiles();
        tasks(&sheets, rows).into_par_iter().with_max_len(1).for_each(|(sheet, columns, rows)| {
            let task = Task { job: sheet.job, columns, rows };
            // SAFETY: the processor has the features, as the proof says. Tasks are disjoint: sheets have disjoint columns,
            // and tasks of a sheet disjoint columns or disjoint rows.
            unsafe { run(proof, sheet, &task, target, right) };
        });
    }
}

/// Columns and rows that are computed at a time: few enough that the right tiles of a stretch stay in the second-level
/// cache, and that no core waits long for the last task of another.
fn tasks<'a, 'b>(sheets: &'b [Sheet<'a>], rows: usize) -> Vec<(&'b Sheet<'a>, Range<usize>, Range<usize>)> {
    /// Bytes of that cache for right tiles.
    const RIGHT_BYTES: usize = 1 << 20;
    const TASKS_PER_THREAD: usize = 2;
    let mut strips = Vec::new();
    for sheet in sheets {
        let bytes = |stretch: &Stretch| stretch.steps * stretch.pieces * size_of::<Tile>() / ROWS;
        let most = RIGHT_BYTES / sheet.stretches.iter().map(bytes).max().unwrap_or(0).max(1);
        let count = sheet.columns.len().div_ceil(most.clamp(2 * SIDE, MAX_COLUMNS)).max(1);
        let width = sheet.columns.len().div_ceil(count).next_multiple_of(SIDE).min(MAX_COLUMNS);
        let first = sheet.columns.start;
        strips.extend(
            super::ranges(sheet.columns.len(), width).map(|part| (sheet, first + part.start..first + part.end)),
        );
    }
    let wanted = (TASKS_PER_THREAD * rayon::current_num_threads()).div_ceil(strips.len().max(1));
    let height = rows.div_ceil(wanted).next_multiple_of(SIDE).max(2 * SIDE);
    let cut = |(sheet, columns): (&'b Sheet<'a>, Range<usize>)| {
        super::ranges(rows, height).map(move |rows| (sheet, columns.clone(), rows))
    };
    strips.into_iter().flat_map(cut).collect()
}

/// Computes a task with the right tiles of its sheet.
///
/// # Safety
/// No other thread may touch the task's elements of `target` meanwhile, and they are initialised where the job begins with
/// what C holds.
unsafe fn run(proof: Amx, sheet: &Sheet, task: &Task, target: &Target, right: &[Tile]) {
    // SAFETY: the processor has the features, as the proof says; the caller's promise is passed on.
    unsafe { run_on_avx512(proof, sheet, task, target, right) }
}

/// # Safety
/// That of [`run`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn run_on_avx512(proof: Amx, sheet: &Sheet, task: &Task, target: &Target, right: &[Tile]) {
    let Task { job, columns, rows } = task;
    let panels = columns.len().div_ceil(ROWS);
    let first_panel = (columns.start - sheet.columns.start) / ROWS;
    let end = rows.end.div_ceil(ROWS);
    let configured = Configured::new(proof);
    let mut sums = [Sums::ZERO; MAX_COLUMNS / SIDE];
    let mut start = job.start;
    let mut waiting = &sheet.stretches[..];
    loop {
        // As many stretches as one cache holds go into the same sums.
        let mut depth = 0;
        let more = waiting.iter().take_while(|stretch| {
            depth += stretch.inner.len();
            depth <= DEPTH
        });
        let stretches;
        (stretches, waiting) = waiting.split_at(more.count().max(1).min(waiting.len()));
        for panel in (rows.start / ROWS..end).step_by(2) {
            let rows_of_panels = panel * ROWS..rows.end.min((panel + 2) * ROWS);
            let mut fresh = true;
            for Stretch { term, inner, steps, pieces, first } in stretches {
                let left = pack::left_block(term.left, inner);
                let right = &right[first + first_panel * steps * pieces..];
                for near in super::ranges(*steps, NEAR_STEPS) {
                    let last = near.end == *steps;
                    let left = |panel: usize| &left[panel * steps * PIECES..][near.start * PIECES..near.end * PIECES];
                    let right = |j: usize| &right[j * steps * pieces..][near.start * pieces..near.end * pieces];
                    // A last panel is multiplied twice, and the second result is not read.
                    let now = [left(panel), left((panel + 1).min(end - 1))];
                    for (j, sums) in (0..panels).step_by(2).zip(&mut sums) {
                        let second = (j + 1 < panels).then(|| right(j + 1));
                        if last {
                            let (column, count) = (columns.start + j * ROWS, SIDE.min(columns.len() - j * ROWS));
                            rows_of_panels.clone().for_each(|row| task.prefetch(target, row, column, count));
                        }
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
                for (column, sums) in columns.clone().step_by(SIDE).zip(&sums) {
                    // SAFETY: the task owns these elements, as the caller promises. `Kept` is what the caller asks for an
                    // initialised C, and what follows the first round, which wrote every element.
                    unsafe { task.write(target, row, column, start, &sums.0[i]) };
                }
            }
        }
        start = Start::Kept;
        if waiting.is_empty() {
            return;
        }
    }
}
