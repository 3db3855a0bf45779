//! Intel's matrix unit (AMX): tiles of 16-bit numbers, multiplied into tiles of f32.
//!
//! It takes bf16, whose numbers have 8 significant bits, but its products are exact and its sums are f32's. An f32 with
//! its 24 bits is the sum of three bf16, so x · w is computed as
//!
//! ```text
//! w in bf16:  (x₀ + x₁ + x₂) · w                                           exact before it is summed
//! w in f32:   x₀w₀ + x₁w₀ + x₂w₀ + x₀w₁ + x₁w₁ + x₀w₂ (+ terms below 2⁻²⁴)   as f32 rounds a product
//! w coarse:   x₀w₀ + x₁w₀ + x₀w₁            (+ a term below 2⁻¹⁶)          after x and w are rounded to 17 bits
//! ```
//!
//! A coarse weight is the value of a code in 4 or 8 bits ([`Source::coarse`](super::Source::coarse)), which stands for all
//! weights between its neighbours: it is some percent off anyhow, and this product 4 · 10⁻⁶ (root mean square). The others
//! are f32 arithmetic at several times the rate of the vector registers (the scheme of Henry, Tang & Heinecke,
//! *Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations*, 2019). Two differences are
//! left: numbers below 2⁻¹²⁶ count as zero, and an infinite operand makes NaN rather than an infinity.

mod kernel;
mod pack;
mod plan;
mod run;

use std::sync::OnceLock;

use super::buffer::Tile;
use super::pack::Operand;
use crate::simd::Avx512;
pub(super) use run::compute;

/// Rows of C that one tile holds.
pub(super) const ROWS: usize = Tile::ROWS;
/// Elements of the inner dimension in a tile.
pub(super) const STEP: usize = Tile::DEPTH;

/// Elements of the inner dimension in a block of an operand.
pub(super) const INNER: usize = 768;

/// How many pieces the elements of both sides have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pieces {
    /// The right side is in bf16.
    Bf16,
    /// The right side is [coarse](super::Source::coarse).
    Coarse,
    F32,
}

impl Pieces {
    const MOST: usize = 3;

    fn of(right: &Operand) -> Self {
        if right.source.bf16(0, 0, 0).is_some() {
            Self::Bf16
        } else if right.source.coarse() {
            Self::Coarse
        } else {
            Self::F32
        }
    }

    /// Those of a left element.
    fn left(self) -> usize {
        match self {
            Self::Coarse => 2,
            Self::Bf16 | Self::F32 => 3,
        }
    }

    /// Those of a right element.
    fn right(self) -> usize {
        match self {
            Self::Bf16 => 1,
            Self::Coarse => 2,
            Self::F32 => 3,
        }
    }
}

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
