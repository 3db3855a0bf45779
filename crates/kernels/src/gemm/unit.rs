//! What multiplies: vector registers, or the processor's matrix unit.

use std::ops::Range;
use std::sync::OnceLock;

use super::Job;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::amx::{self, Amx};
use super::buffer::Lent;
use super::pack::Operand;
use super::registers::{self, Registers};
use super::target::Target;
use crate::simd::{Avx2, Avx512};

/// Rows up to which packing R is what takes the time, and splitting it into pieces takes more of it.
const FEW_ROWS: usize = 64;

/// The parts of a processor that can compute a product. Both operands are packed for one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Vector registers.
    Registers(Registers),
    /// Intel's tile registers.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    Amx(Amx),
}

impl Unit {
    /// The fastest that this processor has for products of `rows` rows.
    pub(crate) fn of(rows: usize) -> Self {
        static ALL: OnceLock<Vec<Unit>> = OnceLock::new();
        let all = ALL.get_or_init(Self::all).iter().rev();
        let mut fast = all.filter(|unit| rows > FEW_ROWS || matches!(unit, Self::Registers(_)));
        *fast.next().expect("every processor has registers")
    }

    /// All that this processor has, the fastest last.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![Self::Registers(Registers::Any)];
        all.extend(Avx2::detect().map(|proof| Self::Registers(Registers::Avx2(proof))));
        all.extend(Avx512::detect().map(|proof| Self::Registers(Registers::Avx512(proof))));
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        all.extend(Amx::detect().map(Self::Amx));
        all
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

    /// Packs a left operand of `rows` lanes and `inner` elements, if that is not left to the tasks.
    pub(super) fn pack_left(self, rows: usize, inner: usize, operand: &Operand) -> Option<Lent> {
        match self {
            Self::Registers(registers) => Some(registers::pack_left(registers, rows, inner, operand)),
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(_) => None,
        }
    }

    /// Computes jobs.
    ///
    /// # Safety
    /// The jobs' columns are disjoint, nothing else touches `target` meanwhile, and it is initialised where a job begins
    /// with what C holds.
    pub(super) unsafe fn compute(self, rows: usize, jobs: &[Job], target: &Target) {
        // SAFETY: the caller's promise is passed on.
        match self {
            Self::Registers(registers) => unsafe { registers::compute(registers, rows, jobs, target) },
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Self::Amx(unit) => unsafe { amx::compute(unit, rows, jobs, target) },
        }
    }
}
