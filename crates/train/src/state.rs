//! One optimizer step: micro-batches to gradients, gradients to clipped gradients, clipped gradients to parameters.

use std::time::Instant;

use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{DType, Tensor};
use emberlora_data::{Batch, Target};
use emberlora_lora::Pass;
use emberlora_model::CausalLm;

use crate::gradients;
use crate::optimizer::{AdamW, Optimizer};
use crate::{LrSchedule, Quantity, Rows, TrainError};

/// A model under training: its parameters, the optimizer's moments and the place in the schedule.
///
/// This is the lower level of the library: [`TrainState::step`] takes exactly the batches it is given.
pub struct TrainState {
    model: CausalLm,
    optimizer: Optimizer,
    schedule: LrSchedule,
    max_grad_norm: Option<f64>,
    seed: u64,
    steps: usize,
    /// The steps before the last update.
    good_steps: usize,
}

/// Loss and gradient of one optimizer step, still on the device.
pub struct StepGradients {
    /// One element per micro-batch that has trained tokens; they add up to the mean loss over the trained tokens of the
    /// whole step. Shape `[micro_batches]`, f32.
    pub losses: Tensor<1>,
    /// Gradient of that mean with respect to every trainable parameter.
    pub grads: GradientsParams,
}

/// What one optimizer step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// Mean loss over the step's trained tokens, in nats.
    pub loss: f64,
    /// The learning rate that was used.
    pub lr: f64,
    /// Global norm of the gradient, before clipping.
    pub grad_norm: f64,
    /// Tokens given, shared ones as often as documents have them; padding does not count.
    pub tokens: usize,
    /// Labels, each as often as documents have it.
    pub trained_tokens: usize,
    /// Wall-clock time.
    pub seconds: f64,
}

impl TrainState {
    /// Begins training `model`, whose tensors live on an autodiff device.
    ///
    /// # Errors
    /// [`TrainError::NothingToTrain`] when no parameter requires a gradient.
    pub fn new(
        model: CausalLm,
        optimizer: AdamW,
        schedule: LrSchedule,
        max_grad_norm: Option<f64>,
        seed: u64,
    ) -> Result<Self, TrainError> {
        if gradients::trainable_parameters(&model) == 0 {
            return Err(TrainError::NothingToTrain);
        }
        Ok(Self { model, optimizer: Optimizer::new(optimizer), schedule, max_grad_norm, seed, steps: 0, good_steps: 0 })
    }

    /// The model as it is now.
    pub fn model(&self) -> &CausalLm {
        &self.model
    }

    /// Goes back to the model whose loss and gradient were last finite: after [`TrainError::NotFinite`], the one that the
    /// step before began with. The optimizer's moments stay, so this is where training ends.
    ///
    /// No second copy of the adapters is kept for this: the last update is undone by computing, which brings a parameter
    /// back to about 10⁻⁷ of the larger of itself and 1. Only an update that could have gone too far for that, with a
    /// learning rate above about 0.1, keeps a copy, and brings back the parameters as they were.
    pub fn restore_last_good(&mut self) {
        self.optimizer.undo(&mut self.model);
        self.steps = self.good_steps;
    }

    /// Ends training and hands the model back.
    pub fn into_model(self) -> CausalLm {
        self.model
    }

    /// Optimizer steps taken so far, those without a trained token included.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Takes one optimizer step over `micro_batches`.
    ///
    /// The loss is the mean over all their trained tokens, so it does not matter how tokens are spread over
    /// micro-batches. Without any trained token the answer is `None`: parameters and moments stay as they are, and the
    /// step still counts for the schedule.
    ///
    /// # Errors
    /// [`TrainError::NotFinite`] before anything is updated; [`TrainError::Input`], [`TrainError::Device`].
    pub fn step(&mut self, micro_batches: &[Batch]) -> Result<Option<StepOutcome>, TrainError> {
        let start = Instant::now();
        let lr = self.schedule.lr(self.steps);
        let Some(StepGradients { losses, grads }) = self.gradients(micro_batches)? else {
            self.steps += 1;
            return Ok(None);
        };
        let (loss, grad_norm) = self.read(losses, &grads, micro_batches)?;
        let factor = gradients::clip_factor(grad_norm, self.max_grad_norm);
        self.optimizer.update(&mut self.model, grads, lr, factor);
        self.good_steps = self.steps;
        self.steps += 1;
        Ok(Some(StepOutcome {
            loss,
            lr,
            grad_norm,
            tokens: micro_batches.iter().map(|batch| batch.tokens).sum(),
            trained_tokens: trained_tokens(micro_batches),
            seconds: start.elapsed().as_secs_f64(),
        }))
    }

