//! Loops over slices that the compiler turns into vector code, compiled once for the baseline and once for AVX2 with
//! FMA, and chosen at run time.

/// Defines a function whose body is compiled for AVX2 as well where the processor has it.
macro_rules! vectorised {
    ($(#[$doc:meta])* $visibility:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)? $body:block) => {
        $(#[$doc])*
        $visibility fn $name($($arg: $type),*) $(-> $out)? {
            #[inline(always)]
            fn body($($arg: $type),*) $(-> $out)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $type),*) $(-> $out)? {
                    body($($arg),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
                    // SAFETY: the processor has the features, which was checked on the line above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use vectorised;

/// Asks the processor for the cache lines of `values[first..first + count]`, as far as there are any.
#[inline(always)]
pub(crate) fn prefetch<T>(values: &[T], first: usize, count: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(part) = values.get(first..values.len().min(first + count)) {
        const LINE: usize = 64;
        let bytes = part.as_ptr_range();
        let (start, end) = (bytes.start.cast::<i8>(), bytes.end.cast::<i8>());
        let misalignment = start.addr() % LINE;
        for offset in (0..misalignment + size_of_val(part)).step_by(LINE) {
            let line = start.wrapping_sub(misalignment).wrapping_add(offset);
            debug_assert!(line < end);
            // SAFETY: a prefetch changes nothing that a program can observe, whatever the address is.
            unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (values, first, count);
}

/// Independent partial sums, so that a reduction is not one chain of additions; two AVX2 registers wide.
const LANES: usize = 16;

/// exp(x) to about two units in the last place, without a branch, so that loops over it vectorise.
///
/// Range reduction x = n ln 2 + r with |r| ≤ ln 2 / 2, a polynomial of degree 6 for exp(r) (Cephes' `expf`), and 2ⁿ
/// through the exponent bits. Below the smallest normal number the result stays there; NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it leaves the nearest integer in the low bits
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5e-1;
    let value = p * r * r + r + 1.0;
    value * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// σ(x) and 1 − σ(x), neither of which is a difference, so that both keep their precision where they are small.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> (f32, f32) {
    let e = exp(-x);
    let p = 1.0 / (1.0 + e);
    (p, e * p)
}

/// Σ f(i) over 0..n in a fixed order of independent lanes.
#[inline(always)]
pub(crate) fn lane_sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = n / LANES * LANES;
    for first in (0..whole).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += f(first + lane);
        }
    }
    (whole..n).fold(lanes.iter().sum(), |sum, i| sum + f(i))
}

/// The largest value, −∞ of nothing.
#[inline(always)]
pub(crate) fn lane_max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for (max, value) in lanes.iter_mut().zip(block) {
            *max = if *value > *max { *value } else { *max };
        }
    }
    rest.iter().chain(&lanes).fold(f32::NEG_INFINITY, |max, v| max.max(*v))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_a_few_units_in_the_last_place() {
        for i in -86_000..88_000 {
            let x = i as f32 / 1000.0;
            let expected = f64::from(x).exp();
            let error = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(error < 3e-7, "exp({x}) is off by {error:.2e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 1e-37 && exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_and_maxima_cover_every_element() {
        for n in [0, 1, 15, 16, 17, 100] {
            let values: Vec<f32> = (0..n).map(|i| i as f32).collect();
            assert_eq!(lane_sum(n, |i| values[i]), (n * n.saturating_sub(1) / 2) as f32);
            assert_eq!(lane_max(&values), if n == 0 { f32::NEG_INFINITY } else { (n - 1) as f32 });
        }
    }
}
