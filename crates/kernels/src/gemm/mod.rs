//! Matrix products whose operands are made while they are packed.
//!
//! ```text
//! C [m, n] = start + Σ_t L_t [m, k_t] · R_t [k_t, n]
//! ```
//!
//! A general product copies both operands into the order in which its inner loop reads them. Here that copy is where
//! everything else happens: a bf16 weight is widened, a row is normalised, gate and up are combined, an element is
//! dropped out. So none of these exists as a tensor, and none costs a pass over memory. The terms share one pass over C,
//! which is how a low-rank update costs no second `[m, n]` buffer.
//!
//! The scheme is that of Goto & van de Geijn (*Anatomy of High-Performance Matrix Multiplication*, 2008): operands are
//! laid out in panels, and pairs of panels multiplied, by a [`unit`] of the processor: vector [`registers`], or [`amx`],
//! Intel's matrix unit. Registers share L, packed once, and the task that owns columns of C packs their part of R; the
//! matrix unit's tasks share R, and each packs the rows of L that it multiplies. Which thread computes an element decides
//! nothing about it, so results do not depend on the number of threads.

#![cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    allow(dead_code, reason = "the matrix unit alone reads it")
)]

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod buffer;
mod pack;
mod registers;
mod source;
mod target;
mod unit;

use std::mem::MaybeUninit;
use std::ops::Range;

pub(crate) use buffer::Lent;
pub(crate) use pack::{Lanes, Left, Operand, Source};
pub(crate) use source::{Below, Dropped, Gated, Half, Matrix, Normed};

use target::Target;
use unit::Unit;

/// One product L · R of a sum.
pub(crate) struct Term<'a> {
    pub left: &'a Left<'a>,
    /// R: lanes are its columns.
    pub right: Operand<'a>,
}

/// What C begins with.
#[derive(Clone, Copy)]
pub(crate) enum Start<'a> {
    Zero,
    /// What it holds.
    Kept,
    /// One value per column.
    Bias(&'a [f32]),
    /// A matrix with rows like those of C; its columns are numbered as C's.
    Values(Matrix<'a>),
}

/// The columns `first..first + columns` of C.
pub(crate) struct Job<'a> {
    pub first: usize,
    pub columns: usize,
    pub terms: Vec<Term<'a>>,
    pub start: Start<'a>,
}

/// A fresh `[rows, columns]` matrix, whose columns the jobs share out among them.
pub(crate) fn product(rows: usize, columns: usize, jobs: &[Job]) -> Vec<f32> {
    let mut out = Vec::new();
    product_into(rows, columns, jobs, &mut out);
    out
}

/// [`product`] in the memory of an earlier one.
pub(crate) fn product_into(rows: usize, columns: usize, jobs: &[Job], out: &mut Vec<f32>) {
    out.clear();
    out.reserve_exact(rows * columns);
    let mut next = 0;
    for job in jobs {
        assert_eq!(job.first, next, "the jobs leave out columns");
        assert!(!matches!(job.start, Start::Kept), "there is nothing to keep");
        next += job.columns;
    }
    assert_eq!(next, columns, "the jobs leave out columns");
    run(rows, columns, jobs, &mut out.spare_capacity_mut()[..rows * columns]);
    // SAFETY: the jobs cover every column, as was checked above, and each writes all rows of its columns.
    unsafe { out.set_len(rows * columns) };
}

/// Adds to a `[rows, columns]` matrix.
pub(crate) fn accumulate(rows: usize, columns: usize, terms: Vec<Term>, out: &mut [f32]) {
    assert_eq!(out.len(), rows * columns);
    let job = Job { first: 0, columns, terms, start: Start::Kept };
    // SAFETY: an initialised element is a valid `MaybeUninit`, and no uninitialised one is ever written.
    let out = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<MaybeUninit<f32>>(), out.len()) };
    run(rows, columns, &[job], out);
}

fn run(rows: usize, stride: usize, jobs: &[Job], out: &mut [MaybeUninit<f32>]) {
    if rows == 0 {
        return;
    }
    let mut terms = jobs.iter().flat_map(|job| &job.terms);
    let unit = terms.clone().next().map_or_else(|| Unit::of(rows), |term| term.left.unit());
    assert!(jobs.iter().all(|job| job.first + job.columns <= stride));
    assert!(
        terms.all(|term| term.left.rows() == rows && term.left.unit() == unit),
        "an operand has other rows than the product, or is for another unit"
    );
    // SAFETY: jobs own disjoint columns (`product` checks that they follow each other, `accumulate` has one). C is
    // initialised where a job keeps it: `accumulate` alone makes such jobs.
    unsafe { unit.compute(rows, jobs, &Target::new(out, stride)) };
}

