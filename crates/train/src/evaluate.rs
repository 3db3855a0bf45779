//! Loss on held-out data.

use std::borrow::Borrow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::module::Module;
use emberlora_data::Batch;
use emberlora_lora::Pass;
use emberlora_model::CausalLm;
use serde::Serialize;

use crate::TrainError;
use crate::state::{read, rows, summed_loss};

/// Loss over a set of batches, every trained token counting the same.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Mean negative log-likelihood of a trained token, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Trained tokens, the ones the mean is over.
    pub tokens: usize,
    /// Wall-clock time.
    pub seconds: f64,
}

/// Evaluates `model` on `batches`: no gradients are kept and nothing is dropped out.
///
/// # Errors
/// [`TrainError::NothingToEvaluate`] when no batch has a trained token, [`TrainError::EvaluationNotFinite`],
/// [`TrainError::Input`], [`TrainError::Device`].
pub fn evaluate<B: Borrow<Batch>>(
    model: &CausalLm,
    batches: impl IntoIterator<Item = B>,
) -> Result<Evaluation, TrainError> {
    let evaluation = evaluate_until(model, batches, &AtomicBool::new(false))?;
    evaluation.ok_or(TrainError::NothingToEvaluate)
}

/// As [`evaluate`], but gives up with `None` between two batches once `interrupt` is raised.
pub(crate) fn evaluate_until<B: Borrow<Batch>>(
    model: &CausalLm,
    batches: impl IntoIterator<Item = B>,
    interrupt: &AtomicBool,
) -> Result<Option<Evaluation>, TrainError> {
    let start = Instant::now();
    // Off the autodiff device nothing is recorded.
    let model = model.valid();
    let (mut sum, mut tokens) = (0.0, 0);
    for batch in batches {
        let batch = batch.borrow();
        if interrupt.load(Ordering::Relaxed) {
            return Ok(None);
        }
        if batch.targets.is_empty() {
            continue;
        }
        let loss: f64 = read(summed_loss(&model, batch, 1.0, &Pass::eval())?)?.into_iter().sum();
        if !loss.is_finite() {
            return Err(TrainError::EvaluationNotFinite { value: loss, rows: rows([batch]) });
        }
        sum += loss;
        tokens += batch.trained_tokens();
    }
    if tokens == 0 {
        return Err(TrainError::NothingToEvaluate);
    }
    let loss = sum / tokens as f64;
    Ok(Some(Evaluation { loss, perplexity: loss.exp(), tokens, seconds: start.elapsed().as_secs_f64() }))
}
