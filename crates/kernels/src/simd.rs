//! Loops over slices that the compiler turns into vector code, compiled for the baseline, for AVX2 with FMA and for
//! AVX-512, and chosen at run time.

/// Defines a function whose body is compiled for AVX2 and AVX-512 as well and runs as what the processor has.
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
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512($($arg: $type),*) $(-> $out)? {
                    body($($arg),*)
                }
                if $crate::simd::Avx512::detect().is_some() {
                    // SAFETY: the processor has the features, which was checked on the line above.
                    return unsafe { avx512($($arg),*) };
                }
                if $crate::simd::Avx2::detect().is_some() {
                    // SAFETY: the processor has the features, which was checked on the line above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use vectorised;

/// The proof that the processor has AVX2 and FMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
            return Some(Self(()));
        }
        None
    }
}

/// The proof that the processor has AVX-512 as servers and recent desktops do, and what [`Avx2`] stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx512(());

impl Avx512 {
    pub(crate) fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if Avx2::detect().is_some()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            return Some(Self(()));
        }
        None
    }
}

impl From<Avx512> for Avx2 {
    fn from(Avx512(()): Avx512) -> Self {
        Self(())
    }
}

/// out[k][lane] = rows[lane][k]. Where there is a proof, the caller should be compiled for AVX2 and FMA: this is then
/// inlined.
#[inline(always)]
pub(crate) fn interleave<const W: usize, const N: usize>(
    avx2: Option<Avx2>,
    rows: &[[f32; N]; W],
    out: &mut [[f32; W]],
) {
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if let Some(Avx2(())) = avx2 {
        let (squares, _) = out.as_chunks_mut::<8>();
        for (square, first) in squares.iter_mut().zip((0..).step_by(8)) {
            for lane in (0..W).step_by(8) {
                // SAFETY: the processor has AVX2, as the proof says.
                unsafe { interleave_square(rows, lane, first, square) };
            }
        }
        done = squares.len() * 8;
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = avx2;
    for (k, element) in out.iter_mut().enumerate().skip(done) {
        for lane in 0..W {
            element[lane] = rows[lane][k];
        }
    }
}

/// Eight lanes from `lane` on, or as many as there are, of eight elements from `first` on: 24 shuffles in registers, where
/// element by element takes 64 loads and as many insertions.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
#[inline]
fn interleave_square<const W: usize, const N: usize>(
    rows: &[[f32; N]; W],
    lane: usize,
    first: usize,
    out: &mut [[f32; W]; 8],
) {
    use std::arch::x86_64::*;

    let load = |i: usize| match rows.get(lane + i) {
        Some(row) => {
            let values: &[f32] = &row[first..first + 8];
            // SAFETY: eight values, which need no alignment.
            unsafe { _mm256_loadu_ps(values.as_ptr()) }
        }
        None => _mm256_setzero_ps(),
    };
    let rows = [load(0), load(1), load(2), load(3), load(4), load(5), load(6), load(7)];
    // Pairs of lanes, then fours, then all eight.
    let pairs = [
        _mm256_unpacklo_ps(rows[0], rows[1]),
        _mm256_unpackhi_ps(rows[0], rows[1]),
        _mm256_unpacklo_ps(rows[2], rows[3]),
        _mm256_unpackhi_ps(rows[2], rows[3]),
        _mm256_unpacklo_ps(rows[4], rows[5]),
        _mm256_unpackhi_ps(rows[4], rows[5]),
        _mm256_unpacklo_ps(rows[6], rows[7]),
        _mm256_unpackhi_ps(rows[6], rows[7]),
    ];
    let fours = [
        _mm256_shuffle_ps::<0x44>(pairs[0], pairs[2]),
        _mm256_shuffle_ps::<0xee>(pairs[0], pairs[2]),
        _mm256_shuffle_ps::<0x44>(pairs[1], pairs[3]),
        _mm256_shuffle_ps::<0xee>(pairs[1], pairs[3]),
        _mm256_shuffle_ps::<0x44>(pairs[4], pairs[6]),
        _mm256_shuffle_ps::<0xee>(pairs[4], pairs[6]),
        _mm256_shuffle_ps::<0x44>(pairs[5], pairs[7]),
        _mm256_shuffle_ps::<0xee>(pairs[5], pairs[7]),
    ];
    let elements = [
        _mm256_permute2f128_ps::<0x20>(fours[0], fours[4]),
        _mm256_permute2f128_ps::<0x20>(fours[1], fours[5]),
        _mm256_permute2f128_ps::<0x20>(fours[2], fours[6]),
        _mm256_permute2f128_ps::<0x20>(fours[3], fours[7]),
        _mm256_permute2f128_ps::<0x31>(fours[0], fours[4]),
        _mm256_permute2f128_ps::<0x31>(fours[1], fours[5]),
        _mm256_permute2f128_ps::<0x31>(fours[2], fours[6]),
        _mm256_permute2f128_ps::<0x31>(fours[3], fours[7]),
    ];
    let count = (W - lane).min(8);
    for (element, out) in elements.into_iter().zip(out) {
        let mut values = [0f32; 8];
        // SAFETY: eight values, which need no alignment.
        unsafe { _mm256_storeu_ps(values.as_mut_ptr(), element) };
        out[lane..lane + count].copy_from_slice(&values[..count]);
    }
}

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
    fn rows_are_interleaved_alike_with_and_without_avx2() {
        fn check<const W: usize>() {
            let rows: [[f32; 21]; W] = std::array::from_fn(|lane| std::array::from_fn(|k| (100 * k + lane) as f32));
            for len in 0..=21 {
                for avx2 in [None, Avx2::detect()] {
                    let mut out = vec![[-1.0; W]; len];
                    interleave(avx2, &rows, &mut out);
                    let all = out.iter().enumerate();
                    assert!(
                        all.flat_map(|(k, e)| e.iter().enumerate().map(move |(lane, v)| (k, lane, v)))
                            .all(|(k, lane, value)| *value == (100 * k + lane) as f32)
                    );
                }
            }
        }
        check::<6>();
        check::<8>();
        check::<16>();
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
