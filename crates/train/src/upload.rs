//! The micro-batches of a step on the device, brought there before the step begins.

use std::ops::Range;

use emberlora_data::{Batch, RowRef, Target};
use emberlora_model::{Labelled, Labels, Uploader};

use crate::TrainError;
use crate::state::rows;

/// What one optimizer step trains on.
pub(crate) struct Uploaded {
    /// Those with trained tokens.
    pub micro_batches: Vec<MicroBatch>,
    /// Which of them are on each of the devices.
    pub shares: Vec<Range<usize>>,
    /// Tokens given, shared ones as often as documents have them; padding does not count.
    pub tokens: usize,
    /// Labels, each as often as documents have it.
    pub trained_tokens: usize,
    /// Where the documents of all micro-batches came from.
    pub sources: Vec<RowRef>,
}

/// A micro-batch with trained tokens.
pub(crate) struct MicroBatch {
    /// Its place in the step, counted over those without trained tokens as well.
    pub index: u64,
    /// Each trained token weighs what it does in the mean over the whole step.
    pub batch: Labelled,
    /// Where its documents came from.
    pub sources: Vec<RowRef>,
}

impl Uploaded {
    /// Divides the micro-batches of one step among the devices and brings them there. Neighbours stay together, and no
    /// device gets more than one above another.
    ///
    /// # Errors
    /// [`TrainError::Input`].
    pub fn new(uploaders: &[Uploader], batches: &[Batch]) -> Result<Self, TrainError> {
        let trained_tokens: usize = batches.iter().map(Batch::trained_tokens).sum();
        let trained: Vec<_> = (0..).zip(batches).filter(|(_, batch)| !batch.targets.is_empty()).collect();
        let shares = split(trained.len(), uploaders.len());
        let on = uploaders.iter().zip(&shares).flat_map(|(uploader, share)| share.clone().map(move |_| uploader));
        let micro_batches = on.zip(trained).map(|(uploader, (index, batch))| {
            let sources = batch.documents.clone();
            Ok(MicroBatch { index, batch: upload(uploader, batch, 1.0 / trained_tokens as f32)?, sources })
        });
        Ok(Self {
            micro_batches: micro_batches.collect::<Result<_, TrainError>>()?,
            shares,
            tokens: batches.iter().map(|batch| batch.tokens).sum(),
            trained_tokens,
            sources: batches.iter().flat_map(|batch| batch.documents.iter().cloned()).collect(),
        })
    }
}

/// `count` neighbours as runs, one for each of `devices`.
fn split(count: usize, devices: usize) -> Vec<Range<usize>> {
    (0..devices).map(|device| count * device / devices..count * (device + 1) / devices).collect()
}

/// Brings a batch to the device; each trained token weighs `weight`.
pub(crate) fn upload(uploader: &Uploader, batch: &Batch, weight: f32) -> Result<Labelled, TrainError> {
    let of_targets = |f: fn(&Target) -> u32| batch.targets.iter().map(f).collect::<Vec<u32>>();
    let (positions, tokens) = (of_targets(|target| target.position), of_targets(|target| target.token));
    let weights: Vec<f32> = batch.targets.iter().map(|target| weight * target.weight as f32).collect();
    let labels = Labels { positions: &positions, tokens: &tokens, weights: &weights };
    let input = uploader.input(batch.rows, batch.seq, &batch.ids, &batch.positions, &batch.ends);
    let labelled = input.and_then(|input| uploader.label(input, labels));
    labelled.map_err(|source| TrainError::Input { rows: rows(&batch.documents), source })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::split;

    proptest! {
        #[test]
        fn every_micro_batch_goes_to_exactly_one_device(count in 0..50usize, devices in 1..8usize) {
            let shares = split(count, devices);
            prop_assert_eq!(shares.len(), devices);
            prop_assert_eq!(shares.iter().cloned().flatten().collect::<Vec<_>>(), (0..count).collect::<Vec<_>>());
            let lengths = || shares.iter().map(|share| share.len());
            prop_assert!(lengths().max().unwrap() - lengths().min().unwrap() <= 1);
        }
    }
}
