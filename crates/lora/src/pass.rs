/// What one forward pass is for: training or evaluation, with the adapters or without.
///
/// It is passed down through the model instead of being stored in it, so the same model can be trained, evaluated and
/// compared with its base without being changed or loaded twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// Where the dropout masks come from; `None` means evaluation, without dropout.
    pub dropout: Option<DropoutKey>,
    /// Whether the adapters take part. Without them the model is its base.
    pub adapters: bool,
}

/// The coordinates of the dropout masks of one forward pass. Each layer adds its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, derive_new::new)]
pub struct DropoutKey {
    /// Seed of the run.
    pub seed: u64,
    /// Which micro-batch of which optimizer step this is, as one number that no other micro-batch of the run has.
    pub step: u64,
}

impl Pass {
    /// Evaluation: adapters on, no dropout.
    pub fn eval() -> Self {
        Self { dropout: None, adapters: true }
    }

    /// Evaluation of the base model: adapters off.
    pub fn base() -> Self {
        Self { dropout: None, adapters: false }
    }

    /// Training: adapters on, dropout masks drawn from the seed of the run and the number of the micro-batch.
    pub fn train(seed: u64, step: u64) -> Self {
        Self { dropout: Some(DropoutKey::new(seed, step)), adapters: true }
    }
}

impl Default for Pass {
    fn default() -> Self {
        Self::eval()
    }
}
