//! Where a run's batches come from.

use emberlora_data::{Batch, Dataset};

/// Batches, epoch by epoch.
pub trait Batches {
    /// The micro-batches of an epoch, counted from 0, in the order in which they are trained.
    fn epoch(&self, epoch: u64) -> Box<dyn ExactSizeIterator<Item = Batch> + '_>;

    /// Optimizer steps in `epochs` epochs of `grad_accumulation` micro-batches a step. What is left at the end of an
    /// epoch is a step of its own, and a part of an epoch is that part of its steps, rounded up.
    fn steps(&self, epochs: f64, grad_accumulation: usize) -> usize {
        let per_epoch = self.epoch(0).len().div_ceil(grad_accumulation);
        (epochs * per_epoch as f64).ceil() as usize
    }
}

/// The batches of a data set in the order that follows from a seed.
#[derive(Clone, Copy, Debug, derive_new::new)]
pub struct Seeded<'a> {
    dataset: &'a Dataset,
    seed: u64,
}

impl Batches for Seeded<'_> {
    fn epoch(&self, epoch: u64) -> Box<dyn ExactSizeIterator<Item = Batch> + '_> {
        Box::new(self.dataset.batches(self.seed, epoch))
    }

    fn steps(&self, epochs: f64, grad_accumulation: usize) -> usize {
        self.dataset.total_steps(self.seed, epochs, grad_accumulation)
    }
}

/// The same batches in every epoch.
impl Batches for Vec<Batch> {
    fn epoch(&self, _: u64) -> Box<dyn ExactSizeIterator<Item = Batch> + '_> {
        Box::new(self.iter().cloned())
    }
}
