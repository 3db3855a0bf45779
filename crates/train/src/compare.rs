//! How much merging an adapter changes what a model says.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::module::Module;
use emberlora_config::{AdapterKind, AdapterSection, Dtype, ModelSection, RunConfig};
use emberlora_data::{DataOptions, inspect};
use emberlora_lora::Pass;
use emberlora_model::{CausalLm, Input, LoadError, ModelConfig};
use emberlora_quant::Scheme;

use crate::quantization::quantization_section;
use crate::state::read;
use crate::{AdapterChoice, Base, LoadedModel, PrepareError, Rows, TrainError, device};

/// How many prompts are compared, and the most tokens that each has.
const PROMPTS: usize = 4;
const LONGEST: usize = 64;

/// What is read where the recipe's rows are not at hand.
const TEXT: &str = "The river rises in the hills to the north, where snow lies until May, and reaches the sea after \
two hundred miles. Three towns stand on its banks. The oldest of them was a market for wool and salt; its bridge, \
built of stone in 1432, still carries the road to the coast.";

/// How far the logits of two models lie apart.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distance {
    /// The largest difference.
    pub max: f64,
    /// The mean of all absolute differences.
    pub mean: f64,
}

/// What merging changes, on the same tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Prompts that were read.
    pub prompts: usize,
    /// Their tokens.
    pub tokens: usize,
    /// Whether they are rows of the recipe; else a text of this crate, as no file of the recipe's rows is there.
    pub from_recipe: bool,
    /// From base and adapter to the merged model.
    pub merged: Distance,
    /// The same to the merged model packed like its base, where that was packed.
    pub requantised: Option<(Scheme, Distance)>,
}

/// A comparison that is ready to be made: what a recipe could get wrong about it has been looked at, before a model is
/// merged for nothing.
#[derive(Debug)]
pub struct Comparing<'a> {
    config: &'a RunConfig,
    base: &'a Base,
    prompts: Vec<Vec<u32>>,
    from_recipe: bool,
}

impl<'a> Comparing<'a> {
    /// Chooses the device and reads a few prompts.
    ///
    /// # Errors
    /// A device that is not there, and rows that cannot be read.
    pub fn prepare(config: &'a RunConfig, base: &'a Base) -> Result<Self, PrepareError> {
        let device = device::choose(config.device.first())?;
        device.weight_dtype(config.model.dtype)?;
        device.compute_dtype(config.model.compute_dtype)?;
        let (prompts, from_recipe) = prompts(config, base)?;
        let vocab_size = ModelConfig::from_dir(&base.dir).map_err(LoadError::from)?.vocab_size;
        if let Some(&token) = prompts.iter().flatten().find(|&&id| id as usize >= vocab_size) {
            let row = if from_recipe { "the first rows" } else { "a fixed text" }.to_owned();
            return Err(PrepareError::Vocabulary { row, token, vocab_size });
        }
        Ok(Self { config, base, prompts, from_recipe })
    }

