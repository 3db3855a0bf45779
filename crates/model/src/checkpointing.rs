//! How much of a forward pass is computed again at one time in the backward pass.

use std::num::NonZeroUsize;
use std::ops::Range;

/// Which blocks share one checkpoint, on a device that asks for
/// [gradient checkpointing](burn::tensor::Device::gradient_checkpointing); on any other everything is kept. Between
/// checkpoints nothing is kept, and the blocks of one checkpoint run a second time when the gradient reaches them: all but
/// the last, where it has several.
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

/// Blocks that follow each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Group {
    pub blocks: Range<usize>,
    /// Whether all their activations are, so that they run once.
    pub kept: bool,
}

impl Checkpointing {
    /// The groups of a model of `layers` blocks, in order.
    ///
    /// The last of several blocks is kept: the gradient begins there, so running it again would take the same room at
    /// once, and the time of a whole group. A single last block is not: its activations would lie beside the head's logits,
    /// and running it again costs little. Where groups cannot all have as many blocks, the first has fewer, which leaves
    /// most to keep.
    pub(crate) fn groups(self, layers: usize) -> impl Iterator<Item = Group> {
        let size = self.size(layers);
        let first = layers % size;
        let whole = (first..layers).step_by(size).map(move |start| start..start + size);
        let all = (first > 0).then_some(0..first).into_iter().chain(whole);
        all.map(move |blocks| Group { kept: blocks.end == layers && blocks.len() > 1, blocks })
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
    fn groups_cover_the_model_and_the_last_of_several_blocks_is_kept() {
        let groups = |checkpointing: Checkpointing, layers| -> Vec<_> {
            checkpointing.groups(layers).map(|group| (group.blocks, group.kept)).collect()
        };
        assert_eq!(groups(Checkpointing::Block, 3), [(0..1, false), (1..2, false), (2..3, false)]);
        assert_eq!(groups(Checkpointing::Sqrt, 9), [(0..3, false), (3..6, false), (6..9, true)]);
        assert_eq!(groups(every(4), 10), [(0..2, false), (2..6, false), (6..10, true)]);
        assert_eq!(groups(every(4), 4), [(0..4, true)]);
        assert_eq!(groups(every(4), 3), [(0..3, true)]);
        assert!(groups(Checkpointing::Sqrt, 0).is_empty());
    }
}
