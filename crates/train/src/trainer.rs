//! The training loop.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::Instant;

use emberlora_lora::LoraOptions;
use emberlora_lora::peft::{self, PeftError};
use emberlora_model::CausalLm;

use crate::batches::{Group, lay_out};
use crate::evaluate::evaluate_until;
use crate::process::seconds_since_start;
use crate::state::{StepOutcome, rows};
use crate::{
    Batches, Evaluation, Event, Length, Listener, Replica, RunStarted, StepMetrics, StopReason, Summary, TrainError,
    TrainOptions, TrainState, gradients, peak_memory_bytes,
};

/// Where and how a run writes its adapter.
#[derive(Clone, Debug, derive_new::new)]
pub struct AdapterWriter {
    /// How the adapter was made; becomes `adapter_config.json`.
    options: LoraOptions,
    /// `base_model_name_or_path`.
    base_model: String,
    /// The base model's revision, for a model of the hub.
    revision: Option<String>,
    /// The directory; what is there is replaced as a whole.
    dir: PathBuf,
}

impl AdapterWriter {
    /// Writes the adapter of `model` and answers where it lies.
    ///
    /// # Errors
    /// [`TrainError::Save`], [`TrainError::Device`]; what was there before is then still there.
    pub fn write(&self, model: &CausalLm) -> Result<&Path, TrainError> {
        peft::save(model, &self.options, &self.base_model, self.revision.as_deref(), &self.dir).map_err(|source| {
            match source {
                // The place is fine; the adapter cannot be had.
                PeftError::Device { .. } => TrainError::Device { device: None, message: source.to_string() },
                source => TrainError::Save { dir: self.dir.clone(), source },
            }
        })?;
        Ok(&self.dir)
    }
}

/// What a run leaves behind.
#[derive(Debug)]
pub struct Trained {
    /// The model with its trained adapters.
    pub model: CausalLm,
    /// How the run went.
    pub summary: Summary,
}

/// A run: a model, the batches to train it on, and what to tell about it.
pub struct Trainer<'a> {
    state: TrainState,
    train: &'a dyn Batches,
    eval: Option<&'a dyn Batches>,
    options: TrainOptions,
    writer: Option<AdapterWriter>,
    plan: RunStarted,
}

impl<'a> Trainer<'a> {
    /// Prepares a run of `model`, whose tensors live on an autodiff device.
    ///
    /// Evaluation reads epoch 0 of `eval` each time. Without a `writer` no adapter is written.
    ///
    /// # Errors
    /// [`TrainError::NoBatches`], [`TrainError::NothingToTrain`].
    pub fn new(
        model: CausalLm,
        train: &'a dyn Batches,
        eval: Option<&'a dyn Batches>,
        options: TrainOptions,
        writer: Option<AdapterWriter>,
    ) -> Result<Self, TrainError> {
        let options = TrainOptions { grad_accumulation: options.grad_accumulation.max(1), ..options };
        let batches_per_epoch = train.epoch(0).len();
        if batches_per_epoch == 0 {
            return Err(TrainError::NoBatches { epoch: 0 });
        }
        let plan = RunStarted {
            total_steps: match options.length {
                Length::Epochs(epochs) => train.steps(epochs, options.grad_accumulation),
                Length::Steps(steps) => steps,
            }
            .max(1),
            steps_per_epoch: batches_per_epoch.div_ceil(options.grad_accumulation),
            batches_per_epoch,
            trainable_parameters: gradients::trainable_parameters(&model),
        };
        let schedule = options.schedule(plan.total_steps);
        let state = TrainState::new(model, options.optimizer, schedule, options.max_grad_norm, options.seed)?;
        Ok(Self { state, train, eval, options, writer, plan })
    }

    /// Divides the micro-batches of every step among several devices; see [`TrainState::spread`].
    ///
    /// # Errors
    /// [`TrainError::Device`].
    pub fn spread(mut self, device: String, replicas: Vec<Replica>) -> Result<Self, TrainError> {
        self.state = self.state.spread(device, replicas)?;
        Ok(self)
    }

    /// What is known before the first step.
    pub fn plan(&self) -> &RunStarted {
        &self.plan
    }

    /// The model as it is now.
    pub fn model(&self) -> &CausalLm {
        self.state.model()
    }

