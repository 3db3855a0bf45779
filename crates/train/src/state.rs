//! One optimizer step: micro-batches to gradients, gradients to clipped gradients, clipped gradients to parameters.

use std::thread;
use std::time::Instant;

use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{DType, Tensor, TensorData};
use emberlora_data::{Batch, RowRef};
use emberlora_lora::Pass;
use emberlora_model::{CausalLm, Uploader};

use crate::gradients;
use crate::optimizer::{AdamW, Optimizer};
use crate::replicas::{Replica, adapters_of, guarded};
use crate::upload::{MicroBatch, Uploaded};
use crate::{LrSchedule, Quantity, Rows, TrainError};

/// A model under training: its parameters, the optimizer's moments and the place in the schedule.
///
/// This is the lower level of the library: [`TrainState::step`] takes exactly the batches it is given.
pub struct TrainState {
    model: CausalLm,
    /// The copies on further devices; their adapters are the model's.
    replicas: Vec<Replica>,
    /// What brings micro-batches to the model's device and to those of the replicas, in this order.
    uploaders: Vec<Uploader>,
    /// The device of the model, as errors name it.
    device: Option<String>,
    optimizer: Optimizer,
    schedule: LrSchedule,
    max_grad_norm: Option<f64>,
    seed: u64,
    steps: usize,
    /// What the last gradient was multiplied by; negative once a step was not finite.
    factor: Option<Tensor<1>>,
    unread: Vec<Unread>,
    reads: usize,
}

