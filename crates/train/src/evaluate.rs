//! Loss on held-out data.

use std::borrow::Borrow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use burn::module::Module;
use burn::tensor::Tensor;
use emberlora_data::Batch;
use emberlora_lora::Pass;
use emberlora_model::CausalLm;
use serde::Serialize;

use crate::TrainError;
use crate::state::{read, rows};
use crate::upload::upload;

/// Losses of this many batches are read from the device at one time.
const READ_TOGETHER: usize = 16;

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
    let uploader = model.uploader();
    let (mut sum, mut tokens) = (0.0, 0);
    let mut batches = batches.into_iter();
    loop {
        let mut unread = Vec::with_capacity(READ_TOGETHER);
        for batch in batches.by_ref() {
            if interrupt.load(Ordering::Relaxed) {
                return Ok(None);
            }
            if !batch.borrow().targets.is_empty() {
                let loss = model.loss_of(&upload(&uploader, batch.borrow(), 1.0)?, &Pass::eval());
                unread.push((batch, loss));
            }
            if unread.len() == READ_TOGETHER {
                break;
            }
        }
        if unread.is_empty() {
            break;
        }
        let losses = read(Tensor::cat(unread.iter().map(|(_, loss)| loss.clone()).collect(), 0))?;
        for ((batch, _), loss) in unread.iter().zip(losses) {
            let batch = batch.borrow();
            if !loss.is_finite() {
                return Err(TrainError::EvaluationNotFinite { value: loss, rows: rows(&batch.documents) });
            }
            sum += loss;
            tokens += batch.trained_tokens();
        }
    }
    if tokens == 0 {
        return Err(TrainError::NothingToEvaluate);
    }
    let loss = sum / tokens as f64;
    Ok(Some(Evaluation { loss, perplexity: loss.exp(), tokens, seconds: start.elapsed().as_secs_f64() }))
}
