//! A weight in 8 bits per element, with a scale for every row ([LLM.int8()](https://arxiv.org/abs/2208.07339)).
//!
//! The matrix product of that paper multiplies quantised rows of activations with quantised rows of the weight:
//! `x·w ≈ Σ codes_x · codes_w · scale_x · scale_w · `[`DOT_SCALE`]. Columns in which an activation reaches a threshold
//! are left out of the sum and multiplied in full precision.

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use crate::dense::{assert_within, largest_magnitude};

/// What a code of 127 is worth relative to its row's scale, inverted: 1/127.
pub const CODE_SCALE: f32 = 1.0 / 127.0;

/// What a product of two codes is worth relative to the product of their scales: 1/127², with bitsandbytes' digits.
pub const DOT_SCALE: f32 = 6.200_124e-5;

/// A weight in INT8.
///
/// All parts agree with each other: it is made by packing or by reading a checkpoint, and both check.
#[derive(Clone, Debug, PartialEq)]
pub struct Int8 {
    pub(crate) shape: [usize; 2],
    pub(crate) codes: Vec<i8>,
    pub(crate) scales: Vec<f32>,
}

impl Int8 {
    /// `[out_features, in_features]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The codes, row by row, from -127 to 127.
    pub fn codes(&self) -> &[i8] {
        &self.codes
    }

    /// The largest magnitude of each row: what bitsandbytes calls `SCB`.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.codes.len()
    }

    /// Whether there are no elements; packing refuses such weights.
    pub fn is_empty(&self) -> bool {
        self.codes.is_empty()
    }

    /// Bytes that codes and scales take.
    pub fn bytes(&self) -> usize {
        self.codes.len() + size_of_val(self.scales.as_slice())
    }

    /// What the codes of a row are multiplied with.
    #[inline]
    pub fn row_scale(&self, row: usize) -> f32 {
        self.scales[row] * CODE_SCALE
    }

    /// Writes the elements from `start` on, in row-major order, into `out`: as many as it holds.
    ///
    /// # Panics
    /// When the weight ends before `out` does.
    pub fn dequantise(&self, start: usize, out: &mut [f32]) {
        let columns = self.shape[1];
        assert_within(start, out.len(), self.len());
        let (mut at, mut rest) = (start, out);
        while !rest.is_empty() {
            let (row, column) = (at / columns, at % columns);
            let (now, later) = rest.split_at_mut((columns - column).min(rest.len()));
            let scale = self.row_scale(row);
            now.iter_mut().zip(&self.codes[at..]).for_each(|(out, &code)| *out = f32::from(code) * scale);
            at += now.len();
            rest = later;
        }
    }
}

/// The codes of a row of numbers that f16 can hold, given its largest magnitude.
pub(crate) fn row_codes(values: &[f32], scale: f32) -> impl Iterator<Item = i8> {
    // In this order: the reciprocal is rounded before it is multiplied. A row of zeros gives 0 · ∞, which casts to 0.
    let inverse = (1.0 / scale) * 127.0;
    values.iter().map(move |value| (value * inverse).round_ties_even() as i8)
}

/// Rounds to what f16 holds; beyond its range to infinity. `half` only lends its memory.
pub(crate) fn through_f16(values: &mut [f32], half: &mut Vec<f16>) {
    half.resize(values.len(), f16::ZERO);
    half.convert_from_f32_slice(values);
    half.convert_to_f32_slice(values);
}

/// Activations in 8 bits, row by row: the left side of LLM.int8()'s product.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantisedRows {
    /// The codes; 0 in every column of `outliers`.
    pub codes: Vec<i8>,
    /// The largest magnitude of each row that is no outlier.
    pub scales: Vec<f32>,
    /// The columns, ascending, in which some row reaches the threshold. They go through in full precision.
    pub outliers: Vec<usize>,
}

/// Quantises rows of `columns` activations, rounded to f16 first, as bitsandbytes does, on all cores.
///
/// Magnitudes of `threshold` and more are outliers; with a threshold of 0 there are none. A row with a NaN or, without a
/// threshold, an infinity gets a scale that is not finite, so that its products are not either.
///
/// # Panics
/// When `values` are not whole rows.
pub fn quantise_rows(values: &[f32], columns: usize, threshold: f32) -> QuantisedRows {
    assert!(columns > 0 && values.len().is_multiple_of(columns), "{} values in rows of {columns}", values.len());
    let threshold = f16::from_f32(threshold).to_f32();
    let is_outlier = |value: f32| threshold > 0.0 && value.abs() >= threshold;
    let rounded = || (vec![0.0; columns], Vec::new());
    let round = |row: &[f32], (values, half): &mut (Vec<f32>, Vec<f16>)| {
        values.copy_from_slice(row);
        through_f16(values, half);
    };

    let mut outliers = Vec::new();
    if threshold > 0.0 {
        let none = || (vec![false; columns], rounded());
        let found = values.par_chunks_exact(columns).fold(none, |(mut found, mut rounded), row| {
            round(row, &mut rounded);
            found.iter_mut().zip(&rounded.0).for_each(|(found, &value)| *found |= is_outlier(value));
            (found, rounded)
        });
        let found = found.map(|(found, _)| found).reduce(
            || vec![false; columns],
            |mut all, some| {
                all.iter_mut().zip(some).for_each(|(all, some)| *all |= some);
                all
            },
        );
        outliers.extend((0..columns).filter(|&column| found[column]));
    }

    let mut codes = vec![0; values.len()];
    let mut scales = vec![0.0; values.len() / columns];
    let rows = values.par_chunks_exact(columns).zip(codes.par_chunks_exact_mut(columns)).zip(&mut scales);
    rows.for_each_init(rounded, |rounded, ((row, codes), scale)| {
        round(row, rounded);
        let values = &mut rounded.0;
        values.iter_mut().filter(|value| is_outlier(**value)).for_each(|value| *value = 0.0);
        *scale = largest_magnitude(values);
        codes.iter_mut().zip(row_codes(values, *scale)).for_each(|(slot, code)| *slot = code);
        outliers.iter().for_each(|&column| codes[column] = 0);
    });
    QuantisedRows { codes, scales, outliers }
}