    /// Trains to the end, or until `interrupt` is raised: the step under way is then finished, an evaluation given up.
    /// Either way the adapter is written. With held-out data the model is evaluated before the first step, after the last
    /// one and every `eval_every` steps between.
    ///
    /// # Errors
    /// [`TrainError::NotFinite`] and [`TrainError::EvaluationNotFinite`], after the last good adapter was written; whatever
    /// a listener reports and the others, after the adapter of the last step was written.
    ///
    /// # Panics
    /// When the batches do.
    pub fn run(mut self, listeners: &mut [&mut dyn Listener], interrupt: &AtomicBool) -> Result<Trained, TrainError> {
        let mut run = Running {
            listeners,
            interrupt,
            start: Instant::now(),
            process_age: seconds_since_start(),
            tokens: 0,
            eval: [None, None],
            saved: None,
            pending: Vec::new(),
        };
        match self.train_to_the_end(&mut run) {
            Ok(summary) => Ok(Trained { model: self.state.into_model(), summary }),
            Err(error) => Err(self.broken(&mut run, error)),
        }
    }

    fn train_to_the_end(&mut self, run: &mut Running<'_, '_>) -> Result<Summary, TrainError> {
        run.tell(Event::RunStarted(self.plan.clone()))?;
        self.evaluate(run, 0.0)?;
        let (train, grad_accumulation, uploaders) =
            (self.train, self.options.grad_accumulation, self.state.uploaders());
        thread::scope(|scope| {
            // While one group is trained, the next waits on the device and the one behind it is being laid out.
            let (sender, groups) = sync_channel(1);
            scope.spawn(move || lay_out(train, grad_accumulation, &uploaders, &sender));
            self.steps(run, groups)
        })
    }

    /// Takes the receiver over: the thread that lays out batches ends when it is gone.
    fn steps(
        &mut self,
        run: &mut Running<'_, '_>,
        groups: Receiver<Result<Group, TrainError>>,
    ) -> Result<Summary, TrainError> {
        loop {
            if run.interrupted() {
                self.catch_up(run)?;
                return self.stop(run);
            }
            let started_seconds = run.process_age.map(|age| age + run.start.elapsed().as_secs_f64());
            let Group { uploaded, epochs } = groups.recv().expect("the thread that lays out batches panicked")?;
            let skipped = uploaded.micro_batches.is_empty().then(|| rows(&uploaded.sources).0);
            let before = self.state.steps();
            let enqueued = self.state.enqueue_uploaded(uploaded);
            // A device that fails when it is handed the new adapters fails behind a step that was taken.
            if self.state.steps() > before {
                run.pending.push(match skipped {
                    None => Pending::Step { epoch: epochs, started_seconds, peak_memory_bytes: peak_memory_bytes() },
                    Some(rows) => Pending::Skipped { step: self.state.steps(), rows },
                });
            }
            enqueued?;
            let finished = self.finished();
            let [save, evaluate] = [self.options.save_every, self.options.eval_every].map(|every| self.due(every));
            // Where the run waits for the device anyway, and no more often than it prints a line.
            if finished || save || evaluate || self.due(Some(self.options.log_every)) {
                self.catch_up(run)?;
            }
            if finished || save {
                self.save(run)?;
            }
            if finished || evaluate {
                self.evaluate(run, epochs)?;
            }
            if finished {
                // Interrupted this late, all steps are taken, but perhaps not the last evaluation.
                return if run.interrupted() { self.stop(run) } else { self.finish(run) };
            }
        }
    }

    /// Reads what came of the steps since the last time and tells it.
    fn catch_up(&mut self, run: &mut Running<'_, '_>) -> Result<(), TrainError> {
        let mut outcomes = Vec::new();
        let read = self.state.read_into(&mut outcomes);
        let (mut outcomes, mut told) = (outcomes.into_iter(), Ok(()));
        for pending in std::mem::take(&mut run.pending) {
            let event = match pending {
                Pending::Skipped { step, rows } => run.tell(Event::Skipped { step, rows }),
                Pending::Step { epoch, started_seconds, peak_memory_bytes } => {
                    // Behind a step that is not finite there are no more.
                    let Some(outcome) = outcomes.next() else { break };
                    run.step(self.metrics(outcome, epoch, started_seconds, peak_memory_bytes))
                }
            };
            // These steps have been taken, so each is told even where a listener fails.
            told = told.and(event);
        }
        read.and(told)
    }

    fn finish(&self, run: &mut Running<'_, '_>) -> Result<Summary, TrainError> {
        let summary = run.summary(self.state.steps(), None);
        run.tell(Event::Finished(summary.clone()))?;
        Ok(summary)
    }

    fn stop(&self, run: &mut Running<'_, '_>) -> Result<Summary, TrainError> {
        let (step, reason) = (self.state.steps(), StopReason::Interrupted);
        if run.saved != Some(step) {
            self.save(run)?;
        }
        run.tell(Event::Stopped { step, reason })?;
        Ok(run.summary(step, Some(reason)))
    }

