//! Progress on standard error: a bar where a person is looking, a line per logged step elsewhere.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use emberlora_model::export::ExportProgress;
use emberlora_model::hub::DownloadProgress;
use emberlora_train::{Evaluation, Event, Listener, RunStarted, StepMetrics, StopReason, TrainError};
use indicatif::{BinaryBytes, FormattedDuration, HumanCount, ProgressBar, ProgressStyle};

use crate::terminal::Terminal;

const TRAINING: &str = "{bar:24} {pos}/{len} {msg}, eta {eta_precise}";
const READING: &str = "{msg} {bar:24} {bytes}/{total_bytes} eta {eta_precise}";

/// Shows a training run.
pub(crate) struct TrainProgress {
    terminal: Terminal,
    bar: Option<ProgressBar>,
    /// What stays on the screen when the bar goes.
    last: String,
    total: usize,
    /// Time that steps took, evaluations left out.
    stepping: f64,
    /// The step that the adapter was last written after.
    saved: Option<usize>,
}

impl TrainProgress {
    pub(crate) fn new(terminal: &Terminal) -> Self {
        Self { terminal: terminal.clone(), bar: None, last: String::new(), total: 0, stepping: 0.0, saved: None }
    }

    fn started(&mut self, run: &RunStarted) {
        let RunStarted { total_steps, steps_per_epoch, batches_per_epoch: _, trainable_parameters } = run;
        self.terminal.say(format!(
            "training {} parameters for {total_steps} steps, {steps_per_epoch} per epoch",
            HumanCount(*trainable_parameters as u64)
        ));
        self.total = *total_steps;
    }

    fn step(&mut self, step: &StepMetrics) {
        let line = summary(step);
        self.stepping += step.step_seconds;
        if self.terminal.is_interactive() {
            // Not before the first step: an evaluation may come first, and its time says nothing of a step's.
            let new = || self.terminal.add(ProgressBar::new(self.total as u64).with_style(style(TRAINING)));
            let bar = self.bar.get_or_insert_with(new);
            bar.set_message(line.clone());
            bar.set_position(step.step as u64);
            self.last = format!("step {}/{} {line}", step.step, self.total);
        } else if step.log {
            let per_step = self.stepping / step.step as f64;
            let left = per_step * self.total.saturating_sub(step.step) as f64;
            let eta = FormattedDuration(Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX));
            self.terminal.say(format!("step {}/{} {line}, eta {eta}", step.step, self.total));
        }
    }

    /// Results follow on standard output, which a bar must not share a line with.
    fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
            self.terminal.say(&self.last);
        }
    }
}

impl Listener for TrainProgress {
    fn event(&mut self, event: &Event) -> Result<(), TrainError> {
        match event {
            Event::RunStarted(run) => self.started(run),
            Event::Step(step) => self.step(step),
            Event::Skipped { step, rows } => {
                self.terminal.say(format!("step {step} has no trained token and was skipped ({})", rows.join(", ")));
            }
            Event::Eval { step, epoch: _, evaluation } => {
                self.terminal.say(format!("step {step} evaluation: {}", shown(evaluation)));
            }
            Event::Saved { step, dir } => {
                self.saved = Some(*step);
                tracing::info!("wrote the adapter after step {step} to {}", dir.display());
            }
            Event::Stopped { step, reason } => {
                self.end();
                let why = match reason {
                    StopReason::Interrupted => "interrupted",
                    StopReason::NotFinite => "the loss or its gradient is not finite",
                    StopReason::Failed => "an error",
                };
                let holds = match self.saved {
                    Some(0) => "; the adapter is written as it was before the first step".to_owned(),
                    Some(saved) => format!("; the adapter is written as it was after step {saved}"),
                    None => String::new(),
                };
                self.terminal.say(format!("stopped after step {step} of {}: {why}{holds}", self.total));
            }
            Event::Finished(_) => self.end(),
        }
        Ok(())
    }
}

