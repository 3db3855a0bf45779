//! Dense storage: the floating-point formats and exact conversions between them.
//!
//! Invariants, each with a test that tries to break it:
//! * conversion to a narrower format rounds to the nearest value, ties to even, as PyTorch's `.to(dtype)` does;
//! * widening is exact, so f32 → bf16 → f32 changes nothing that bf16 can hold;
//! * infinities and NaN keep their kind.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use half::{bf16, f16};
use rayon::prelude::*;

/// A dense floating-point storage format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatDtype {
    /// IEEE 754 binary32.
    F32,
    /// The upper half of a binary32: 8 exponent bits, 8 bits of precision.
    Bf16,
    /// IEEE 754 binary16: 5 exponent bits, 11 bits of precision.
    F16,
}

impl FloatDtype {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// The name that recipes and reports use: `f32`, `bf16` or `f16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

impl fmt::Display for FloatDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text is none of the dense formats' names.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a dense floating-point format; expected f32, bf16 or f16")]
pub struct UnknownDtype(String);

impl FromStr for FloatDtype {
    type Err = UnknownDtype;

    /// Reads the recipe's names and those of PyTorch and safetensors (`float32`, `F32`, `bfloat16`, `BF16`, …).
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "f32" | "F32" | "float32" => Ok(Self::F32),
            "bf16" | "BF16" | "bfloat16" => Ok(Self::Bf16),
            "f16" | "F16" | "float16" => Ok(Self::F16),
            other => Err(UnknownDtype(other.to_owned())),
        }
    }
}

/// The byte count is not a whole number of elements.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes are not a whole number of {dtype} elements of {} bytes", dtype.size())]
pub struct PartialElement {
    dtype: FloatDtype,
    len: usize,
}

/// Elements that one worker converts at a time: large enough to hide the scheduling, small enough to balance.
const CHUNK: usize = 1 << 16;

/// Converts little-endian elements of `from` into little-endian elements of `to`, on all cores.
///
/// Bytes that are already in the wanted format are borrowed, not copied.
///
/// # Errors
/// [`PartialElement`] when `bytes` does not hold a whole number of elements.
pub fn convert(bytes: &[u8], from: FloatDtype, to: FloatDtype) -> Result<Cow<'_, [u8]>, PartialElement> {
    if !bytes.len().is_multiple_of(from.size()) {
        return Err(PartialElement { dtype: from, len: bytes.len() });
    }
    if from == to {
        return Ok(Cow::Borrowed(bytes));
    }
    let mut out = vec![0u8; bytes.len() / from.size() * to.size()];
    out.par_chunks_mut(CHUNK * to.size())
        .zip(bytes.par_chunks(CHUNK * from.size()))
        .for_each(|(out, bytes)| convert_chunk(bytes, from, out, to));
    Ok(Cow::Owned(out))
}

fn convert_chunk(bytes: &[u8], from: FloatDtype, out: &mut [u8], to: FloatDtype) {
    let values = bytes.chunks_exact(from.size()).map(|element| read(element, from));
    for (slot, value) in out.chunks_exact_mut(to.size()).zip(values) {
        match to {
            FloatDtype::F32 => slot.copy_from_slice(&value.to_le_bytes()),
            FloatDtype::Bf16 => slot.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
            FloatDtype::F16 => slot.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        }
    }
}

/// Widens little-endian elements of `dtype` into `out`, as many as both hold.
pub(crate) fn widen(bytes: &[u8], dtype: FloatDtype, out: &mut [f32]) {
    match dtype {
        FloatDtype::F32 => {
            let (elements, _) = bytes.as_chunks();
            out.iter_mut().zip(elements).for_each(|(slot, &element)| *slot = f32::from_le_bytes(element));
        }
        FloatDtype::Bf16 => {
            let (elements, _) = bytes.as_chunks();
            out.iter_mut().zip(elements).for_each(|(slot, &element)| *slot = bf16::from_le_bytes(element).to_f32());
        }
        FloatDtype::F16 => {
            let (elements, _) = bytes.as_chunks();
            out.iter_mut().zip(elements).for_each(|(slot, &element)| *slot = f16::from_le_bytes(element).to_f32());
        }
    }
}

