//! Initial values of the factors, drawn on the host so that they are the same on every backend.

use emberlora_kernels::rng::mix;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Keeps the numbers of the initialisation apart from every other use of the run's seed.
const STREAM: u64 = 0x6C6F_7261_5F69_6E69;

/// The values of A, `[rank, in_features]` in row-major order: uniform in ±1/√in_features.
///
/// That is `kaiming_uniform_(a=√5)`, PEFT's default: gain √(2 / (1 + 5)) times √(3 / fan_in) is 1/√fan_in. The numbers
/// depend on the seed and the module alone, never on the order in which modules are visited.
pub(crate) fn kaiming_uniform(seed: u64, stream: u64, rank: usize, in_features: usize) -> Vec<f32> {
    let mut key = [0; 32];
    for (word, bytes) in (0u64..).zip(key.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&mix(seed, &[STREAM, stream, word]).to_le_bytes());
    }
    let mut rng = ChaCha8Rng::from_seed(key);
    let bound = 1.0 / (in_features as f64).sqrt();
    // 24 bits per number, written out because the distributions of `rand` may change between its versions.
    (0..rank * in_features)
        .map(|_| {
            let unit = f64::from(rng.next_u32() >> 8) / f64::from(1 << 24);
            ((2.0 * unit - 1.0) * bound) as f32
        })
        .collect()
}

/// The number by which a module's random streams are told apart: FNV-1a of its name, the same on every platform and
/// in every version of the compiler.
pub(crate) fn stream_of(module: &str) -> u64 {
    module.bytes().fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_fill_the_interval_and_have_its_variance() {
        let (rank, in_features) = (64, 400);
        let values = kaiming_uniform(1, 2, rank, in_features);
        let bound = 1.0 / 20.0;
        assert_eq!(values.len(), rank * in_features);
        assert!(values.iter().all(|v| v.abs() <= bound));
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 1e-3, "{mean}");
        assert!((variance / (f64::from(bound).powi(2) / 3.0) - 1.0).abs() < 0.03, "{variance}");
    }

    #[test]
    fn seed_and_module_choose_the_numbers() {
        let draw = |seed, module| kaiming_uniform(seed, stream_of(module), 2, 8);
        assert_eq!(draw(1, "a.q_proj"), draw(1, "a.q_proj"));
        assert_ne!(draw(1, "a.q_proj"), draw(2, "a.q_proj"));
        assert_ne!(draw(1, "a.q_proj"), draw(1, "a.k_proj"));
    }

    #[test]
    fn names_hash_as_fnv_1a_defines() {
        // Test vectors of the FNV specification.
        assert_eq!(stream_of(""), 0xCBF2_9CE4_8422_2325);
        assert_eq!(stream_of("a"), 0xAF63_DC4C_8601_EC8C);
        assert_eq!(stream_of("foobar"), 0x8594_4171_F739_67E8);
    }
}
