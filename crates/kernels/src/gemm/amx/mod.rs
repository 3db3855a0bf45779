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

use std::sync::OnceLock;

use super::Start;
use super::buffer::{Buffer, Lent, Tile};
use super::pack::Operand;
use super::target::{Target, Task};
use super::unit::Unit;
use kernel::{Configured, Sums};

/// Rows of C that one tile holds.
pub(super) const ROWS: usize = Tile::ROWS;
/// Elements of the inner dimension in a tile.
pub(super) const STEP: usize = Tile::DEPTH;

/// Elements of the inner dimension that are multiplied before C is touched again.
pub(super) const INNER: usize = 768;

/// Elements of the inner dimension whose right panels are packed at one time.
const DEPTH: usize = 1024;

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
    let vectors = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma");
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

/// As wide as keeps all threads busy: the wider, the less often the left operand is read.
pub(super) fn task_columns(columns: usize, threads: usize) -> usize {
    columns.div_ceil(threads).next_multiple_of(2 * Tile::ROWS).clamp(64, super::pack::MAX_COLUMNS)
}

/// Packs a left operand: for each block of the inner dimension tiles `[lanes / 16][steps][pieces]`, each with a lane per
/// row.
pub(super) fn pack_left(proof: Amx, rows: usize, inner: usize, operand: &Operand) -> Lent {
    // SAFETY: the processor has the features, as the proof says.
    unsafe { pack::left(Unit::Amx(proof), rows, inner, operand) }
}

/// A stretch of the inner dimension: left tiles, and the place of the right ones in the task's buffer.
struct Stretch<'a> {
    left: &'a [Tile],
    right: usize,
    steps: usize,
    /// Of each element on the right.
    pieces: usize,
}

/// Computes a task, with a buffer for its right tiles.
///
/// # Safety
/// No other thread may touch the task's elements of `target` meanwhile.
pub(super) unsafe fn run(proof: Amx, task: &Task, target: &Target, right: &mut Buffer) {
    // SAFETY: the processor has the features, as the proof says; the caller's promise is passed on.
    unsafe { run_on_avx512(proof, task, target, right) }
}

/// # Safety
/// That of [`run`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn run_on_avx512(proof: Amx, task: &Task, target: &Target, buffer: &mut Buffer) {
    let Task { job, columns, rows } = task;
    let panels = columns.len().div_ceil(Tile::ROWS);
    let mut blocks = job
        .terms
        .iter()
        .flat_map(|term| term.left.unit().blocks(term.left.inner()).map(move |inner| (term, inner)))
        .peekable();
    let configured = Configured::new(proof);
    let mut start = job.start;
    loop {
        // As many stretches as fit the buffer go into the same sums.
        let mut stretches: Vec<Stretch> = Vec::with_capacity(4);
        let (mut depth, mut used) = (0, 0);
        while let Some((term, inner)) = blocks.next_if(|(_, inner)| depth == 0 || depth + inner.len() <= DEPTH) {
            let (steps, pieces) = (inner.len().div_ceil(STEP), pack::right_pieces(&term.right));
            let left_panels = term.left.rows().div_ceil(ROWS) * PIECES;
            let left = &term.left.panels().tiles()[left_panels * (inner.start / STEP)..][..left_panels * steps];
            let count = panels * steps * pieces;
            depth += inner.len();
            pack::right(&term.right, columns.clone(), inner, pieces, &mut buffer.tiles_mut(used + count)[used..]);
            stretches.push(Stretch { left, right: used, steps, pieces });
            used += count;
        }
        let right = buffer.tiles();
        let end = rows.end.div_ceil(ROWS);
        for panel in (rows.start / ROWS..end).step_by(2) {
            for j in (0..panels).step_by(2) {
                let mut sums = Sums::ZERO;
                for Stretch { left, right: from, steps, pieces } in &stretches {
                    let left = |panel: usize| &left[panel * steps * PIECES..][..steps * PIECES];
                    let right = |panel: usize| &right[from + panel * steps * pieces..][..steps * pieces];
                    // A last panel is multiplied twice, and the second result is not read.
                    let left = [left(panel), left((panel + 1).min(end - 1))];
                    configured.multiply(&mut sums, left, right(j), (j + 1 < panels).then(|| right(j + 1)), *pieces);
                }
                let first = panel * ROWS;
                for (row, sums) in (first..rows.end).zip(&sums.0) {
                    // SAFETY: the task owns these elements, as the caller promises. `Kept` is what the caller asks for
                    // an initialised C, and what follows the first round, which wrote every element.
                    unsafe { task.write(target, row, columns.start + j * Tile::ROWS, start, sums) };
                }
            }
        }
        start = Start::Kept;
        if blocks.peek().is_none() {
            return;
        }
    }
}
