//! Products with few columns on one side, as low-rank adapters have them, on operands where they lie: to pack a long
//! operand would take as long as to multiply it.
//!
//! The columns of the narrow side are counted in [`LANES`]; where it has fewer, zeros follow.

use super::pack::Operand;
use super::registers::Registers;
use super::source::Matrix;
use super::unit::Unit;
use crate::simd::Avx2;

/// Columns that are always computed together.
pub(crate) const LANES: usize = 16;

/// A narrow operand as panels `[lanes / LANES][inner][LANES]`.
pub(crate) struct Panels {
    values: Vec<[f32; LANES]>,
    inner: usize,
}

impl Panels {
    /// `lanes` lanes of `inner` elements, then zeros.
    pub(crate) fn new(operand: &Operand, lanes: usize, inner: usize) -> Self {
        let mut values = vec![[0f32; LANES]; lanes.div_ceil(LANES) * inner];
        let panels = values.as_flattened_mut();
        for (panel, first) in panels.chunks_exact_mut((inner * LANES).max(1)).zip((0..lanes).step_by(LANES)) {
            operand.pack::<LANES>(Avx2::detect(), first..lanes.min(first + LANES), 0..inner, panel);
        }
        Self { values, inner }
    }

    /// Lanes, with those that are zeros.
    pub(crate) fn width(&self) -> usize {
        self.values.len() / self.inner.max(1) * LANES
    }

    fn panel(&self, panel: usize) -> &[[f32; LANES]] {
        &self.values[panel * self.inner..][..self.inner]
    }
}

/// The body of a function for each kind of registers.
macro_rules! for_registers {
    ($name:ident($($arg:ident: $type:ty),* $(,)?)) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        fn avx2($($arg: $type),*) {
            // Four rows of 24 columns are 12 of 16 registers.
            $name::<true, 4, 24, 1>($($arg),*);
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn avx512($($arg: $type),*) {
            // Eight rows of 48 columns are 24 of 32 registers.
            $name::<true, 8, 48, 3>($($arg),*);
        }
        let Unit::Registers(registers) = Unit::of(0) else { unreachable!("few rows are for registers") };
        match registers {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor has the features, as the proof says.
            Registers::Avx512(_) => unsafe { avx512($($arg),*) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor has the features, as the proof says.
            Registers::Avx2(_) => unsafe { avx2($($arg),*) },
            // On x86 without FMA a fused operation would be a call into the C library.
            _ => $name::<{ cfg!(not(target_arch = "x86_64")) }, 4, 24, 1>($($arg),*),
        }
    }};
}

#[inline(always)]
fn multiply_add<const FMA: bool>(a: f32, b: f32, sum: f32) -> f32 {
    if FMA { a.mul_add(b, sum) } else { a * b + sum }
}

/// `factor · L R` into the first columns of `rows` rows of `stride` elements, L being a long operand of as many rows, and R
/// a narrow one.
pub(crate) fn times_narrow(left: Matrix, rows: usize, right: &Panels, factor: f32, out: &mut [f32], stride: usize) {
    for_registers!(times_narrow_body(
        left: Matrix,
        rows: usize,
        right: &Panels,
        factor: f32,
        out: &mut [f32],
        stride: usize,
    ));
}

#[inline(always)]
fn times_narrow_body<const FMA: bool, const MR: usize, const NR: usize, const PANELS: usize>(
    left: Matrix,
    rows: usize,
    right: &Panels,
    factor: f32,
    out: &mut [f32],
    stride: usize,
) {
    let panels = right.width() / LANES;
    let mut panel = 0;
    while panel < panels {
        let count = if panels - panel >= PANELS { PANELS } else { 1 };
        let mut row = 0;
        while row < rows {
            let height = if rows - row >= MR { MR } else { 1 };
            let (left, out) = (left.from(row, 0), &mut out[row * stride + panel * LANES..]);
            match (height == MR, count == PANELS) {
                (true, true) => times_narrow_tile::<FMA, MR, PANELS>(left, right, panel, factor, out, stride),
                (true, false) => times_narrow_tile::<FMA, MR, 1>(left, right, panel, factor, out, stride),
                (false, true) => times_narrow_tile::<FMA, 1, PANELS>(left, right, panel, factor, out, stride),
                (false, false) => times_narrow_tile::<FMA, 1, 1>(left, right, panel, factor, out, stride),
            }
            row += height;
        }
        panel += count;
    }
}

