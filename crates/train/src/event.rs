//! What a run tells its listeners.

use std::path::PathBuf;

use serde::Serialize;

use crate::{Evaluation, TrainError};

/// Something that happened during a run, in the order in which it happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// Everything is loaded; the first step follows.
    RunStarted(RunStarted),
    /// An optimizer step was taken.
    Step(StepMetrics),
    /// A step had no trained token, so it left the parameters as they were.
    Skipped {
        /// The step, counted from 1.
        step: usize,
        /// Where its documents came from, as `file:line`.
        rows: Vec<String>,
    },
    /// The held-out data was evaluated.
    Eval {
        /// The number of steps taken before; 0 is the model as it was given.
        step: usize,
        /// Passes over the training data taken before.
        epoch: f64,
        /// The result.
        evaluation: Evaluation,
    },
    /// The adapter was written.
    Saved {
        /// The number of steps that are in it.
        step: usize,
        /// Where it lies.
        dir: PathBuf,
    },
    /// The run was ended before it was done; the adapter of the last step has been written, or the last good one.
    Stopped {
        /// The number of steps taken.
        step: usize,
        /// Why.
        reason: StopReason,
    },
    /// The run took its last step, and the adapter has been written.
    Finished(Summary),
}

/// Why a run ended before it was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The interrupt flag was raised; the step under way was finished, an evaluation given up.
    Interrupted,
    /// A loss or a gradient was not finite; the run returns the error right after this event.
    NotFinite,
    /// Something else failed, such as a listener that could not write; the run returns the error right after this event.
    Failed,
}

/// What is known before the first step.
#[derive(Clone, Debug, PartialEq)]
pub struct RunStarted {
    /// Optimizer steps the run will take.
    pub total_steps: usize,
    /// Optimizer steps that one pass over the training data takes.
    pub steps_per_epoch: usize,
    /// Micro-batches in one pass over the training data.
    pub batches_per_epoch: usize,
    /// Numbers that are trained.
    pub trainable_parameters: usize,
}

/// One optimizer step, as a line of `metrics.jsonl` holds it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepMetrics {
    /// The step, counted from 1.
    pub step: usize,
    /// Passes over the training data, this step included.
    pub epoch: f64,
    /// Mean loss over the step's trained tokens, in nats.
    pub loss: f64,
    /// The learning rate that the step used.
    pub lr: f64,
    /// Global norm of the gradient, before clipping.
    pub grad_norm: f64,
    /// Tokens read; padding does not count.
    pub tokens: usize,
    /// Tokens that were labels.
    pub trained_tokens: usize,
    /// `tokens / step_seconds`.
    pub tokens_per_second: f64,
    /// Wall-clock time of the step.
    pub step_seconds: f64,
    /// Seconds from the start of the process to the beginning of the step: for the first one, how long it took to get
    /// going. `None` where the system does not tell.
    pub started_seconds: Option<f64>,
    /// The process's largest resident set so far; `None` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
    /// Whether `log_every` asks for a line on the console. A progress bar may show every step, and a file keeps every
    /// one.
    #[serde(skip)]
    pub log: bool,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Optimizer steps taken.
    pub steps: usize,
    /// Wall-clock time of the run, evaluation included.
    pub seconds: f64,
    /// Tokens read for training; padding does not count.
    pub tokens: usize,
    /// Evaluation of the model as it was given, where there is held-out data.
    pub eval_before: Option<Evaluation>,
    /// The last evaluation, where there is held-out data.
    pub eval_after: Option<Evaluation>,
    /// `None`: the run took all its steps and evaluated where they led.
    pub stopped: Option<StopReason>,
}

/// Receives a run's events. An error ends the run, after the other listeners have been told and the adapter has been
/// written.
pub trait Listener {
    /// Takes note of `event`.
    fn event(&mut self, event: &Event) -> Result<(), TrainError>;
}

impl<F: FnMut(&Event)> Listener for F {
    fn event(&mut self, event: &Event) -> Result<(), TrainError> {
        self(event);
        Ok(())
    }
}
