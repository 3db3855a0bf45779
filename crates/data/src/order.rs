//! Seeded order: which permutation a shuffle takes depends on what is shuffled, the seed and the epoch, and on nothing
//! that was drawn before.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

/// What a stream of random numbers is used for. Streams of different names are independent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    /// Which rows of a source with a fractional weight take part in an epoch.
    Sample,
    /// The order of documents in an epoch.
    Documents,
    /// The order of packed rows in an epoch.
    PackedRows,
}

impl Stream {
    fn name(self) -> &'static [u8] {
        match self {
            Stream::Sample => b"data/sample",
            Stream::Documents => b"data/documents",
            Stream::PackedRows => b"data/packed-rows",
        }
    }
}

/// The generator of `(seed, stream, epoch, index)`; `index` tells apart the sources of one epoch.
pub(crate) fn generator(seed: u64, stream: Stream, epoch: u64, index: u64) -> ChaCha8Rng {
    let mut hash = Sha256::new();
    hash.update(stream.name());
    // A terminator keeps the fields of different streams from running into each other.
    hash.update([0]);
    hash.update(seed.to_le_bytes());
    hash.update(epoch.to_le_bytes());
    hash.update(index.to_le_bytes());
    ChaCha8Rng::from_seed(hash.finalize().into())
}

/// Fisher-Yates. Written out here because the order of a run must outlive an update of the `rand` crate, which may
/// change how `shuffle` consumes its generator.
pub(crate) fn shuffle<T>(items: &mut [T], rng: &mut impl Rng) {
    for last in (1..items.len()).rev() {
        items.swap(last, below(last as u64 + 1, rng) as usize);
    }
}

/// A uniform number in `0..bound`, without bias: Lemire, "Fast random integer generation in an interval" (2019).
fn below(bound: u64, rng: &mut impl Rng) -> u64 {
    let rejected = bound.wrapping_neg() % bound;
    loop {
        let wide = u128::from(rng.next_u64()) * u128::from(bound);
        if wide as u64 >= rejected {
            return (wide >> 64) as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permutation(seed: u64, stream: Stream, epoch: u64, index: u64) -> Vec<usize> {
        let mut items: Vec<usize> = (0..50).collect();
        shuffle(&mut items, &mut generator(seed, stream, epoch, index));
        items
    }

    #[test]
    fn every_part_of_the_key_changes_the_order() {
        let base = permutation(1, Stream::Documents, 2, 3);
        assert_eq!(base, permutation(1, Stream::Documents, 2, 3));
        assert_ne!(base, permutation(2, Stream::Documents, 2, 3));
        assert_ne!(base, permutation(1, Stream::PackedRows, 2, 3));
        assert_ne!(base, permutation(1, Stream::Documents, 3, 3));
        assert_ne!(base, permutation(1, Stream::Documents, 2, 4));
    }

    #[test]
    fn a_shuffle_is_a_permutation() {
        let mut items = permutation(7, Stream::Sample, 0, 0);
        items.sort_unstable();
        assert_eq!(items, (0..50).collect::<Vec<_>>());
    }

    #[test]
    fn the_order_of_a_seed_never_changes_between_versions() {
        let mut items: Vec<u32> = (0..10).collect();
        shuffle(&mut items, &mut generator(42, Stream::Documents, 0, 0));
        assert_eq!(items, GOLDEN);
    }

    const GOLDEN: [u32; 10] = [2, 0, 4, 9, 3, 8, 1, 5, 6, 7];

    #[test]
    fn all_positions_are_equally_likely() {
        let mut counts = [[0u32; 4]; 4];
        for seed in 0..4000 {
            let mut items = [0usize, 1, 2, 3];
            shuffle(&mut items, &mut generator(seed, Stream::Documents, 0, 0));
            for (position, item) in items.into_iter().enumerate() {
                counts[item][position] += 1;
            }
        }
        // The standard deviation of each count is about 27.
        assert!(counts.as_flattened().iter().all(|&n| (850..1150).contains(&n)), "{counts:?}");
    }
}