/// A step that was taken and whose loss and gradient norm are still on the device.
struct Unread {
    /// The steps before it.
    before: usize,
    /// The losses of its micro-batches, the square of the gradient norm, and the factor on the gradient.
    numbers: Tensor<1>,
    /// Where the documents of each micro-batch with trained tokens came from.
    sources: Vec<Vec<RowRef>>,
    lr: f64,
    tokens: usize,
    trained_tokens: usize,
    /// What the host spent on it.
    seconds: f64,
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
    /// The step, counted from 1.
    pub step: usize,
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
    /// Wall-clock time: what the host spent on the step, and its part of the wait for what was read together.
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
        let optimizer = Optimizer::new(optimizer);
        let uploaders = vec![model.uploader()];
        Ok(Self {
            model,
            replicas: Vec::new(),
            uploaders,
            device: None,
            optimizer,
            schedule,
            max_grad_norm,
            seed,
            steps: 0,
            factor: None,
            unread: Vec::new(),
            reads: 0,
        })
    }

    /// Divides the micro-batches of every step among the model's own device, which errors will name `device`, and those
    /// of `replicas`, each of which takes over the model's adapters. A gradient is the same but for the order in which
    /// its parts are added. With replicas every step waits for all devices.
    ///
    /// # Errors
    /// [`TrainError::Device`] with the device that failed.
    pub fn spread(mut self, device: String, replicas: Vec<Replica>) -> Result<Self, TrainError> {
        self.uploaders.truncate(1);
        self.uploaders.extend(replicas.iter().map(Replica::uploader));
        (self.device, self.replicas) = (Some(device), replicas);
        self.hand_on()?;
        Ok(self)
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
    /// learning rate above about 0.1, keeps a copy until its outcome is read, and brings back the parameters as they were.
    pub fn restore_last_good(&mut self) {
        self.steps = self.optimizer.undo(&mut self.model).unwrap_or(self.steps);
    }

    /// Ends training and hands the model back.
    pub fn into_model(self) -> CausalLm {
        self.model
    }

    /// Optimizer steps taken so far, those without a trained token included.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// How often losses and norms have been read from the device, which is how often the host has waited for it.
    pub fn reads(&self) -> usize {
        self.reads
    }

    /// Takes one optimizer step over `micro_batches` and waits for what comes of it.
    ///
    /// The loss is the mean over all their trained tokens, so it does not matter how tokens are spread over
    /// micro-batches. Without any trained token the answer is `None`: parameters and moments stay as they are, and the
    /// step still counts for the schedule.
    ///
    /// # Errors
    /// [`TrainError::NotFinite`] with nothing updated; [`TrainError::Input`], [`TrainError::Device`].
    pub fn step(&mut self, micro_batches: &[Batch]) -> Result<Option<StepOutcome>, TrainError> {
        if !self.enqueue(micro_batches)? {
            return Ok(None);
        }
        let mut outcomes = Vec::new();
        self.read_into(&mut outcomes)?;
        Ok(outcomes.pop())
    }

    /// Takes one optimizer step without waiting for the device: gradient, norm, clipping and update are told to it one
    /// after the other, and what comes of them is for [`TrainState::read_into`] to say. Answers whether there was a
    /// trained token.
    ///
    /// A step whose loss or gradient is not finite changes nothing, and neither does any step after it.
    ///
    /// # Errors
    /// [`TrainError::Input`]; with [replicas](Self::spread), which are waited for, [`TrainError::Device`].
    pub fn enqueue(&mut self, micro_batches: &[Batch]) -> Result<bool, TrainError> {
        let uploaded = Uploaded::new(&self.uploaders, micro_batches)?;
        self.enqueue_uploaded(uploaded)
    }

    /// What brings micro-batches to the devices that share a step.
    pub(crate) fn uploaders(&self) -> Vec<Uploader> {
        self.uploaders.clone()
    }

    /// As [`TrainState::enqueue`], with micro-batches that are on their devices already.
    pub(crate) fn enqueue_uploaded(&mut self, uploaded: Uploaded) -> Result<bool, TrainError> {
        let start = Instant::now();
        let (before, lr) = (self.steps, self.schedule.lr(self.steps));
        let gradients = self.gradients_of(&uploaded)?;
        self.steps += 1;
        let Some(StepGradients { losses, grads }) = gradients else { return Ok(false) };
        let squared_norm = gradients::squared_norm(&self.model, &grads).unwrap_or_else(|| losses.zeros_like().sum());
        let factor = gradients::factor(&losses, &squared_norm, self.max_grad_norm, self.factor.as_ref());
        self.optimizer.update(&mut self.model, grads, lr, &factor, before);
        self.unread.push(Unread {
            before,
            numbers: Tensor::cat(vec![losses, squared_norm, factor.clone()], 0),
            sources: uploaded.micro_batches.into_iter().map(|micro_batch| micro_batch.sources).collect(),
            lr,
            tokens: uploaded.tokens,
            trained_tokens: uploaded.trained_tokens,
            seconds: start.elapsed().as_secs_f64(),
        });
        self.factor = Some(factor);
        self.hand_on()?;
        Ok(true)
    }

    /// Reads what came of the steps since the last call, in one transfer, and adds it to `outcomes` in their order.
    ///
    /// # Errors
    /// [`TrainError::NotFinite`] for the first step whose loss or gradient is not finite, with the outcomes of those
    /// before it added; [`TrainError::Device`].
    pub fn read_into(&mut self, outcomes: &mut Vec<StepOutcome>) -> Result<(), TrainError> {
        let unread = std::mem::take(&mut self.unread);
        if unread.is_empty() {
            return Ok(());
        }
        let start = Instant::now();
        self.reads += 1;
        let numbers = read(Tensor::cat(unread.iter().map(|step| step.numbers.clone()).collect(), 0));
        let numbers = numbers.map_err(|error| self.named(error))?;
        let waited = start.elapsed().as_secs_f64() / unread.len() as f64;
        let mut numbers = numbers.into_iter();
        for (place, step) in unread.iter().enumerate() {
            let losses: Vec<f64> = numbers.by_ref().take(step.sources.len()).collect();
            // Cat in `enqueue`: every step has both.
            let (norm, factor) = (numbers.next().unwrap_or_default().sqrt(), numbers.next().unwrap_or_default());
            if factor < 0.0 {
                self.optimizer.forget(unread.len() - place);
                self.steps = step.before;
                return Err(step.not_finite(&losses, norm));
            }
            outcomes.push(StepOutcome {
                step: step.before + 1,
                loss: losses.iter().sum(),
                lr: step.lr,
                grad_norm: norm,
                tokens: step.tokens,
                trained_tokens: step.trained_tokens,
                seconds: step.seconds + waited,
            });
        }
        self.optimizer.settle();
        Ok(())
    }

    /// Loss and gradient of `micro_batches` at the current parameters. `None` without any trained token.
    ///
    /// Looking changes nothing: dropout masks follow from the seed, the number of the optimizer step and the place of the
    /// micro-batch in it, so the next [`TrainState::step`] over the same batches has this loss and this gradient.
    ///
    /// # Errors
    /// [`TrainError::Input`]; with [replicas](Self::spread) [`TrainError::Device`].
    pub fn gradients(&self, micro_batches: &[Batch]) -> Result<Option<StepGradients>, TrainError> {
        self.gradients_of(&Uploaded::new(&self.uploaders, micro_batches)?)
    }

    fn gradients_of(&self, uploaded: &Uploaded) -> Result<Option<StepGradients>, TrainError> {
        let share = |device: usize| &uploaded.micro_batches[uploaded.shares[device].clone()];
        let (seed, step) = (self.seed, self.steps);
        let (own, others) = thread::scope(|scope| {
            let replicas = self.replicas.iter().zip(1..);
            let threads: Vec<_> = replicas
                .map(|(replica, device)| scope.spawn(move || replica.share(share(device), seed, step)))
                .collect();
            let own = match threads.is_empty() {
                true => Ok(backward(&self.model, share(0), seed, step)),
                false => guarded(|| Ok(backward(&self.model, share(0), seed, step))),
            };
            let join = |thread: thread::ScopedJoinHandle<'_, _>| thread.join().expect("a share catches its panics");
            (own, threads.into_iter().map(join).collect::<Vec<_>>())
        });
        let (mut losses, mut sum) = own.map_err(|error| self.named(error))?;
        for other in others {
            let mut other = other?;
            let found = std::mem::take(&mut other.losses);
            if !found.is_empty() {
                let count = found.len();
                losses.push(Tensor::from_data(TensorData::new(found, [count]), (&self.model.device(), DType::F32)));
                sum.accumulate(&self.model, other.upload(&self.model));
            }
        }
        Ok((!losses.is_empty()).then(|| StepGradients { losses: Tensor::cat(losses, 0), grads: sum.grads() }))
    }

    /// Gives the replicas the adapters as they are now.
    fn hand_on(&mut self) -> Result<(), TrainError> {
        if self.replicas.is_empty() {
            return Ok(());
        }
        let adapters = adapters_of(&self.model).map_err(|error| self.named(error))?;
        self.replicas.iter_mut().try_for_each(|replica| replica.follow(&adapters))
    }

    /// `error` with the name of the model's device, where it does not say whose it is.
    pub(crate) fn named(&self, error: TrainError) -> TrainError {
        match &self.device {
            Some(device) => error.on(device),
            None => error,
        }
    }
}

