//! Where a run's batches come from.

use std::sync::mpsc::SyncSender;

use emberlora_data::{Batch, Dataset};
use emberlora_model::Uploader;

use crate::TrainError;
use crate::upload::Uploaded;

/// Batches, epoch by epoch. A run lays them out on a thread of their own.
pub trait Batches: Sync {
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

/// The micro-batches of one optimizer step.
pub(crate) struct Group {
    pub uploaded: Uploaded,
    /// Passes over the data, these batches included.
    pub epochs: f64,
}

/// Brings the groups of all epochs to the devices and sends them in their order, until nobody takes them any more, an epoch
/// has none or the model cannot read one.
pub(crate) fn lay_out(
    train: &dyn Batches,
    grad_accumulation: usize,
    uploaders: &[Uploader],
    groups: &SyncSender<Result<Group, TrainError>>,
) {
    for epoch in 0.. {
        let mut batches = train.epoch(epoch);
        let count = batches.len();
        if count == 0 {
            // Whoever is gone does not need to know.
            let _ = groups.send(Err(TrainError::NoBatches { epoch }));
            return;
        }
        while batches.len() > 0 {
            let group: Vec<Batch> = batches.by_ref().take(grad_accumulation).collect();
            let epochs = epoch as f64 + (count - batches.len()) as f64 / count as f64;
            let group = Uploaded::new(uploaders, &group).map(|uploaded| Group { uploaded, epochs });
            let failed = group.is_err();
            if groups.send(group).is_err() || failed {
                return;
            }
        }
    }
}
