//! What multiplies: vector registers, or the processor's matrix unit.

use std::ops::Range;
use std::sync::OnceLock;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::amx::{self, Amx};
use super::buffer::{Buffer, Lent};
use super::pack::Operand;
use super::registers;
use super::target::{Target, Task};
use crate::simd::Avx2;

/// The parts of a processor that can compute a product. Both operands are packed for one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Vector registers.
    Registers(Option<Avx2>),
    /// Intel's tile registers.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(Amx),
}

impl Unit {
    /// The fastest that this processor has.
    pub(crate) fn best() -> Self {
        static BEST: OnceLock<Unit> = OnceLock::new();
        *BEST.get_or_init(|| Self::all().pop().expect("every processor has registers"))
    }

    /// All that this processor has, the fastest last.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![Self::Registers(None)];
        all.extend(Avx2::detect().map(|proof| Self::Registers(Some(proof))));
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        all.extend(Amx::detect().map(Self::Amx));
        all
    }

    /// Rows of C that are computed together: tasks are cut at multiples of it.
    pub(super) fn rows(self) -> usize {
        match self {
            Self::Registers(_) => registers::MR,
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(_) => amx::ROWS,
        }
    }

    /// Columns of C that a task owns, where `columns` are shared out among `threads`: their part of R stays in the
    /// second-level cache.
    pub(super) fn task_columns(self, columns: usize, threads: usize) -> usize {
        match self {
            Self::Registers(_) => registers::TASK_COLUMNS,
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(_) => amx::task_columns(columns, threads),
        }
    }

    /// The inner dimension in the blocks that are multiplied before C is touched again.
    pub(super) fn blocks(self, inner: usize) -> impl Iterator<Item = Range<usize>> {
        let (most, multiple) = match self {
            Self::Registers(_) => (registers::INNER, 1),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(_) => (amx::INNER, amx::STEP),
        };
        super::ranges(inner, inner.div_ceil(inner.div_ceil(most).max(1)).next_multiple_of(multiple))
    }

    /// Packs a left operand of `rows` lanes and `inner` elements.
    pub(super) fn pack_left(self, rows: usize, inner: usize, operand: &Operand) -> Lent {
        match self {
            Self::Registers(avx2) => registers::pack_left(self, avx2, rows, inner, operand),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(unit) => amx::pack_left(unit, rows, inner, operand),
        }
    }

    /// Computes a task, with a buffer for its right panels.
    ///
    /// # Safety
    /// No other thread may touch the task's elements of `target` meanwhile, and they are initialised where the job
    /// begins with what C holds.
    pub(super) unsafe fn run(self, task: &Task, target: &Target, right: &mut Buffer) {
        // SAFETY: the caller's promise is passed on.
        match self {
            Self::Registers(avx2) => unsafe { registers::run(avx2, task, target, right) },
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(unit) => unsafe { amx::run(unit, task, target, right) },
        }
    }
}
