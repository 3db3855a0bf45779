//! The training loop's options, resolved from the recipe.

use emberlora_config::{Optimizer, OptimizerKind, Schedule, ScheduleKind, TrainSection, Warmup};

use crate::schedule::warmup_steps;
use crate::{AdamW, Decay, LrSchedule};

/// How long a run lasts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// Passes over the data; may be a fraction.
    Epochs(f64),
    /// Optimizer steps; the data is repeated as needed.
    Steps(usize),
}

/// What the training loop needs to know besides the model and the data.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainOptions {
    /// How long the run lasts.
    pub length: Length,
    /// Micro-batches per optimizer step, at least 1.
    pub grad_accumulation: usize,
    /// The peak of the learning rate.
    pub learning_rate: f64,
    /// How the learning rate moves after the warm-up.
    pub decay: Decay,
    /// How long it rises before.
    pub warmup: Warmup,
    /// The learning rate at the end, as a part of the peak.
    pub min_ratio: f64,
    /// The optimizer's constants.
    pub optimizer: AdamW,
    /// The gradient is scaled down when its global norm exceeds this.
    pub max_grad_norm: Option<f64>,
    /// Evaluate every this many steps, and always before the first and after the last one.
    pub eval_every: Option<usize>,
    /// Write the adapter every this many steps, and always at the end.
    pub save_every: Option<usize>,
    /// Mark every this many steps for the console, and always the first and the last one; losses and norms are read from
    /// the device no more often, but where an adapter is written or evaluated.
    pub log_every: usize,
    /// Seed of the dropout masks.
    pub seed: u64,
}

impl TrainOptions {
    /// What a recipe's `train` section and `seed` ask for.
    pub fn new(train: &TrainSection, seed: u64) -> Self {
        // Without `..`, so that a new key of the recipe cannot be forgotten here.
        let TrainSection {
            epochs,
            max_steps,
            batch_size: _, // the data's: it decides what a micro-batch is
            grad_accumulation,
            learning_rate,
            schedule: Schedule { kind, warmup, min_ratio },
            optimizer: Optimizer { kind: OptimizerKind::AdamW, betas, eps, weight_decay },
            max_grad_norm,
            eval_every,
            save_every,
            log_every,
        } = train;
        Self {
            length: max_steps.map_or(Length::Epochs(*epochs), Length::Steps),
            grad_accumulation: *grad_accumulation,
            learning_rate: *learning_rate,
            decay: match kind {
                ScheduleKind::Constant => Decay::Constant,
                ScheduleKind::Linear => Decay::Linear,
                ScheduleKind::Cosine => Decay::Cosine,
            },
            warmup: *warmup,
            min_ratio: *min_ratio,
            optimizer: AdamW { betas: *betas, eps: *eps, weight_decay: *weight_decay },
            max_grad_norm: *max_grad_norm,
            eval_every: *eval_every,
            save_every: *save_every,
            log_every: *log_every,
            seed,
        }
    }

    /// The learning rates of a run of `total_steps`.
    pub fn schedule(&self, total_steps: usize) -> LrSchedule {
        let warmup = match self.warmup {
            Warmup::Ratio(ratio) => warmup_steps(ratio, total_steps),
            Warmup::Steps(steps) => steps,
        };
        LrSchedule::new(self.learning_rate, self.decay, warmup, total_steps, self.min_ratio)
    }
}
