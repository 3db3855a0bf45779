//! The inner loops: [`MR`] × [`NR`] elements of C in registers.

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::pack::{MAX_COLUMNS, Operand};
use super::{Job, Source, Start};
use crate::simd::Avx2;

/// Rows of C in registers. With [`NR`] this fills 12 of AVX2's 16 registers with sums.
pub(super) const MR: usize = 6;
/// Columns of C in registers: two AVX2 registers, four of NEON.
pub(super) const NR: usize = 16;

/// Elements of the inner dimension whose right panels are packed at one time: a block of a long operand and the low-rank
/// ones beside it.
const DEPTH: usize = 1024;

type Sums = [[f32; NR]; MR];

/// C, which several threads write into.
pub(super) struct Target {
    data: *mut MaybeUninit<f32>,
    len: usize,
    stride: usize,
}

// SAFETY: tasks write disjoint elements, which `run`'s caller promises.
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

thread_local! {
    /// The right panels of the task under way.
    static RIGHT: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Computes a task.
///
/// # Safety
/// No other thread may touch the task's elements of `target` meanwhile.
pub(super) unsafe fn run(task: Task, target: &Target) {
    let mut right = RIGHT.take();
    // SAFETY: the caller's promise is passed on.
    unsafe { dispatch_run(&task, target, &mut right) };
    RIGHT.set(right);
}

/// Packs lanes of a left operand.
pub(super) fn pack_left(operand: &Operand, lanes: Range<usize>, inner: Range<usize>, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma")]
        fn avx2(proof: Avx2, operand: &Operand, lanes: Range<usize>, inner: Range<usize>, out: &mut [f32]) {
            operand.pack::<MR>(Some(proof), lanes, inner, out);
        }
        if let Some(proof) = Avx2::detect() {
            // SAFETY: the processor has the features.
            return unsafe { avx2(proof, operand, lanes, inner, out) };
        }
    }
    operand.pack::<MR>(None, lanes, inner, out);
}

/// # Safety
/// That of [`run`].
unsafe fn dispatch_run(task: &Task, target: &Target, right: &mut Vec<f32>) {
    #[cfg(target_arch = "x86_64")]
    {
        /// # Safety
        /// That of [`run`].
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2(proof: Avx2, task: &Task, target: &Target, right: &mut Vec<f32>) {
            // SAFETY: the caller's promise is passed on.
            unsafe { body::<true>(Some(proof), task, target, right) }
        }
        if let Some(proof) = Avx2::detect() {
            // SAFETY: the processor has the features; the caller's promise is passed on.
            return unsafe { avx2(proof, task, target, right) };
        }
    }
    // On x86 without FMA a fused operation would be a call into the C library.
    // SAFETY: the caller's promise is passed on.
    unsafe { body::<{ cfg!(not(target_arch = "x86_64")) }>(None, task, target, right) }
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
unsafe fn body<const FMA: bool>(avx2: Option<Avx2>, task: &Task, target: &Target, right: &mut Vec<f32>) {
    let Task { job, columns, rows } = task;
    let width = columns.len();
    debug_assert!(width <= MAX_COLUMNS);
    let panels = width.div_ceil(NR);
    let mut blocks = job
        .terms
        .iter()
        .flat_map(|term| term.left.blocks().map(|(inner, left)| (term.right, inner, left)))
        .filter(|(_, inner, _)| !inner.is_empty())
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
            if right.len() < from + len {
                right.resize(from + len, 0.0);
            }
            depth += inner.len();
            stretches.push(Stretch { left, right: from, depth: inner.len() });
            operand.pack::<NR>(avx2, columns.clone(), inner, &mut right[from..from + len]);
        }
        for panel in rows.start / MR..rows.end.div_ceil(MR) {
            let height = MR.min(rows.end - panel * MR);
            for j in 0..panels {
                let mut sums = [[0f32; NR]; MR];
                for Stretch { left, right: from, depth } in &stretches {
                    let left = &left[panel * MR * depth..][..MR * depth];
                    let right = &right[from + j * NR * depth..][..NR * depth];
                    sums = multiply::<FMA>(sums, left, right);
                }
                let column = columns.start + j * NR;
                let count = NR.min(width - j * NR);
                for (i, sums) in sums[..height].iter().enumerate() {
                    let row = panel * MR + i;
                    // SAFETY: the task owns these elements, as the caller promises.
                    let out = unsafe { target.row(row, job.first + column, count) };
                    // SAFETY: `Kept` is what the caller asks for an initialised C, and what follows the first round,
                    // which wrote every element.
                    unsafe { write(out, sums, start, row, job.first, column) };
                }
            }
        }
        start = Start::Kept;
        if blocks.peek().is_none() {
            return;
        }
    }
}

/// Adds `sums` to what an element of C begins with.
///
/// # Safety
/// With [`Start::Kept`] `out` is initialised.
#[inline(always)]
unsafe fn write(out: &mut [MaybeUninit<f32>], sums: &[f32; NR], start: Start, row: usize, first: usize, column: usize) {
    let count = out.len();
    match start {
        Start::Zero => each(out, sums, |_, _| 0.0),
        // SAFETY: the caller promises that the elements are initialised.
        Start::Kept => each(out, sums, |old, _| unsafe { old.assume_init() }),
        Start::Bias(bias) => {
            let bias = &bias[column..column + count];
            each(out, sums, |_, i| bias[i]);
        }
        Start::Values(values) => {
            let mut begin = [0f32; NR];
            values.read(row, first + column, &mut begin[..count]);
            each(out, sums, |_, i| begin[i]);
        }
    }
}

#[inline(always)]
fn each(out: &mut [MaybeUninit<f32>], sums: &[f32; NR], begin: impl Fn(MaybeUninit<f32>, usize) -> f32) {
    if let Ok(out) = <&mut [MaybeUninit<f32>; NR]>::try_from(&mut *out) {
        for i in 0..NR {
            out[i] = MaybeUninit::new(begin(out[i], i) + sums[i]);
        }
    } else {
        for (i, out) in out.iter_mut().enumerate() {
            *out = MaybeUninit::new(begin(*out, i) + sums[i]);
        }
    }
}

/// `sums` + left panel · right panel.
#[inline(always)]
fn multiply<const FMA: bool>(mut sums: Sums, left: &[f32], right: &[f32]) -> Sums {
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
