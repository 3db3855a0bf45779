//! How much of a forward pass is computed again at one time in the backward pass.

use std::num::NonZeroUsize;
use std::ops::Range;

/// Which blocks share one checkpoint, on a device that asks for
/// [gradient checkpointing](burn::tensor::Device::gradient_checkpointing); on any other everything is kept. Between
/// checkpoints nothing is kept, and the blocks of one checkpoint run a second time when the gradient reaches them. The blocks
/// behind the last checkpoint are kept: the gradient begins there, so running them again would save nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checkpointing {
    /// One checkpoint per block.
    #[default]
    Block,
    /// Groups of ⌈√layers⌉ blocks, which keeps about 2√layers blocks at the peak (Chen et al. 2016,
    /// <https://arxiv.org/abs/1604.06174>).
    Sqrt,
    /// Groups of this many blocks.
    Every(NonZeroUsize),
}

impl Checkpointing {
    /// The blocks of each checkpoint in a model of `layers` blocks, in order. Where they cannot all be as many, the first
    /// are fewer: the last are kept anyway.
    pub fn groups(self, layers: usize) -> impl Iterator<Item = Range<usize>> {
        let size = self.size(layers);
        let first = layers % size;
        let whole = (first..layers).step_by(size).map(move |start| start..start + size);
        (first > 0).then_some(0..first).into_iter().chain(whole)
    }

    /// Blocks per checkpoint, at least one.
    fn size(self, layers: usize) -> usize {
        match self {
            Self::Block => 1,
            Self::Sqrt => ceil_sqrt(layers),
            Self::Every(blocks) => blocks.get(),
        }
    }
}

fn ceil_sqrt(n: usize) -> usize {
    let root = n.isqrt();
    (root + usize::from(root * root < n)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every(blocks: usize) -> Checkpointing {
        Checkpointing::Every(NonZeroUsize::new(blocks).unwrap())
    }

    #[test]
    fn groups_follow_the_strategy() {
        assert_eq!(Checkpointing::Block.size(30), 1);
        assert_eq!([1, 4, 5, 30, 36].map(|n| Checkpointing::Sqrt.size(n)), [1, 2, 3, 6, 6]);
        assert_eq!(every(4).size(30), 4);
    }

    #[test]
    fn groups_cover_the_model_and_the_last_is_a_whole_one() {
        let groups = |checkpointing: Checkpointing, layers| checkpointing.groups(layers).collect::<Vec<_>>();
        assert_eq!(groups(Checkpointing::Block, 3), [0..1, 1..2, 2..3]);
        assert_eq!(groups(Checkpointing::Sqrt, 9), [0..3, 3..6, 6..9]);
        assert_eq!(groups(every(4), 10), [0..2, 2..6, 6..10]);
        assert_eq!(groups(every(4), 4), [0..4]);
        assert_eq!(groups(every(4), 3), [0..3]);
        assert!(groups(Checkpointing::Sqrt, 0).is_empty());
    }
}
