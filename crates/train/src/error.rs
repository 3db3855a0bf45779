//! Why a run cannot go on.

use std::fmt;
use std::io;
use std::path::PathBuf;

use emberlora_lora::peft::PeftError;
use emberlora_model::InputError;

/// Why training or evaluation failed.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A loss or a gradient is infinite or not a number.
    #[error(
        "step {step}: the {quantity} is {value} (rows {rows}); the adapter is the one whose loss and gradient were last \
         finite. Lower `train.learning_rate`, lengthen the warm-up, set `train.max_grad_norm`, or look at these rows \
         with `emberlora inspect`"
    )]
    NotFinite {
        /// The step, counted from 1.
        step: usize,
        /// What is not finite.
        quantity: Quantity,
        /// Its value.
        value: f64,
        /// Where the documents of the batch came from.
        rows: Rows,
    },
    /// The loss on held-out data is infinite or not a number.
    #[error("evaluation: the loss is {value} (rows {rows}); look at these rows with `emberlora inspect`")]
    EvaluationNotFinite {
        /// Its value.
        value: f64,
        /// Where the documents of the batch came from.
        rows: Rows,
    },
    /// An epoch has no batch.
    #[error("epoch {epoch} has no rows to train on; check `data.train`")]
    NoBatches {
        /// The epoch, counted from 0.
        epoch: u64,
    },
    /// No held-out row has a trained token.
    #[error("no token of the held-out data would be evaluated; check `data.eval` and `data.loss_on`")]
    NothingToEvaluate,
    /// The model has no adapter and so nothing to train.
    #[error("the model has no trainable parameter: attach an adapter first (`adapter.kind: lora`)")]
    NothingToTrain,
    /// A batch that the model cannot read.
    #[error("rows {rows}: {source}")]
    Input {
        /// Where the documents of the batch came from.
        rows: Rows,
        /// Why.
        source: InputError,
    },
    /// The device could not compute or hand back a value.
    #[error("{}", device_failed(device.as_deref(), message))]
    Device {
        /// Which one, as recipes name it, where that is known.
        device: Option<String>,
        /// What it says.
        message: String,
    },
    /// The adapter could not be written.
    #[error("the adapter cannot be written to {}", dir.display())]
    Save {
        /// Where to.
        dir: PathBuf,
        /// Why.
        #[source]
        source: PeftError,
    },
    /// The directory holds an earlier run.
    #[error(
        "{} already holds a run (metrics.jsonl); choose another `output`, or delete that directory to run it again",
        dir.display()
    )]
    OutputInUse {
        /// The directory.
        dir: PathBuf,
    },
    /// The directory cannot be created or written to.
    #[error("output {}: {} {}; choose another `output`", dir.display(), at.display(), match source.kind() {
        io::ErrorKind::NotADirectory => "is not a directory",
        _ => "cannot be written to",
    })]
    OutputUnusable {
        /// The directory.
        dir: PathBuf,
        /// What of its path exists.
        at: PathBuf,
        /// What the operating system says.
        #[source]
        source: io::Error,
    },
    /// A file of the run could not be written.
    #[error("{}: cannot be {action}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried: `created`, `written`.
        action: &'static str,
        /// What the operating system says.
        #[source]
        source: io::Error,
    },
}

impl TrainError {
    /// The same with the device that failed, where it is not named yet.
    pub(crate) fn on(self, name: &str) -> Self {
        match self {
            Self::Device { device: None, message } => Self::Device { device: Some(name.to_owned()), message },
            named => named,
        }
    }

    /// Whether a recipe or its data is to blame, so that trying again changes nothing.
    pub fn is_wrong_input(&self) -> bool {
        match self {
            Self::NoBatches { .. }
            | Self::NothingToEvaluate
            | Self::NothingToTrain
            | Self::Input { .. }
            | Self::OutputInUse { .. }
            | Self::OutputUnusable { .. } => true,
            Self::NotFinite { .. }
            | Self::EvaluationNotFinite { .. }
            | Self::Device { .. }
            | Self::Save { .. }
            | Self::Io { .. } => false,
        }
    }
}

fn device_failed(device: Option<&str>, message: &str) -> String {
    match device {
        None => format!("the device failed: {message}"),
        Some(remote) if remote.starts_with("remote://") => format!(
            "the server {remote} does not answer any more ({message}); what it says itself tells why. The adapter is the \
             one that was written last"
        ),
        Some(device) => format!("the device {device} failed: {message}"),
    }
}

/// What was not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// The loss of a micro-batch.
    Loss,
    /// The global norm of the gradient.
    GradientNorm,
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Quantity::Loss => "loss",
            Quantity::GradientNorm => "gradient norm",
        })
    }
}

/// Where documents came from, each as `file:line`. Only the first few are printed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows(pub Vec<String>);

impl fmt::Display for Rows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 12;
        if self.0.is_empty() {
            return f.write_str("unknown");
        }
        f.write_str(&self.0[..self.0.len().min(SHOWN)].join(", "))?;
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_rows_are_cut_short_and_counted() {
        let rows = Rows((1..=14).map(|line| format!("a.jsonl:{line}")).collect());
        let shown = rows.to_string();
        assert!(shown.starts_with("a.jsonl:1, ") && shown.ends_with("a.jsonl:12 and 2 more"), "{shown}");
    }
}
