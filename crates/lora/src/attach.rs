//! Putting adapters on a model and taking them off.

use std::collections::HashMap;

use burn::tensor::Device;

use crate::plan::{Plan, PlannedModule, Survey, Unmatched, plan};
use crate::{Adapter, LoraError, LoraOptions, Projections};

/// What was attached to a model.
#[derive(Clone, Debug, PartialEq)]
pub struct AttachReport {
    /// The adapted modules in the order of the model.
    pub modules: Vec<AttachedModule>,
    /// Number of trainable parameters: the sum of r · (in + out) over the modules.
    pub trainable_parameters: usize,
    /// Options that had no effect. They have been logged as well.
    pub warnings: Vec<String>,
}

/// One adapted module.
#[derive(Clone, Debug, PartialEq)]
pub struct AttachedModule {
    /// Its name in the model.
    pub name: String,
    /// The size of its input.
    pub in_features: usize,
    /// The size of its output.
    pub out_features: usize,
    /// r, after `rank_pattern`.
    pub rank: usize,
    /// α, after `alpha_pattern`.
    pub alpha: f64,
    /// s, the factor on B A that follows from both.
    pub scale: f32,
}

impl AttachedModule {
    /// r · (in + out).
    pub fn parameters(&self) -> usize {
        self.rank * (self.in_features + self.out_features)
    }
}

/// Gives every module that the options choose a fresh adapter, with which the model computes what it did before.
///
/// # Errors
/// When the options are not valid, choose nothing, name targets and layers that the model does not have, or give a
/// module a rank above both its sizes, and when the model has adapters already (see [`detach`]). The model is then
/// unchanged.
pub fn attach<P: Projections + ?Sized>(
    model: &mut P,
    options: &LoraOptions,
    device: &Device,
) -> Result<AttachReport, LoraError> {
    let plan = plan(&Survey::of(model), options, Unmatched::Refuse)?;
    plan.check_ranks()?;
    let fresh = |module: &PlannedModule| {
        let shape = [module.out_features, module.in_features];
        Adapter::init(&module.name, shape, module.rank, module.scale, options, device)
    };
    let adapters = plan.modules.iter().map(fresh).collect();
    install(model, plan, adapters)
}

/// Takes all adapters off a model and returns how many there were.
pub fn detach<P: Projections + ?Sized>(model: &mut P) -> usize {
    let mut taken = 0;
    model.visit_projections(&mut |_, linear| taken += usize::from(linear.adapter.take().is_some()));
    taken
}

/// Number of parameters in the adapters of a model.
pub fn trainable_parameters<P: Projections + ?Sized>(model: &P) -> usize {
    let mut sum = 0;
    model.projections(&mut |_, linear| sum += linear.adapter.as_ref().map_or(0, Adapter::parameters));
    sum
}

/// Puts the adapters on the modules of a plan, which they match one by one.
pub(crate) fn install<P: Projections + ?Sized>(
    model: &mut P,
    plan: Plan,
    adapters: Vec<Adapter>,
) -> Result<AttachReport, LoraError> {
    let mut occupied = None;
    model.projections(&mut |name, linear| {
        if linear.adapter.is_some() && occupied.is_none() {
            occupied = Some(name.to_owned());
        }
    });
    if let Some(module) = occupied {
        return Err(LoraError::AlreadyAttached { module });
    }

    for warning in &plan.warnings {
        tracing::warn!("{warning}");
    }
    let mut adapters: HashMap<&str, Adapter> =
        plan.modules.iter().map(|module| module.name.as_str()).zip(adapters).collect();
    model.visit_projections(&mut |name, linear| linear.adapter = adapters.remove(name));
    drop(adapters);

    let modules: Vec<AttachedModule> = plan.modules.into_iter().map(AttachedModule::from).collect();
    Ok(AttachReport {
        trainable_parameters: modules.iter().map(AttachedModule::parameters).sum(),
        modules,
        warnings: plan.warnings,
    })
}

impl From<PlannedModule> for AttachedModule {
    fn from(module: PlannedModule) -> Self {
        let PlannedModule { name, in_features, out_features, rank, alpha, scale } = module;
        Self { name, in_features, out_features, rank, alpha, scale }
    }
}
