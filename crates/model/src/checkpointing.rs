//! How much of a forward pass is computed again at one time in the backward pass.

use std::num::NonZeroUsize;

/// Which blocks share one checkpoint, on a device that asks for
/// [gradient checkpointing](burn::tensor::Device::gradient_checkpointing); on any other everything is kept. Between
/// checkpoints nothing is kept, and the blocks of one checkpoint run a second time when the gradient reaches them.
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
    /// Blocks per checkpoint in a model of `layers` blocks, at least one.
    pub fn group(self, layers: usize) -> usize {
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

    #[test]
    fn groups_follow_the_strategy() {
        let every = |n| Checkpointing::Every(NonZeroUsize::new(n).unwrap());
        assert_eq!(Checkpointing::Block.group(30), 1);
        assert_eq!([1, 4, 5, 30, 36].map(|n| Checkpointing::Sqrt.group(n)), [1, 2, 3, 6, 6]);
        assert_eq!(every(4).group(30), 4);
    }
}
