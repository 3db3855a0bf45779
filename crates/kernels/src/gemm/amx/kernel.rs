//! The instructions of the matrix unit. The compiler knows none of them on stable Rust, so they are written as assembly.

use std::arch::asm;
use std::marker::PhantomData;

use super::{Amx, Pieces};
use crate::gemm::buffer::Tile;

/// Rows and columns of C that four of the eight tile registers hold.
pub(super) const SIDE: usize = 2 * Tile::ROWS;

#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Sums(pub [[f32; SIDE]; SIDE]);

impl Sums {
    pub(super) const ZERO: Self = Self([[0.0; SIDE]; SIDE]);
}

/// Tile registers of 16 rows of 64 bytes, on this thread and as long as it lives.
pub(super) struct Configured {
    _proof: Amx,
    _of_this_thread: PhantomData<*const ()>,
}

/// As the instruction reads it: the palette, then at 16 the bytes of a row of each of eight registers as 16-bit numbers,
/// and at 48 their rows.
#[repr(C, align(64))]
struct Layout([u8; 64]);

static LAYOUT: Layout = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut register = 0;
    while register < 8 {
        bytes[16 + 2 * register] = size_of::<[u16; Tile::DEPTH]>() as u8;
        bytes[48 + register] = Tile::ROWS as u8;
        register += 1;
    }
    Layout(bytes)
};

impl Configured {
    pub(super) fn new(proof: Amx) -> Self {
        // SAFETY: the processor has tile registers and the system lets this process use them, as the proof says; the
        // layout is 64 bytes of the one palette that there is. The compiler uses none of these registers.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const LAYOUT, options(nostack, readonly, preserves_flags)) };
        Self { _proof: proof, _of_this_thread: PhantomData }
    }