    /// Loss and gradient of `micro_batches` at the current parameters. `None` without any trained token.
    ///
    /// Looking changes nothing: dropout masks follow from the seed, the number of the optimizer step and the place of the
    /// micro-batch in it, so the next [`TrainState::step`] over the same batches has this loss and this gradient.
    ///
    /// # Errors
    /// [`TrainError::Input`].
    pub fn gradients(&self, micro_batches: &[Batch]) -> Result<Option<StepGradients>, TrainError> {
        let weight = 1.0 / trained_tokens(micro_batches) as f32;
        let mut losses = Vec::with_capacity(micro_batches.len());
        let mut sum = GradientsAccumulator::new();
        for (index, batch) in micro_batches.iter().enumerate() {
            // Step and index in one number; neither comes near 2^32.
            let pass = Pass::train(self.seed, (self.steps as u64) << 32 | index as u64);
            if batch.targets.is_empty() {
                continue;
            }
            let loss = summed_loss(&self.model, batch, weight, &pass)?;
            losses.push(loss.clone().inner());
            sum.accumulate(&self.model, GradientsParams::from_grads(loss.backward(), &self.model));
        }
        Ok((!losses.is_empty()).then(|| StepGradients { losses: Tensor::cat(losses, 0), grads: sum.grads() }))
    }

    /// Reads loss and gradient norm from the device, in one transfer, and refuses what is not finite.
    fn read(&self, losses: Tensor<1>, grads: &GradientsParams, batches: &[Batch]) -> Result<(f64, f64), TrainError> {
        let count = losses.dims()[0];
        let numbers = match gradients::squared_norms(&self.model, grads) {
            Some(squares) => read(Tensor::cat(vec![losses, squares], 0))?,
            None => read(losses)?,
        };
        let (losses, squares) = numbers.split_at(count);
        let norm = squares.iter().sum::<f64>().sqrt();
        let trained = batches.iter().filter(|batch| !batch.targets.is_empty());
        let broken = losses.iter().zip(trained).find(|(loss, _)| !loss.is_finite());
        let (quantity, value, rows) = match broken {
            Some((&loss, batch)) => (Quantity::Loss, loss, rows([batch])),
            None if !norm.is_finite() => (Quantity::GradientNorm, norm, rows(batches)),
            None => return Ok((losses.iter().sum(), norm)),
        };
        Err(TrainError::NotFinite { step: self.steps + 1, quantity, value, rows })
    }
}

fn trained_tokens(batches: &[Batch]) -> usize {
    batches.iter().map(Batch::trained_tokens).sum()
}

/// The loss of a batch, each trained token weighing `weight`: f32, `[1]`.
pub(crate) fn summed_loss(model: &CausalLm, batch: &Batch, weight: f32, pass: &Pass) -> Result<Tensor<1>, TrainError> {
    let failed = |source| TrainError::Input { rows: rows([batch]), source };
    let of_targets = |f: fn(&Target) -> u32| batch.targets.iter().map(f).collect::<Vec<u32>>();
    let (positions, tokens) = (of_targets(|target| target.position), of_targets(|target| target.token));
    let weights: Vec<f32> = batch.targets.iter().map(|target| weight * target.weight as f32).collect();
    let input = model.input(batch.rows, batch.seq, &batch.ids, &batch.positions, &batch.ends).map_err(failed)?;
    model.loss_of(&input, &positions, &tokens, &weights, pass).map_err(failed)
}

/// Where the documents of some batches came from.
pub(crate) fn rows<'a>(batches: impl IntoIterator<Item = &'a Batch>) -> Rows {
    let documents = batches.into_iter().flat_map(|batch| &batch.documents);
    Rows(documents.map(|row| row.to_string()).collect())
}

/// Reads a vector back from the device.
pub(crate) fn read(tensor: Tensor<1>) -> Result<Vec<f64>, TrainError> {
    let failed = |error: &dyn std::fmt::Display| TrainError::Device { message: error.to_string() };
    let data = tensor.cast(DType::F32).try_into_data().map_err(|error| failed(&error))?;
    let numbers = data.try_to_vec::<f32>().map_err(|error| failed(&error))?;
    Ok(numbers.into_iter().map(f64::from).collect())
}