/// `0..len` in steps of `step`.
fn ranges(len: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(step.max(1)).map(move |first| first..len.min(first + step))
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::*;

    fn values(seed: u64, len: usize) -> Vec<f32> {
        (0..len).map(|i| crate::rng::uniform(seed, i as u64) - 0.5).collect()
    }

    /// Σ over terms, by definition.
    fn expected(m: usize, n: usize, terms: &[(usize, &[f32], &[f32])], start: &[f32]) -> Vec<f64> {
        let mut c: Vec<f64> = start.iter().map(|v| f64::from(*v)).collect();
        for &(k, left, right) in terms {
            for i in 0..m {
                for j in 0..n {
                    c[i * n + j] +=
                        (0..k).map(|p| f64::from(left[i * k + p]) * f64::from(right[p * n + j])).sum::<f64>();
                }
            }
        }
        c
    }

    fn transposed(rows: usize, columns: usize, values: &[f32]) -> Vec<f32> {
        (0..rows * columns).map(|i| values[i % rows * columns + i / rows]).collect()
    }

    proptest! {
        #[test]
        fn sums_of_products_match_their_definition(
            m in 1usize..40, n in 1usize..150, k in 1usize..900, r in 1usize..9, seed: u64, along_rows: bool,
        ) {
            let (left, right) = (values(seed, m * k), values(seed ^ 1, k * n));
            let (low_left, low_right) = (values(seed ^ 2, m * r), values(seed ^ 3, r * n));
            let start = values(seed ^ 4, m * n);
            let (left_t, right_t) = (transposed(m, k, &left), transposed(k, n, &right));
            let (l, r_) = match along_rows {
                true => (Matrix::new(&left, k), Matrix::new(&right_t, k)),
                false => (Matrix::new(&left_t, m), Matrix::new(&right, n)),
            };
            let lanes = if along_rows { Lanes::Rows } else { Lanes::Columns };
            let low = Matrix::new(&low_left, r);
            let low_right_matrix = Matrix::new(&low_right, n);
            let all = [(k, &left[..], &right[..]), (r, &low_left[..], &low_right[..])];
            let reference = expected(m, n, &all, &start);
            let check = |found: &[f32]| found.iter().zip(&reference).all(|(f, e)| (f64::from(*f) - e).abs() < 2e-5);

            for unit in Unit::all() {
                let packed = Left::for_unit(unit, m, k, Operand::new(&l, lanes));
                let packed_low = Left::for_unit(unit, m, r, Operand::new(&low, Lanes::Rows));
                let terms = || vec![
                    Term { left: &packed, right: Operand::new(&r_, lanes) },
                    Term { left: &packed_low, right: Operand::new(&low_right_matrix, Lanes::Columns) },
                ];
                let job = Job { first: 0, columns: n, terms: terms(), start: Start::Values(Matrix::new(&start, n)) };
                prop_assert!(check(&product(m, n, &[job])), "{unit:?}");
                let mut kept = start.clone();
                accumulate(m, n, terms(), &mut kept);
                prop_assert!(check(&kept), "{unit:?}");
            }
        }

        /// Widening bf16 is exact, so the product is that of the same numbers in f32.
        #[test]
        fn a_weight_in_bf16_gives_the_product_of_its_values(
            m in 1usize..40, n in 1usize..150, k in 1usize..900, seed: u64, along_rows: bool,
        ) {
            let left = values(seed, m * k);
            let narrow: Vec<bf16> = values(seed ^ 1, k * n).into_iter().map(bf16::from_f32).collect();
            let wide: Vec<f32> = narrow.iter().map(|value| value.to_f32()).collect();
            let (lanes, stride) = if along_rows { (Lanes::Rows, k) } else { (Lanes::Columns, n) };
            let (l, narrow, wide) = (Matrix::new(&left, k), Half::new(&narrow, stride), Matrix::new(&wide, stride));
            for unit in Unit::all() {
                let packed = Left::for_unit(unit, m, k, Operand::new(&l, Lanes::Rows));
                let product = |right: &dyn Source| {
                    let terms = vec![Term { left: &packed, right: Operand::new(right, lanes) }];
                    product(m, n, &[Job { first: 0, columns: n, terms, start: Start::Zero }])
                };
                prop_assert_eq!(product(&narrow), product(&wide), "{:?}", unit);
            }
        }
    }

    /// So long and wide that the units take the inner dimension and the columns in several parts.
    #[test]
    fn large_jobs_that_share_an_operand_match_their_definition() {
        let (m, k, widths) = (70, 1700, [700, 800]);
        let (x, w) = (values(1, m * k), values(2, (700 + 800) * k));
        let narrow: Vec<bf16> = w[700 * k..].iter().map(|value| bf16::from_f32(*value)).collect();
        let (l, first, second) = (Matrix::new(&x, k), Matrix::new(&w, k), Half::new(&narrow, k));
        let rights: [&dyn Source; 2] = [&first, &second];
        for unit in Unit::all() {
            let left = Left::for_unit(unit, m, k, Operand::new(&l, Lanes::Rows));
            let job = |i: usize| Job {
                first: [0, 700][i],
                columns: widths[i],
                terms: (0..2).map(|_| Term { left: &left, right: Operand::new(rights[i], Lanes::Rows) }).collect(),
                start: Start::Zero,
            };
            let found = product(m, 1500, &[job(0), job(1)]);
            for (i, row) in found.chunks_exact(1500).enumerate() {
                for (j, found) in row.iter().enumerate() {
                    let weight = |p: usize| if j < 700 { w[j * k + p] } else { narrow[(j - 700) * k + p].to_f32() };
                    let sum: f64 = (0..k).map(|p| f64::from(x[i * k + p]) * f64::from(weight(p))).sum();
                    assert!((f64::from(*found) - 2.0 * sum).abs() < 1e-4, "{unit:?} at {i}, {j}");
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let (m, k, n) = (300, 900, 200);
        let (x, w) = (values(1, m * k), values(2, k * n));
        let (x, w) = (Matrix::new(&x, k), Matrix::new(&w, k));
        for unit in Unit::all() {
            let on = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let left = Left::for_unit(unit, m, k, Operand::new(&x, Lanes::Rows));
                    let terms = vec![Term { left: &left, right: Operand::new(&w, Lanes::Rows) }];
                    product(m, n, &[Job { first: 0, columns: n, terms, start: Start::Zero }])
                })
            };
            let alone = on(1);
            assert!([2, 3, 8].into_iter().all(|threads| on(threads) == alone), "{unit:?}");
        }
    }

    /// A matrix of which a product need not take all bits.
    struct Coarse<'a>(Matrix<'a>);

    impl Source for Coarse<'_> {
        fn read(&self, row: usize, first: usize, out: &mut [f32]) {
            self.0.read(row, first, out);
        }

        fn coarse(&self) -> bool {
            true
        }
    }

    #[test]
    fn a_coarse_operand_is_taken_to_sixteen_bits_or_by_registers_to_all() {
        let (m, k, n) = (70, 900, 100);
        let (x, w) = (values(1, m * k), values(2, n * k));
        let exact = expected(m, n, &[(k, &x, &transposed(n, k, &w))], &vec![0.0; m * n]);
        let (x, w) = (Matrix::new(&x, k), Matrix::new(&w, k));
        for unit in Unit::all() {
            let left = Left::for_unit(unit, m, k, Operand::new(&x, Lanes::Rows));
            let times = |right: &dyn Source| {
                let terms = vec![Term { left: &left, right: Operand::new(right, Lanes::Rows) }];
                product(m, n, &[Job { first: 0, columns: n, terms, start: Start::Zero }])
            };
            let found = times(&Coarse(w));
            let square: f64 = exact.iter().map(|v| v * v).sum();
            let apart: f64 = found.iter().zip(&exact).map(|(f, e)| (f64::from(*f) - e).powi(2)).sum();
            assert!((apart / square).sqrt() < 6e-6, "{unit:?}");
            // Registers have all bits, so they take them.
            assert!(!matches!(unit, Unit::Registers(_)) || found == times(&w), "{unit:?}");
        }
    }

    #[test]
    fn what_is_not_finite_spoils_its_row_and_no_other() {
        let (m, k, n) = (70, 40, 50);
        for bad in [f32::NAN, f32::from_bits(u32::MAX), f32::INFINITY, f32::NEG_INFINITY] {
            let (mut x, w) = (values(1, m * k), values(2, k * n));
            x[33 * k + 7] = bad;
            let (x, w) = (Matrix::new(&x, k), Matrix::new(&w, k));
            let rights: [&dyn Source; 2] = [&w, &Coarse(w)];
            for (unit, right) in Unit::all().into_iter().flat_map(|unit| rights.map(|right| (unit, right))) {
                let left = Left::for_unit(unit, m, k, Operand::new(&x, Lanes::Rows));
                let terms = vec![Term { left: &left, right: Operand::new(right, Lanes::Rows) }];
                let found = product(m, n, &[Job { first: 0, columns: n, terms, start: Start::Zero }]);
                let mut rows = found.chunks_exact(n).enumerate();
                assert!(rows.all(|(i, row)| row.iter().all(|value| value.is_finite() == (i != 33))), "{unit:?} {bad}");
            }
        }
    }

    #[test]
    fn jobs_share_an_operand_and_a_matrix() {
        let (m, k) = (13, 20);
        let (x, w, bias) = (values(1, m * k), values(2, 70 * k), values(3, 70));
        let source = Matrix::new(&x, k);
        let left = Left::new(m, k, Operand::new(&source, Lanes::Rows));
        let parts = [Matrix::new(&w[..30 * k], k), Matrix::new(&w[30 * k..], k)];
        let job = |first, columns, part| Job {
            first,
            columns,
            terms: vec![Term { left: &left, right: Operand::new(part, Lanes::Rows) }],
            start: Start::Bias(&bias[first..first + columns]),
        };
        let found = product(m, 70, &[job(0, 30, &parts[0]), job(30, 40, &parts[1])]);
        let start: Vec<f32> = (0..m * 70).map(|i| bias[i % 70]).collect();
        let expected = expected(m, 70, &[(k, &x, &transposed(70, k, &w))], &start);
        assert!(found.iter().zip(&expected).all(|(f, e)| (f64::from(*f) - e).abs() < 1e-5));
    }
}