/// The largest magnitude; NaN if there is one, 0 if there is nothing.
///
/// Without the sign, floats compare as integers do, and NaN above everything.
pub(crate) fn largest_magnitude(values: &[f32]) -> f32 {
    f32::from_bits(values.iter().fold(0, |largest, value| largest.max(value.to_bits() & !(1 << 31))))
}

/// # Panics
/// When `len` elements from `start` on are not among the first `available`.
pub(crate) fn assert_within(start: usize, len: usize, available: usize) {
    assert!(start <= available && len <= available - start, "{len} elements from {start} on, of {available}");
}

fn read(element: &[u8], dtype: FloatDtype) -> f32 {
    match (dtype, element) {
        (FloatDtype::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
        (FloatDtype::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
        (FloatDtype::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
        _ => unreachable!("`chunks_exact` yields elements of the format's own size"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use FloatDtype::{Bf16, F16, F32};

    fn through(values: &[f32], to: FloatDtype) -> Vec<f32> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let narrow = convert(&bytes, F32, to).unwrap();
        let wide = convert(&narrow, to, F32).unwrap();
        wide.chunks_exact(4).map(|b| read(b, F32)).collect()
    }

    #[test]
    fn narrowing_rounds_to_nearest_with_ties_to_even() {
        let ulp = 2f32.powi(-7); // bf16 keeps 8 bits: the spacing in [1, 2)
        assert_eq!(through(&[1.0 + ulp / 2.0, 1.0 + 1.5 * ulp], Bf16), [1.0, 1.0 + 2.0 * ulp]);
        let ulp = 2f32.powi(-10);
        assert_eq!(through(&[1.0 + ulp / 2.0, 1.0 + 1.5 * ulp], F16), [1.0, 1.0 + 2.0 * ulp]);
    }

    #[test]
    fn what_a_format_can_hold_survives_the_round_trip() {
        for (bits, to) in (0..=u16::MAX).flat_map(|b| [(b, Bf16), (b, F16)]) {
            let value = read(&bits.to_le_bytes(), to);
            let back = through(&[value], to)[0];
            assert!(back.to_bits() == value.to_bits() || (back.is_nan() && value.is_nan()), "{to} {bits:#06x}");
        }
    }

    #[test]
    fn out_of_range_values_become_infinite_and_nan_stays_nan() {
        assert_eq!(through(&[1e30, -1e30], F16), [f32::INFINITY, f32::NEG_INFINITY]);
        assert!(through(&[f32::NAN], Bf16)[0].is_nan());
    }

    #[test]
    fn the_wanted_format_is_borrowed_not_copied() {
        assert!(matches!(convert(&[1, 2, 3, 4], Bf16, Bf16), Ok(Cow::Borrowed(_))));
    }

    #[test]
    fn a_partial_element_is_refused() {
        let error = convert(&[0; 6], F32, Bf16).unwrap_err();
        assert_eq!(error.to_string(), "6 bytes are not a whole number of f32 elements of 4 bytes");
    }

    #[test]
    fn a_large_conversion_equals_a_small_one() {
        let values: Vec<f32> = (0..3 * CHUNK + 7).map(|i| (i as f32).sin() * 1e3).collect();
        let whole = through(&values, Bf16);
        assert_eq!(whole[CHUNK - 3..CHUNK + 3], through(&values[CHUNK - 3..CHUNK + 3], Bf16));
    }

    #[test]
    fn names_of_all_three_worlds_are_read() {
        for (name, dtype) in [("bf16", Bf16), ("BF16", Bf16), ("bfloat16", Bf16), ("float16", F16), ("F32", F32)] {
            assert_eq!(name.parse(), Ok(dtype));
        }
        assert!("int8".parse::<FloatDtype>().is_err());
    }
}