/// An evaluation in one line.
pub(crate) fn shown(evaluation: &Evaluation) -> String {
    let Evaluation { loss, perplexity, tokens, seconds } = evaluation;
    format!("loss {loss:.4}, perplexity {perplexity:.3}, {tokens} tokens in {seconds:.1} s")
}

fn summary(step: &StepMetrics) -> String {
    let StepMetrics { loss, lr, tokens_per_second, peak_memory_bytes, .. } = step;
    let memory = peak_memory_bytes.map_or(String::new(), |bytes| format!(", {}", BinaryBytes(bytes)));
    format!("loss {loss:.4}, lr {lr:.2e}, {tokens_per_second:.0} tokens/s{memory}")
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants of this file and a test below reads them.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Shows how far files have been read or fetched.
pub(crate) struct FileProgress {
    terminal: Terminal,
    what: String,
    bar: OnceLock<ProgressBar>,
}

impl FileProgress {
    pub(crate) fn new(terminal: &Terminal, what: String) -> Self {
        Self { terminal: terminal.clone(), what, bar: OnceLock::new() }
    }

    /// The bar, drawn from the moment on when its length is known.
    fn begin(&self, bytes: u64) {
        let bar = self.bar.get_or_init(|| match self.terminal.is_interactive() {
            true => {
                let bar = ProgressBar::new(bytes).with_style(style(READING)).with_message(self.what.clone());
                self.terminal.add(bar)
            }
            false => ProgressBar::hidden(),
        });
        bar.enable_steady_tick(Duration::from_millis(200));
    }

    fn more(&self, bytes: u64) {
        self.bar.get().into_iter().for_each(|bar| bar.inc(bytes));
    }

    fn end(&self) {
        self.bar.get().into_iter().for_each(ProgressBar::finish_and_clear);
    }
}

impl Drop for FileProgress {
    /// An error leaves no half-drawn bar behind.
    fn drop(&mut self) {
        self.end();
    }
}

impl emberlora_data::Progress for FileProgress {
    fn start(&self, total: u64) {
        self.begin(total);
    }

    fn advance(&self, bytes: u64) {
        self.more(bytes);
    }

    fn finish(&self) {
        self.end();
    }
}

impl DownloadProgress for FileProgress {
    fn started(&mut self, file: &str, bytes: u64) {
        self.what = format!("fetching {file}");
        self.bar.take();
        if !self.terminal.is_interactive() {
            self.terminal.say(format!("{} ({})", self.what, BinaryBytes(bytes)));
        }
        self.begin(bytes);
    }

    fn advanced(&mut self, bytes: u64) {
        self.more(bytes);
    }

    fn finished(&mut self) {
        self.end();
    }
}

/// Shows how far a model has been written, until it is interrupted.
pub(crate) struct ExportBar {
    bar: FileProgress,
    interrupt: Arc<AtomicBool>,
}

impl ExportBar {
    pub(crate) fn new(terminal: &Terminal, what: &str, interrupt: Arc<AtomicBool>) -> Self {
        Self { bar: FileProgress::new(terminal, what.to_owned()), interrupt }
    }
}

impl ExportProgress for ExportBar {
    fn started(&mut self, bytes: u64) {
        self.bar.begin(bytes);
    }

    fn advanced(&mut self, bytes: u64) {
        self.bar.more(bytes);
    }

    fn finished(&mut self) {
        self.bar.end();
    }

    fn is_cancelled(&self) -> bool {
        self.interrupt.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_well_formed() {
        for template in [TRAINING, READING] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }

    #[test]
    fn a_step_fits_a_line() {
        let step = StepMetrics {
            step: 3,
            epoch: 0.5,
            loss: 1.25,
            lr: 2e-4,
            grad_norm: 1.0,
            tokens: 512,
            trained_tokens: 100,
            tokens_per_second: 1024.4,
            step_seconds: 0.5,
            started_seconds: Some(1.5),
            peak_memory_bytes: Some(3 << 30),
            log: true,
        };
        assert_eq!(summary(&step), "loss 1.2500, lr 2.00e-4, 1024 tokens/s, 3.00 GiB");
    }
}