    /// Writes the adapter, as far as it is good and not written yet, and answers why the run ends.
    fn broken(&mut self, run: &mut Running<'_, '_>, error: TrainError) -> TrainError {
        // What the steps before it came to belongs to the record, and may be the reason to end.
        let error = match self.catch_up(run) {
            Err(reason @ TrainError::NotFinite { .. }) => reason,
            _ => error,
        };
        let step = self.state.steps();
        if matches!(error, TrainError::NotFinite { .. } | TrainError::EvaluationNotFinite { .. }) {
            self.state.restore_last_good();
            let stopped = Event::Stopped { step, reason: StopReason::NotFinite };
            // Where the adapter cannot be written either, that is the more pressing news.
            return self.save(run).and_then(|()| run.tell(stopped)).err().unwrap_or(error);
        }
        let unwritable = matches!(error, TrainError::Save { .. });
        if step > 0
            && run.saved != Some(step)
            && !unwritable
            && let Err(second) = self.save(run)
            && run.saved != Some(step)
        {
            tracing::warn!("{second}, so the adapter after step {step} is lost");
        }
        // A listener that fails once may fail again; the first error is the one to report.
        let _ = run.tell(Event::Stopped { step, reason: StopReason::Failed });
        error
    }

    fn finished(&self) -> bool {
        self.state.steps() >= self.plan.total_steps
    }

    fn due(&self, every: Option<usize>) -> bool {
        every.is_some_and(|every| self.state.steps().is_multiple_of(every))
    }

    fn metrics(
        &self,
        outcome: StepOutcome,
        epoch: f64,
        started_seconds: Option<f64>,
        peak_memory_bytes: Option<u64>,
    ) -> StepMetrics {
        let StepOutcome { step, loss, lr, grad_norm, tokens, trained_tokens, seconds } = outcome;
        StepMetrics {
            step,
            epoch,
            loss,
            lr,
            grad_norm,
            tokens,
            trained_tokens,
            tokens_per_second: tokens as f64 / seconds,
            step_seconds: seconds,
            started_seconds,
            peak_memory_bytes,
            log: step == 1 || step == self.plan.total_steps || step.is_multiple_of(self.options.log_every),
        }
    }

    fn save(&self, run: &mut Running<'_, '_>) -> Result<(), TrainError> {
        let Some(writer) = &self.writer else { return Ok(()) };
        let dir = writer.write(self.state.model()).map_err(|error| self.state.named(error))?;
        let (step, dir) = (self.state.steps(), dir.to_owned());
        run.saved = Some(step);
        run.tell(Event::Saved { step, dir })
    }

    fn evaluate(&self, run: &mut Running<'_, '_>, epoch: f64) -> Result<(), TrainError> {
        let Some(batches) = self.eval else { return Ok(()) };
        let evaluation = evaluate_until(self.state.model(), batches.epoch(0), run.interrupt);
        let evaluation = evaluation.map_err(|error| self.state.named(error))?;
        let Some(evaluation) = evaluation else { return Ok(()) };
        run.eval = [run.eval[0].or(Some(evaluation)), Some(evaluation)];
        run.tell(Event::Eval { step: self.state.steps(), epoch, evaluation })
    }
}

/// What lasts as long as one call of [`Trainer::run`].
struct Running<'r, 'l> {
    listeners: &'r mut [&'l mut dyn Listener],
    interrupt: &'r AtomicBool,
    start: Instant,
    /// How old the process was at `start`, in seconds.
    process_age: Option<f64>,
    tokens: usize,
    /// The first and the last evaluation.
    eval: [Option<Evaluation>; 2],
    /// The step whose adapter was written last.
    saved: Option<usize>,
    /// What has been done and not been told yet.
    pending: Vec<Pending>,
}

/// A step between its beginning and the time when its outcome is read.
enum Pending {
    Step { epoch: f64, started_seconds: Option<f64>, peak_memory_bytes: Option<u64> },
    Skipped { step: usize, rows: Vec<String> },
}

impl Running<'_, '_> {
    /// Every listener is told, also behind one that fails; the first failure is the answer.
    fn tell(&mut self, event: Event) -> Result<(), TrainError> {
        let mut result = Ok(());
        for listener in self.listeners.iter_mut() {
            result = result.and(listener.event(&event));
        }
        result
    }

    fn step(&mut self, metrics: StepMetrics) -> Result<(), TrainError> {
        self.tokens += metrics.tokens;
        self.tell(Event::Step(metrics))
    }

    fn interrupted(&self) -> bool {
        self.interrupt.load(Ordering::Relaxed)
    }

    fn summary(&self, steps: usize, stopped: Option<StopReason>) -> Summary {
        let [eval_before, eval_after] = self.eval;
        let seconds = self.start.elapsed().as_secs_f64();
        Summary { steps, seconds, tokens: self.tokens, eval_before, eval_after, stopped }
    }
}
