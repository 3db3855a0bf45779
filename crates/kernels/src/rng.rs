//! Counter-based random numbers.
//!
//! Every random number of a run is a function of (seed, stream, step) and of nothing else, never of how many numbers
//! were drawn before. That is what makes recomputation in the backward pass, resuming and any order of evaluation
//! give the same masks.

/// The finaliser of SplitMix64 (Steele, Lea, Flood: *Fast splittable pseudorandom number generators*, 2014): a
/// bijection of 64 bits in which every input bit flips every output bit with probability close to one half.
const fn finalise(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The golden-ratio increment that SplitMix64 walks by.
const GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// Derives a seed from a parent seed and the coordinates that name a stream, such as `[step, layer]`.
///
/// The order of the coordinates matters and so does their number.
pub fn mix(seed: u64, coordinates: &[u64]) -> u64 {
    coordinates.iter().fold(finalise(seed.wrapping_add(GAMMA)), |state, &coordinate| {
        finalise(state.wrapping_add(GAMMA) ^ finalise(coordinate.wrapping_add(GAMMA)))
    })
}

/// The `index`-th uniform number in [0, 1) of the stream `seed`, with 24 bits.
#[inline]
pub fn uniform(seed: u64, index: u64) -> f32 {
    let bits = finalise(seed.wrapping_add(index.wrapping_mul(GAMMA)));
    (bits >> 40) as f32 * (1.0 / (1 << 24) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_coordinate_and_its_place_matter() {
        let seeds = [mix(1, &[2, 3]), mix(1, &[3, 2]), mix(1, &[2]), mix(1, &[2, 3, 0]), mix(2, &[2, 3]), mix(1, &[])];
        for (i, a) in seeds.iter().enumerate() {
            assert!(seeds[i + 1..].iter().all(|b| a != b));
        }
    }

    #[test]
    fn numbers_are_uniform_and_streams_are_unrelated() {
        let n = 100_000u64;
        let mean = (0..n).map(|i| f64::from(uniform(7, i))).sum::<f64>() / n as f64;
        assert!((mean - 0.5).abs() < 0.005, "{mean}");
        let (a, b) = (mix(7, &[0, 0]), mix(7, &[0, 1]));
        let covariance =
            (0..n).map(|i| (f64::from(uniform(a, i)) - 0.5) * (f64::from(uniform(b, i)) - 0.5)).sum::<f64>() / n as f64;
        assert!(covariance.abs() < 0.001, "{covariance}");
        assert!((0..n).all(|i| (0.0..1.0).contains(&uniform(a, i))));
    }
}
