//! AdamW over the adapters of a model, in place, and the way back from its last update.

use std::collections::{HashMap, VecDeque};

use burn::module::{Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use emberlora_kernels::{AdamWStep, adamw, undo_adamw};
use emberlora_lora::Projections;

/// The constants of AdamW (Loshchilov & Hutter 2017) as PyTorch defines them: the decay `lr · weight_decay · p` is
/// decoupled from the moments, and `eps` is added to the bias-corrected root.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first and second moment.
    pub betas: [f64; 2],
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// AdamW and its moments. Parameters and moments are updated where they lie: a run holds one copy of its adapters and
/// two of the same size for the moments.
pub(crate) struct Optimizer {
    constants: AdamW,
    moments: HashMap<ParamId, Moments>,
    /// How to get back to before each of the last updates, and the steps that had been taken then: of those whose
    /// outcome nobody has seen yet, and of one more.
    before: VecDeque<(usize, Before)>,
}

/// What is kept of one parameter, f32, outside of autodiff.
struct Moments {
    /// Mean and uncentred variance of the gradient, decayed.
    values: [Tensor<2>; 2],
    /// How many updates the parameter has had.
    updates: i32,
}

/// How to get back to the parameters before the last update.
enum Before {
    /// By computing: the steps of the parameters that it changed.
    Computed(HashMap<ParamId, AdamWStep>),
    /// From copies, after an update that went so far that computing would not bring the parameters back.
    Copied(HashMap<ParamId, Tensor<2>>),
}

impl Optimizer {
    pub fn new(constants: AdamW) -> Self {
        Self { constants, moments: HashMap::new(), before: VecDeque::new() }
    }

    /// Updates every adapter of `model` that has a gradient, which is multiplied by `gradient_factor` first; see
    /// [`adamw`]. `steps` have been taken before.
    pub fn update(
        &mut self,
        model: &mut impl Projections,
        mut grads: GradientsParams,
        learning_rate: f64,
        gradient_factor: &Tensor<1>,
        steps: usize,
    ) {
        let mut before = match self.constants.can_be_undone(learning_rate) {
            true => Before::Computed(HashMap::new()),
            false => Before::Copied(HashMap::new()),
        };
        for_each_factor(model, |id, param| {
            // Neither decay nor moments without a gradient, as in PyTorch.
            let Some(grad) = grads.remove::<2>(id) else { return param };
            let Moments { values, updates } = self.moments.remove(&id).unwrap_or_else(|| {
                let zeros = || Tensor::zeros(param.dims(), &param.device());
                Moments { values: [zeros(), zeros()], updates: 0 }
            });
            let AdamW { betas, eps, weight_decay } = self.constants;
            let update = updates.saturating_add(1);
            let step = AdamWStep { learning_rate, betas, eps, weight_decay, update };
            match &mut before {
                Before::Computed(steps) => drop(steps.insert(id, step)),
                Before::Copied(params) => drop(params.insert(id, param.clone())),
            }
            let (param, values) = adamw(param, grad, values, gradient_factor.clone(), step);
            self.moments.insert(id, Moments { values, updates: update });
            param
        });
        self.before.push_back((steps, before));
    }

    /// The outcomes of all updates are known: there will be no way back from any but the last.
    pub fn settle(&mut self) {
        self.before.drain(..self.before.len().saturating_sub(1));
    }

    /// The last `count` updates had a negative factor, so there is nothing to take back.
    pub fn forget(&mut self, count: usize) {
        self.before.truncate(self.before.len().saturating_sub(count));
    }

    /// Brings the adapters back to before the last update and answers how many steps had been taken then; `None` where
    /// there is no way back. The moments stay, so this is where training ends.
    pub fn undo(&mut self, model: &mut impl Projections) -> Option<usize> {
        let (steps, before) = self.before.pop_back()?;
        self.before.clear();
        match before {
            Before::Computed(mut steps) => {
                for_each_factor(model, |id, param| match steps.remove(&id).zip(self.moments.get(&id)) {
                    Some((step, moments)) => undo_adamw(param, moments.values.clone(), step),
                    None => param,
                })
            }
            Before::Copied(mut params) => for_each_factor(model, |id, param| params.remove(&id).unwrap_or(param)),
        }
        Some(steps)
    }
}

impl AdamW {
    /// Whether an update with this learning rate can be undone by computing, to about 10⁻⁷ of the larger of a parameter
    /// and 1.
    ///
    /// What an update loses of a parameter is the rounding of their difference, so it must not go too far. By the
    /// inequality of Cauchy and Schwarz over the gradients of all updates, |m| / √v ≤ (1 − β₁) / √((1 − β₂)(1 − β₁²/β₂)),
    /// which is 7.3 for the usual betas; that bound, the learning rate and the correction of the first updates (at
    /// which |m̂| / √v̂ is about 1) say how far it can go.
    fn can_be_undone(&self, learning_rate: f64) -> bool {
        let [first, second] = self.betas;
        let farthest = (1.0 - first) / ((1.0 - second) * (1.0 - first * first / second)).sqrt();
        // Comparisons with what is not a number are false, as they should be.
        learning_rate * farthest.max(1.0) <= 1.0 && learning_rate * self.weight_decay <= 0.5 && farthest > 0.0
    }
}

/// Puts in the place of every A and B what `f` makes of it. `f` is given the tensor outside of autodiff and without
/// another handle on it (unless the caller has one), so that it can be changed where it lies.
pub(crate) fn for_each_factor(model: &mut impl Projections, mut f: impl FnMut(ParamId, Tensor<2>) -> Tensor<2>) {
    // Stands in for a parameter while its value is away.
    let mut hollow = None;
    model.visit_projections(&mut |_, linear| {
        let Some(adapter) = &mut linear.adapter else { return };
        for factor in [&mut adapter.a, &mut adapter.b] {
            let hollow = hollow.get_or_insert_with(|| Tensor::zeros([1, 1], &factor.lazy_device()));
            let away = Param::initialized(factor.id, hollow.clone());
            let (id, tensor, mapper) = std::mem::replace(factor, away).consume();
            let (strategy, requires_grad) = (tensor.gradient_checkpointing_strategy(), tensor.is_require_grad());
            let mut tensor = f(id, tensor.inner());
            if let Some(strategy) = strategy {
                tensor = tensor.autodiff().with_gradient_checkpointing_strategy(strategy);
                tensor = tensor.set_require_grad(requires_grad);
            }
            *factor = Param::from_mapped_value(id, tensor, mapper);
        }
    });
}