/// The losses of some of a step's micro-batches, and the sum of their gradients.
pub(crate) fn backward(
    model: &CausalLm,
    micro_batches: &[MicroBatch],
    seed: u64,
    step: usize,
) -> (Vec<Tensor<1>>, GradientsAccumulator<CausalLm>) {
    let mut losses = Vec::with_capacity(micro_batches.len());
    let mut sum = GradientsAccumulator::new();
    for MicroBatch { index, batch, sources: _ } in micro_batches {
        // Step and index in one number; neither comes near 2^32.
        let pass = Pass::train(seed, (step as u64) << 32 | index);
        let loss = model.loss_of(batch, &pass);
        losses.push(loss.clone().inner());
        sum.accumulate(model, GradientsParams::from_grads(loss.backward(), model));
    }
    (losses, sum)
}

impl Unread {
    /// The first loss that is not finite, else the norm.
    fn not_finite(&self, losses: &[f64], norm: f64) -> TrainError {
        let broken = losses.iter().zip(&self.sources).find(|(loss, _)| !loss.is_finite());
        let (quantity, value, sources) = match broken {
            Some((&loss, sources)) => (Quantity::Loss, loss, std::slice::from_ref(sources)),
            None => (Quantity::GradientNorm, norm, &self.sources[..]),
        };
        TrainError::NotFinite { step: self.before + 1, quantity, value, rows: rows(sources.iter().flatten()) }
    }
}

/// Where some documents came from.
pub(crate) fn rows<'a>(sources: impl IntoIterator<Item = &'a RowRef>) -> Rows {
    Rows(sources.into_iter().map(ToString::to_string).collect())
}

/// Reads a vector back from the device, to compute with.
pub(crate) fn read(tensor: Tensor<1>) -> Result<Vec<f64>, TrainError> {
    Ok(read_f32(tensor)?.into_iter().map(f64::from).collect())
}

/// Reads a vector back from the device, to hand it on.
pub(crate) fn read_f32(tensor: Tensor<1>) -> Result<Vec<f32>, TrainError> {
    let failed = |error: &dyn std::fmt::Display| TrainError::Device { device: None, message: error.to_string() };
    let data = tensor.cast(DType::F32).try_into_data().map_err(|error| failed(&error))?;
    data.try_into_vec::<f32>().map_err(|error| failed(&error))
}
