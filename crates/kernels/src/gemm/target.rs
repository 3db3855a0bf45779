//! C, which several threads write into.

#[cfg(target_arch = "x86_64")]
use std::arch::asm;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::{Job, Source, Start};

/// C.
pub(super) struct Target {
    data: *mut MaybeUninit<f32>,
    len: usize,
    stride: usize,
}

// SAFETY: tasks write disjoint elements, as whoever runs them promises.
unsafe impl Sync for Target {}

impl Target {
    pub(super) fn new(out: &mut [MaybeUninit<f32>], stride: usize) -> Self {
        Self { data: out.as_mut_ptr(), len: out.len(), stride }
    }

    /// The elements `column..column + count` of `row`.
    ///
    /// # Safety
    /// Nobody else may hold any of them.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "tasks own disjoint parts")]
    unsafe fn row(&self, row: usize, column: usize, count: usize) -> &mut [MaybeUninit<f32>] {
        let offset = row * self.stride + column;
        assert!(column + count <= self.stride && offset + count <= self.len);
        // SAFETY: inside the buffer, as was just checked; not shared, as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(offset), count) }
    }
}

/// Some columns (counted from the job's first) and rows of a job.
pub(super) struct Task<'a> {
    pub job: &'a Job<'a>,
    pub columns: Range<usize>,
    pub rows: Range<usize>,
}

impl Task<'_> {
    /// Asks the processor for the cache lines of a part of a row of C, to write them: without that, every store waits for
    /// its line. Places are counted as in [`write`](Self::write).
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn prefetch(&self, target: &Target, row: usize, column: usize, count: usize) {
        const FLOATS_OF_A_LINE: usize = 16;
        let first = target.data.wrapping_add(row * target.stride + self.job.first + column);
        for at in (0..count).step_by(FLOATS_OF_A_LINE) {
            // SAFETY: a prefetch changes nothing that a program can observe, whatever the address is.
            unsafe { asm!("prefetchw [{}]", in(reg) first.wrapping_add(at), options(nostack, preserves_flags)) };
        }
    }

    /// Adds sums to what a part of a row of C begins with: `row` counts from C's first, `column` from the job's. Of
    /// the sums those are left out that lie behind the task's last column.
    ///
    /// # Safety
    /// No other thread may touch the elements meanwhile; with [`Start::Kept`] they are initialised.
    #[inline(always)]
    pub(super) unsafe fn write<const N: usize>(
        &self,
        target: &Target,
        row: usize,
        column: usize,
        start: Start,
        sums: &[f32; N],
    ) {
        let (first, count) = (self.job.first, N.min(self.columns.end - column));
        // SAFETY: the task owns these elements, as the caller promises.
        let out = unsafe { target.row(row, first + column, count) };
        match start {
            Start::Zero => each(out, sums, |_, _| 0.0),
            // SAFETY: the caller promises that the elements are initialised.
            Start::Kept => each(out, sums, |old, _| unsafe { old.assume_init() }),
            Start::Bias(bias) => {
                let bias = &bias[column..column + count];
                each(out, sums, |_, i| bias[i]);
            }
            Start::Values(values) => {
                let mut begin = [0f32; N];
                values.read(row, first + column, &mut begin[..count]);
                each(out, sums, |_, i| begin[i]);
            }
        }
    }
}

#[inline(always)]
fn each<const N: usize>(out: &mut [MaybeUninit<f32>], sums: &[f32; N], begin: impl Fn(MaybeUninit<f32>, usize) -> f32) {
    if let Ok(out) = <&mut [MaybeUninit<f32>; N]>::try_from(&mut *out) {
        for i in 0..N {
            out[i] = MaybeUninit::new(begin(out[i], i) + sums[i]);
        }
    } else {
        for (i, out) in out.iter_mut().enumerate() {
            *out = MaybeUninit::new(begin(*out, i) + sums[i]);
        }
    }
}
