//! From the recipe's adapter section to adapters on a model.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use emberlora_config::{AdapterKind, AdapterSection, Exclude, Targets, TaskType};
use emberlora_lora::peft::{self, PeftAdapter};
use emberlora_lora::{AttachReport, AttachedModule, LoraOptions, attach, detach};
use emberlora_model::CausalLm;

use crate::PrepareError;

/// Which adapter a model gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterChoice<'a> {
    /// The recipe's, to be trained: fresh, or with the values of its `init_from`.
    Recipe,
    /// One that was trained before, with its own options.
    Saved(&'a Path),
    /// The recipe's `init_from` where it has one, else none: what training starts from.
    Start,
}

/// The adapters of a model.
#[derive(Clone, Debug)]
pub struct AttachedAdapter {
    /// How they were made.
    pub options: LoraOptions,
    /// Where they sit.
    pub report: AttachReport,
    /// The directory that their values came from.
    pub loaded_from: Option<PathBuf>,
}

/// Puts adapters on a model as `choice` says; `None` leaves the base alone.
pub(crate) fn put_on(
    model: &mut CausalLm,
    section: &AdapterSection,
    choice: AdapterChoice<'_>,
    seed: u64,
    device: &Device,
) -> Result<Option<AttachedAdapter>, PrepareError> {
    match (choice, &section.init_from) {
        (AdapterChoice::Saved(dir), _) => load(model, dir, device).map(Some),
        (AdapterChoice::Start, Some(dir)) if section.kind == AdapterKind::Lora => load(model, dir, device).map(Some),
        (AdapterChoice::Start, _) => Ok(None),
        (AdapterChoice::Recipe, init_from) => {
            let options = lora_options(section, seed)?;
            let report = attach(model, &options, device)?;
            let Some(dir) = init_from else {
                return Ok(Some(AttachedAdapter { options, report, loaded_from: None }));
            };
            continue_from(model, options, report, dir, device).map(Some)
        }
    }
}

/// The recipe's adapter options.
///
/// # Errors
/// [`PrepareError::NoAdapter`] when the recipe asks for none.
pub fn lora_options(section: &AdapterSection, seed: u64) -> Result<LoraOptions, PrepareError> {
    // Without `..`, so that a new key of the recipe cannot be forgotten here.
    let AdapterSection {
        kind,
        r,
        alpha,
        dropout,
        targets,
        exclude,
        layers,
        rank_pattern,
        alpha_pattern,
        rslora,
        init_from: _, // where the values come from, see `put_on`
        task_type: TaskType::CausalLm,
    } = section;
    match kind {
        AdapterKind::None => return Err(PrepareError::NoAdapter),
        AdapterKind::Lora => {}
    }
    Ok(LoraOptions {
        r: *r,
        alpha: *alpha,
        dropout: *dropout,
        targets: match targets {
            Targets::AllLinear => emberlora_lora::Targets::AllLinear,
            Targets::Suffixes(names) => emberlora_lora::Targets::Suffixes(names.clone()),
            Targets::Regex(pattern) => emberlora_lora::Targets::Regex(pattern.clone()),
        },
        exclude: match exclude {
            Exclude::Suffixes(names) => emberlora_lora::Exclude::Suffixes(names.clone()),
            Exclude::Regex(pattern) => emberlora_lora::Exclude::Regex(pattern.clone()),
        },
        layers: layers.clone(),
        layers_pattern: Vec::new(),
        rank_pattern: rank_pattern.iter().map(|(name, rank)| (name.clone(), *rank)).collect(),
        alpha_pattern: alpha_pattern.iter().map(|(name, alpha)| (name.clone(), *alpha)).collect(),
        rslora: *rslora,
        seed,
    })
}

fn load(model: &mut CausalLm, dir: &Path, device: &Device) -> Result<AttachedAdapter, PrepareError> {
    let saved = read(dir)?;
    let report = apply(model, &saved, dir, device)?;
    Ok(AttachedAdapter { options: saved.options, report, loaded_from: Some(dir.to_owned()) })
}

/// Replaces fresh adapters by saved ones, which must sit on the same modules with the same rank and scale: the recipe
/// would otherwise say something else than what is trained. Dropout is the recipe's, as it is no property of A and B.
fn continue_from(
    model: &mut CausalLm,
    recipe: LoraOptions,
    fresh: AttachReport,
    dir: &Path,
    device: &Device,
) -> Result<AttachedAdapter, PrepareError> {
    detach(model);
    let mut saved = read(dir)?;
    saved.options.dropout = recipe.dropout;
    saved.options.seed = recipe.seed;
    let report = apply(model, &saved, dir, device)?;
    if let Some(difference) = difference(&fresh.modules, &report.modules) {
        return Err(PrepareError::InitFromDiffers { dir: dir.to_owned(), difference });
    }
    Ok(AttachedAdapter { options: saved.options, report, loaded_from: Some(dir.to_owned()) })
}

fn read(dir: &Path) -> Result<PeftAdapter, PrepareError> {
    peft::load(dir).map_err(|source| PrepareError::Adapter { dir: dir.to_owned(), source })
}

fn apply(
    model: &mut CausalLm,
    adapter: &PeftAdapter,
    dir: &Path,
    device: &Device,
) -> Result<AttachReport, PrepareError> {
    peft::apply(model, adapter, device).map_err(|source| PrepareError::Adapter { dir: dir.to_owned(), source })
}

/// The first difference between what the recipe asks for and what a saved adapter has.
fn difference(recipe: &[AttachedModule], saved: &[AttachedModule]) -> Option<String> {
    let find = |modules: &'_ [AttachedModule], name: &str| modules.iter().find(|module| module.name == name).cloned();
    for module in recipe {
        let name = &module.name;
        match find(saved, name) {
            None => return Some(format!("the recipe adapts `{name}`, the saved adapter does not")),
            Some(other) if other.rank != module.rank => {
                return Some(format!("`{name}` has rank {} in the recipe and {} there", module.rank, other.rank));
            }
            Some(other) if other.scale != module.scale => {
                return Some(format!("`{name}` is scaled by {} in the recipe and {} there", module.scale, other.scale));
            }
            Some(_) => {}
        }
    }
    let extra = saved.iter().find(|module| find(recipe, &module.name).is_none())?;
    Some(format!("the saved adapter adapts `{}`, the recipe does not", extra.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, rank: usize, scale: f32) -> AttachedModule {
        AttachedModule { name: name.into(), in_features: 4, out_features: 4, rank, alpha: 1.0, scale }
    }

    #[test]
    fn every_kind_of_difference_is_named() {
        let recipe = [module("a.q", 4, 2.0), module("a.v", 4, 2.0)];
        let check = |saved: &[AttachedModule], expected: Option<&str>| {
            let found = difference(&recipe, saved);
            match expected {
                None => assert_eq!(found, None),
                Some(part) => assert!(found.as_ref().is_some_and(|text| text.contains(part)), "{found:?}"),
            }
        };
        check(&[module("a.v", 4, 2.0), module("a.q", 4, 2.0)], None);
        check(&[module("a.q", 4, 2.0)], Some("the recipe adapts `a.v`"));
        check(&[module("a.q", 4, 2.0), module("a.v", 8, 2.0)], Some("rank 4 in the recipe and 8 there"));
        check(&[module("a.q", 4, 1.0), module("a.v", 4, 2.0)], Some("scaled by 2 in the recipe and 1 there"));
        check(&[module("a.q", 4, 2.0), module("a.v", 4, 2.0), module("a.k", 4, 2.0)], Some("adapts `a.k`, the recipe"));
    }
}
