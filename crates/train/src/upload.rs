//! The micro-batches of a step on the device, brought there before the step begins.

use emberlora_data::{Batch, RowRef, Target};
use emberlora_model::{Labelled, Labels, Uploader};

use crate::TrainError;
use crate::state::rows;

/// What one optimizer step trains on.
pub(crate) struct Uploaded {
    /// Those with trained tokens.
    pub micro_batches: Vec<MicroBatch>,
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
    /// Brings the micro-batches of one step to the device.
    ///
    /// # Errors
    /// [`TrainError::Input`].
    pub fn new(uploader: &Uploader, batches: &[Batch]) -> Result<Self, TrainError> {
        let trained_tokens: usize = batches.iter().map(Batch::trained_tokens).sum();
        let trained = (0..).zip(batches).filter(|(_, batch)| !batch.targets.is_empty());
        let micro_batches = trained.map(|(index, batch)| {
            let sources = batch.documents.clone();
            Ok(MicroBatch { index, batch: upload(uploader, batch, 1.0 / trained_tokens as f32)?, sources })
        });
        Ok(Self {
            micro_batches: micro_batches.collect::<Result<_, TrainError>>()?,
            tokens: batches.iter().map(|batch| batch.tokens).sum(),
            trained_tokens,
            sources: batches.iter().flat_map(|batch| batch.documents.iter().cloned()).collect(),
        })
    }
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