    /// Reads the prompts with the base and its adapter, with the merged model in `out`, and, for a base that is packed,
    /// with that model packed again. One of them is in memory at a time. `None` once `interrupt` is raised.
    ///
    /// # Errors
    /// A model that cannot be loaded, and a device that fails.
    pub fn run(&self, adapter: &Path, out: &Path, interrupt: &AtomicBool) -> Result<Option<Comparison>, PrepareError> {
        let Self { config, base, prompts, from_recipe } = self;
        let adapted = LoadedModel::load(config, base, AdapterChoice::Saved(adapter))?;
        let packed = adapted.report.quantization.clone();
        let Some(expected) = logits(&adapted.model, prompts, interrupt)? else { return Ok(None) };
        drop(adapted);

        let merged = Base { dir: out.to_owned(), commit: None, tokenizer: base.tokenizer.clone() };
        let mut dense = RunConfig {
            model: ModelSection { dtype: Dtype::Auto, ..config.model.clone() },
            adapter: AdapterSection { kind: AdapterKind::None, init_from: None, ..config.adapter.clone() },
            quantization: None,
            ..(*config).clone()
        };
        let distance_of = |config: &RunConfig| -> Result<Option<Distance>, PrepareError> {
            let loaded = LoadedModel::load(config, &merged, AdapterChoice::Start)?;
            Ok(logits(&loaded.model, prompts, interrupt)?.map(|found| distance(&expected, &found)))
        };
        let Some(merged) = distance_of(&dense)? else { return Ok(None) };
        dense.quantization = packed.as_ref().and_then(quantization_section);
        let requantised = match packed.filter(|_| dense.quantization.is_some()) {
            None => None,
            Some(options) => match distance_of(&dense)? {
                None => return Ok(None),
                Some(distance) => Some((options.scheme, distance)),
            },
        };
        let tokens = prompts.iter().map(Vec::len).sum();
        let (prompts, from_recipe) = (prompts.len(), *from_recipe);
        Ok(Some(Comparison { prompts, tokens, from_recipe, merged, requantised }))
    }
}

/// The first rows that the recipe evaluates on, or else trains on, as far as their file is there.
fn prompts(config: &RunConfig, base: &Base) -> Result<(Vec<Vec<u32>>, bool), PrepareError> {
    for (sources, options) in [
        (&config.data.eval, DataOptions::eval as fn(&RunConfig) -> DataOptions),
        (&config.data.train, DataOptions::train),
    ] {
        if sources.first().is_some_and(|source| source.path.exists()) {
            let rows = inspect(options(config), &base.tokenizer)?.take(PROMPTS);
            let ids = rows.map(|row| Ok(row?.ids.into_iter().take(LONGEST).collect()));
            let prompts: Vec<Vec<u32>> = ids.collect::<Result<_, PrepareError>>()?;
            return Ok((prompts.into_iter().filter(|ids| !ids.is_empty()).collect(), true));
        }
    }
    let ids = base.tokenizer.encode(TEXT, true)?.ids;
    Ok((vec![ids.into_iter().take(LONGEST).collect()], false))
}

/// The scores of every token of the vocabulary at every position of every prompt.
fn logits(
    model: &CausalLm,
    prompts: &[Vec<u32>],
    interrupt: &AtomicBool,
) -> Result<Option<Vec<Vec<f32>>>, PrepareError> {
    // Off the autodiff device nothing is recorded.
    let (model, pass) = (model.valid(), Pass::eval());
    let mut all = Vec::with_capacity(prompts.len());
    for ids in prompts {
        if interrupt.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let input = Input::unpacked(1, ids.len(), ids, &model.device());
        let input = input.map_err(|source| TrainError::Input { rows: Rows::default(), source })?;
        let logits = model.logits(model.hidden(&input, &pass), &pass);
        all.push(read(logits.flatten(0, 2))?.into_iter().map(|logit| logit as f32).collect());
    }
    Ok(Some(all))
}

fn distance(a: &[Vec<f32>], b: &[Vec<f32>]) -> Distance {
    let differences = || a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| f64::from((a - b).abs()));
    let count = differences().count().max(1) as f64;
    // `f64::max` would forget a NaN.
    let larger = |a: f64, b: f64| if a.is_nan() || b <= a { a } else { b };
    Distance { max: differences().fold(0.0, larger), mean: differences().sum::<f64>() / count }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distance_is_the_largest_and_the_mean_of_all_differences() {
        let a = [vec![1.0, 2.0], vec![3.0]];
        let b = [vec![1.0, 4.0], vec![2.0]];
        assert_eq!(distance(&a, &b), Distance { max: 2.0, mean: 1.0 });
        assert_eq!(distance(&a, &a), Distance::default());
        assert!(distance(&a, &[vec![f32::NAN, 2.0], vec![3.0]]).max.is_nan());
    }
}
