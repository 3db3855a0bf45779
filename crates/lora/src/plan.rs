//! What the options mean for one model, worked out before anything is changed.

use std::collections::BTreeSet;

use crate::rules::{Rules, Verdict, is_suffix};
use crate::{Exclude, LoraError, LoraOptions, Projections, Targets};

/// One module that gets an adapter.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PlannedModule {
    pub(crate) name: String,
    pub(crate) in_features: usize,
    pub(crate) out_features: usize,
    pub(crate) rank: usize,
    pub(crate) alpha: f64,
    pub(crate) scale: f32,
}

/// The modules that get an adapter, in the order of the model, and what should be said about the options.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) modules: Vec<PlannedModule>,
    pub(crate) warnings: Vec<String>,
}

/// Whether every single target must match something. PEFT is content when any of them does, and adapters that others
/// trained may list targets that only other models have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unmatched {
    Refuse,
    Accept,
}

impl Plan {
    /// Refuses ranks that only a slip can have meant, before matrices of that size are made. Adapters that exist
    /// already have the ranks they have.
    pub(crate) fn check_ranks(&self) -> Result<(), LoraError> {
        let bound = |module: &PlannedModule| module.in_features.max(module.out_features);
        match self.modules.iter().find(|module| module.rank > bound(module)) {
            Some(module) => {
                Err(LoraError::RankTooLarge { module: module.name.clone(), rank: module.rank, bound: bound(module) })
            }
            None => Ok(()),
        }
    }
}

/// All of a model that the rules look at.
#[derive(Clone, Debug)]
pub(crate) struct Survey {
    /// Name and shape `[out_features, in_features]` of every projection.
    pub(crate) projections: Vec<(String, [usize; 2])>,
    /// Which of them is the head.
    pub(crate) head: Option<String>,
}

impl Survey {
    pub(crate) fn of<P: Projections + ?Sized>(model: &P) -> Self {
        let mut projections = Vec::new();
        model.projections(&mut |name, linear| {
            projections.push((name.to_owned(), [linear.out_features(), linear.in_features()]));
        });
        Self { projections, head: model.output_head().map(str::to_owned) }
    }
}

/// Applies the rules to a model.
pub(crate) fn plan(model: &Survey, options: &LoraOptions, unmatched: Unmatched) -> Result<Plan, LoraError> {
    let rules = Rules::new(options)?;
    let Survey { projections: all, head } = model;
    check_targets(all, options, unmatched)?;
    check_layers(all, &rules)?;

    let (mut modules, mut excluded, mut elsewhere) = (Vec::new(), 0, 0);
    for (name, [out_features, in_features]) in all {
        match rules.verdict(name, head.as_ref() == Some(name))? {
            Verdict::Adapted => {
                let (rank, alpha) = rules.rank_and_alpha(name)?;
                modules.push(PlannedModule {
                    name: name.clone(),
                    in_features: *in_features,
                    out_features: *out_features,
                    rank,
                    alpha,
                    scale: options.scale(rank, alpha),
                });
            }
            Verdict::NotTargeted => {}
            Verdict::Excluded => excluded += 1,
            Verdict::OtherLayer => elsewhere += 1,
        }
    }
    if modules.is_empty() {
        return Err(match (excluded, elsewhere) {
            (0, 0) => LoraError::TargetsMatchNothing { targets: target_names(options), available: last_parts(all) },
            (_, 0) => LoraError::NothingLeft { targeted: excluded, by: "exclude" },
            _ => LoraError::NothingLeft { targeted: excluded + elsewhere, by: "layers" },
        });
    }

    let names: Vec<&str> = modules.iter().map(|module| module.name.as_str()).collect();
    let mut warnings: Vec<String> =
        rules.unused_patterns(&names)?.iter().map(|p| format!("{p} decides about no adapted module")).collect();
    if excluded == 0 && options.exclude != Exclude::default() {
        warnings.push("exclude leaves nothing out".to_owned());
    }
    Ok(Plan { modules, warnings })
}

/// The value of `target_modules` by which PEFT finds what `all-linear` finds here: the last parts of the names, or
/// the full name where the last part would also match the head. Sorted.
pub(crate) fn all_linear_suffixes<P: Projections + ?Sized>(model: &P) -> Vec<String> {
    let head = model.output_head();
    let mut suffixes = BTreeSet::new();
    model.projections(&mut |name, _| {
        if head != Some(name) {
            let last = last_part(name);
            let ambiguous = head.is_some_and(|head| is_suffix(head, last));
            suffixes.insert(if ambiguous { name } else { last }.to_owned());
        }
    });
    suffixes.into_iter().collect()
}

/// A target that matches nothing is most likely misspelt, so each of a list is checked by itself, before `exclude` and
/// `layers` take effect.
fn check_targets(all: &[(String, [usize; 2])], options: &LoraOptions, unmatched: Unmatched) -> Result<(), LoraError> {
    let Targets::Suffixes(suffixes) = &options.targets else { return Ok(()) };
    let idle: Vec<String> =
        suffixes.iter().filter(|suffix| !all.iter().any(|(name, _)| is_suffix(name, suffix))).cloned().collect();
    let refused = unmatched == Unmatched::Refuse && !idle.is_empty();
    if refused || idle.len() == suffixes.len() {
        return Err(LoraError::TargetsMatchNothing { targets: idle, available: last_parts(all) });
    }
    Ok(())
}

fn check_layers(all: &[(String, [usize; 2])], rules: &Rules<'_>) -> Result<(), LoraError> {
    let Some(layers) = rules.layers() else { return Ok(()) };
    let mut known = BTreeSet::new();
    for (name, _) in all {
        known.extend(rules.layer_of(name)?);
    }
    let Some(&layer) = layers.iter().find(|layer| !known.contains(layer)) else { return Ok(()) };
    let available = match (known.first(), known.last()) {
        (Some(first), Some(last)) => format!("the model has layers {first} to {last}"),
        _ => "no projection of the model has a layer's index in its name (as in `model.layers.0.…`)".to_owned(),
    };
    Err(LoraError::LayerOutOfRange { layer, available })
}

fn target_names(options: &LoraOptions) -> Vec<String> {
    match &options.targets {
        Targets::AllLinear => vec!["all-linear".to_owned()],
        Targets::Suffixes(suffixes) => suffixes.clone(),
        Targets::Regex(pattern) => vec![pattern.clone()],
    }
}

fn last_parts(all: &[(String, [usize; 2])]) -> Vec<String> {
    all.iter().map(|(name, _)| last_part(name).to_owned()).collect::<BTreeSet<_>>().into_iter().collect()
}

fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}
