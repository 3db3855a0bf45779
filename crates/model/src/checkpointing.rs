//! How much of a forward pass is computed again in the backward pass.

use std::num::NonZeroUsize;

/// Which blocks share one checkpoint. Between checkpoints nothing is kept, and the blocks of one checkpoint run a second
/// time when the gradient reaches them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checkpointing {
    /// Everything is kept.
    #[default]
    None,
    /// One checkpoint per block.
    Block,
    /// Groups of ⌈√layers⌉ blocks, which keeps about 2√layers blocks at the peak (Chen et al. 2016,
    /// <https://arxiv.org/abs/1604.06174>).
    Sqrt,
    /// Groups of this many blocks.
    Every(NonZeroUsize),
}

impl Checkpointing {
    /// Blocks per checkpoint in a model of `layers` blocks; `None` for no checkpoints.
    pub fn group(self, layers: usize) -> Option<usize> {
        match self {
            Self::None => None,
            Self::Block => Some(1),
            Self::Sqrt => Some(ceil_sqrt(layers)),
            Self::Every(blocks) => Some(blocks.get()),
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
        assert_eq!(Checkpointing::None.group(30), None);
        assert_eq!(Checkpointing::Block.group(30), Some(1));
        assert_eq!([1, 4, 5, 30, 36].map(|n| Checkpointing::Sqrt.group(n).unwrap()), [1, 2, 3, 6, 6]);
        assert_eq!(every(4).group(30), Some(4));
    }
}