/// MR rows and some panels of [`times_narrow`].
#[inline(always)]
fn times_narrow_tile<const FMA: bool, const MR: usize, const PANELS: usize>(
    left: Matrix,
    right: &Panels,
    first: usize,
    factor: f32,
    out: &mut [f32],
    stride: usize,
) {
    let inner = right.inner;
    let rows: [&[f32]; MR] = std::array::from_fn(|i| left.row(i, 0, inner));
    let panels: [&[[f32; LANES]]; PANELS] = std::array::from_fn(|panel| right.panel(first + panel));
    let mut sums = [[[0f32; LANES]; PANELS]; MR];
    for k in 0..inner {
        for i in 0..MR {
            for p in 0..PANELS {
                for j in 0..LANES {
                    sums[i][p][j] = multiply_add::<FMA>(rows[i][k], panels[p][k][j], sums[i][p][j]);
                }
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        let out = &mut out[i * stride..][..PANELS * LANES];
        out.iter_mut().zip(sums.as_flattened()).for_each(|(out, sum)| *out = factor * sum);
    }
}

/// A matrix whose rows are summed over, and how many of its columns take part.
#[derive(Clone, Copy)]
pub(crate) struct Side<'a> {
    pub matrix: Matrix<'a>,
    pub columns: usize,
}

/// Adds `Lᵀ R` to the first columns of as many rows as L has columns, of `stride` elements; the sum goes over `rows` rows of both
/// sides. One side should be narrow.
pub(crate) fn add_transposed_product(left: Side, right: Side, rows: usize, out: &mut [f32], stride: usize) {
    for_registers!(add_transposed_product_body(left: Side, right: Side, rows: usize, out: &mut [f32], stride: usize));
}

#[inline(always)]
fn add_transposed_product_body<const FMA: bool, const MR: usize, const NR: usize, const PANELS: usize>(
    left: Side,
    right: Side,
    rows: usize,
    out: &mut [f32],
    stride: usize,
) {
    let mut column = 0;
    while column < right.columns {
        let rest = right.columns - column;
        let width = [NR, LANES].into_iter().find(|width| rest >= *width).unwrap_or(1);
        let mut i = 0;
        while i < left.columns {
            let height = if left.columns - i >= MR { MR } else { 1 };
            let (left, right) = (left.matrix.from(0, i), right.matrix.from(0, column));
            let out = &mut out[i * stride + column..];
            match (height == MR, width) {
                (true, width) if width == NR => transposed_tile::<FMA, MR, NR>(left, right, rows, out, stride),
                (false, width) if width == NR => transposed_tile::<FMA, 1, NR>(left, right, rows, out, stride),
                (true, LANES) => transposed_tile::<FMA, MR, LANES>(left, right, rows, out, stride),
                (false, LANES) => transposed_tile::<FMA, 1, LANES>(left, right, rows, out, stride),
                (true, _) => transposed_tile::<FMA, MR, 1>(left, right, rows, out, stride),
                (false, _) => transposed_tile::<FMA, 1, 1>(left, right, rows, out, stride),
            }
            i += height;
        }
        column += width;
    }
}

/// MR rows and NR columns of [`add_transposed_product`].
#[inline(always)]
fn transposed_tile<const FMA: bool, const MR: usize, const NR: usize>(
    left: Matrix,
    right: Matrix,
    rows: usize,
    out: &mut [f32],
    stride: usize,
) {
    let mut sums = [[0f32; NR]; MR];
    for (i, sums) in sums.iter_mut().enumerate() {
        sums.copy_from_slice(&out[i * stride..][..NR]);
    }
    for row in 0..rows {
        let left: &[f32; MR] = left.row(row, 0, MR).try_into().expect("MR values");
        let right: &[f32; NR] = right.row(row, 0, NR).try_into().expect("NR values");
        for i in 0..MR {
            for j in 0..NR {
                sums[i][j] = multiply_add::<FMA>(left[i], right[j], sums[i][j]);
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        out[i * stride..][..NR].copy_from_slice(sums);
    }
}