    /// Adds the products of two left panels with one or two right ones, all of equally many steps, to the sums, or to
    /// zeros where they are `fresh`. Without a second right panel nothing is added to the right half of the sums.
    #[inline(always)]
    pub(super) fn multiply(
        &self,
        sums: &mut Sums,
        fresh: bool,
        left: [&[Tile]; 2],
        right: &[Tile],
        second: Option<&[Tile]>,
        pieces: Pieces,
    ) {
        let steps = right.len() / pieces.right();
        assert!(steps > 0 && right.len() == steps * pieces.right());
        assert!(second.is_none_or(|second| second.len() == right.len()));
        assert!(left.iter().all(|left| left.len() == steps * pieces.left()));
        let multiply = match (pieces, second) {
            (Pieces::Bf16, Some(_)) => two_by_two_bf16,
            (Pieces::Bf16, None) => two_by_one_bf16,
            (Pieces::Coarse, Some(_)) => two_by_two_coarse,
            (Pieces::Coarse, None) => two_by_one_coarse,
            (Pieces::F32, Some(_)) => two_by_two_f32,
            (Pieces::F32, None) => two_by_one_f32,
        };
        let (left, right) = (left.map(<[Tile]>::as_ptr), [right.as_ptr(), second.unwrap_or(right).as_ptr()]);
        // SAFETY: the tile registers are set up on this thread; each panel has as many tiles as were counted above.
        unsafe { multiply(sums, fresh, left, right, steps) };
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: the registers hold nothing that is still needed.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

// Registers 0 to 3 hold C, 4 and 5 a tile of each left panel, 6 and 7 one of each right panel.
macro_rules! load_left {
    ($piece:literal) => {
        concat!(
            "tileloadd tmm4, [{a} + {stride} + 1024*",
            $piece,
            "]\n tileloadd tmm5, [{b} + {stride} + 1024*",
            $piece,
            "]"
        )
    };
}
macro_rules! load_right {
    ($piece:literal) => {
        concat!(
            "tileloadd tmm6, [{c} + {stride} + 1024*",
            $piece,
            "]\n tileloadd tmm7, [{d} + {stride} + 1024*",
            $piece,
            "]"
        )
    };
}
macro_rules! multiply {
    () => {
        "tdpbf16ps tmm0, tmm4, tmm6\n tdpbf16ps tmm1, tmm4, tmm7\n tdpbf16ps tmm2, tmm5, tmm6\n tdpbf16ps tmm3, tmm5, tmm7"
    };
}
macro_rules! load_first_right {
    ($piece:literal) => {
        concat!("tileloadd tmm6, [{c} + {stride} + 1024*", $piece, "]")
    };
}
macro_rules! multiply_first {
    () => {
        "tdpbf16ps tmm0, tmm4, tmm6\n tdpbf16ps tmm2, tmm5, tmm6"
    };
}

/// A kernel for left and right elements of some pieces, whose steps are made of the given parts.
macro_rules! kernel {
    ($name:ident, $left:literal, $right:literal, [$($part:ident!($($argument:literal)?)),* $(,)?]) => {
        /// # Safety
        /// The tile registers are [`Configured`] on this thread. `left` and `right` each point to the tiles of two panels
        /// of `steps` steps, at least one.
        unsafe fn $name(
            sums: &mut Sums,
            fresh: bool,
            left: [*const Tile; 2],
            right: [*const Tile; 2],
            steps: usize,
        ) {
            // SAFETY: the loop reads the tiles that the caller promises, and the sums are 32 rows of 128 bytes. All
            // registers that change are named.
            unsafe {
                asm!(
                    "test {fresh}, {fresh}",
                    "jnz 3f",
                    "tileloadd tmm0, [{sums} + {row}]",
                    "tileloadd tmm1, [{sums} + {row} + 64]",
                    "tileloadd tmm2, [{sums} + {row} + 128*16]",
                    "tileloadd tmm3, [{sums} + {row} + 128*16 + 64]",
                    "jmp 2f",
                    "3:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    $($part!($($argument)?),)*
                    concat!("add {a}, 1024*", $left),
                    concat!("add {b}, 1024*", $left),
                    concat!("add {c}, 1024*", $right),
                    concat!("add {d}, 1024*", $right),
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{sums} + {row}], tmm0",
                    "tilestored [{sums} + {row} + 64], tmm1",
                    "tilestored [{sums} + {row} + 128*16], tmm2",
                    "tilestored [{sums} + {row} + 128*16 + 64], tmm3",
                    fresh = in(reg_byte) u8::from(fresh),
                    sums = in(reg) sums.0.as_mut_ptr(),
                    row = in(reg) size_of::<[f32; SIDE]>(),
                    stride = in(reg) size_of::<[u16; Tile::DEPTH]>(),
                    a = inout(reg) left[0] => _,
                    b = inout(reg) left[1] => _,
                    c = inout(reg) right[0] => _,
                    d = inout(reg) right[1] => _,
                    steps = inout(reg) steps => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

kernel!(
    two_by_two_bf16,
    3,
    1,
    [load_right!(0), load_left!(0), multiply!(), load_left!(1), multiply!(), load_left!(2), multiply!()]
);
kernel!(
    two_by_one_bf16,
    3,
    1,
    [
        load_first_right!(0),
        load_left!(0),
        multiply_first!(),
        load_left!(1),
        multiply_first!(),
        load_left!(2),
        multiply_first!(),
    ]
);
// All but the product of the lower pieces.
kernel!(
    two_by_two_coarse,
    2,
    2,
    [load_right!(0), load_left!(1), multiply!(), load_left!(0), multiply!(), load_right!(1), multiply!()]
);
kernel!(
    two_by_one_coarse,
    2,
    2,
    [
        load_first_right!(0),
        load_left!(1),
        multiply_first!(),
        load_left!(0),
        multiply_first!(),
        load_first_right!(1),
        multiply_first!(),
    ]
);
// The products whose pieces' places add up to at most two; the others are below an f32's last place.
kernel!(
    two_by_two_f32,
    3,
    3,
    [
        load_right!(0),
        load_left!(0),
        multiply!(),
        load_left!(1),
        multiply!(),
        load_left!(2),
        multiply!(),
        load_right!(1),
        load_left!(0),
        multiply!(),
        load_left!(1),
        multiply!(),
        load_right!(2),
        load_left!(0),
        multiply!(),
    ]
);
kernel!(
    two_by_one_f32,
    3,
    3,
    [
        load_first_right!(0),
        load_left!(0),
        multiply_first!(),
        load_left!(1),
        multiply_first!(),
        load_left!(2),
        multiply_first!(),
        load_first_right!(1),
        load_left!(0),
        multiply_first!(),
        load_left!(1),
        multiply_first!(),
        load_first_right!(2),
        load_left!(0),
        multiply_first!(),
    ]
);
