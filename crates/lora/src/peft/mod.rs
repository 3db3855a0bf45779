//! Adapters on disk, in the format of PEFT 0.21: `adapter_config.json` beside `adapter_model.safetensors`.
//!
//! The tensors are named `base_model.model.<module>.lora_A.weight` (`[r, in]`) and `….lora_B.weight` (`[out, r]`).
//! What [`save`] writes loads with `PeftModel.from_pretrained`; what PEFT writes for LoRA on linear layers loads here.
//! Settings that change the numbers and are not supported are errors, keys that are not known are warnings.

mod config;
mod directory;
mod error;
mod factors;
mod tensors;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};

pub use error::PeftError;
pub use factors::{Factors, factors};
pub use tensors::HostTensor;

use crate::attach::{AttachReport, install};
use crate::plan::{Survey, Unmatched, all_linear_suffixes, plan};
use crate::{Adapter, LoraOptions, Projections};
use tensors::{key_a, key_b};

/// The file with the options.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The file with the factors.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";
/// What older versions of PEFT wrote instead of [`TENSORS_FILE`].
const PICKLE_FILE: &str = "adapter_model.bin";

/// An adapter as it was read from a directory.
#[derive(Clone, Debug, PartialEq)]
pub struct PeftAdapter {
    /// The options it was made with. The format knows no seed: it is 0.
    pub options: LoraOptions,
    /// The tensors by their names in the file.
    pub tensors: BTreeMap<String, HostTensor>,
    /// The model that it adapts, as its maker named it.
    pub base_model_name: Option<String>,
    /// The revision of that model.
    pub revision: Option<String>,
    /// Keys of the configuration that are not known. They have been logged as well.
    pub warnings: Vec<String>,
}

/// Reads an adapter directory.
///
/// # Errors
/// When a file is missing, truncated or malformed, when the adapter is not a plain LoRA of linear layers, and when a
/// value of the configuration has the wrong type.
pub fn load(dir: &Path) -> Result<PeftAdapter, PeftError> {
    let path = dir.join(CONFIG_FILE);
    let bytes = read(&path)?.ok_or_else(|| match directory::cut_short(dir) {
        Some(aside) => PeftError::CutShort { dir: dir.to_owned(), aside },
        None => PeftError::MissingFile { dir: dir.to_owned(), file: CONFIG_FILE },
    })?;
    let config = config::parse(&bytes, &path)?;

    let path = dir.join(TENSORS_FILE);
    let Some(bytes) = read(&path)? else {
        let pickle = dir.join(PICKLE_FILE);
        return Err(if pickle.exists() {
            PeftError::Pickle { path: pickle }
        } else {
            PeftError::MissingFile { dir: dir.to_owned(), file: TENSORS_FILE }
        });
    };
    let tensors = tensors::parse(&bytes, &path)?;
    let config::AdapterConfig { options, base_model_name, revision, warnings } = config;
    Ok(PeftAdapter { options, tensors, base_model_name, revision, warnings })
}

/// Puts a loaded adapter on a model.
///
/// The modules are those that the adapter's options choose, as in PEFT, and each must find its tensors; a tensor that
/// no module takes is an error too. To go on training with another dropout or seed, change
/// [`PeftAdapter::options`] first.
///
/// # Errors
/// When tensors are missing, unused or of the wrong shape, when the options do not fit the model, and when the model
/// has adapters already (see [`detach`](crate::detach)). The model is then unchanged.
pub fn apply<P: Projections + ?Sized>(
    model: &mut P,
    adapter: &PeftAdapter,
    device: &Device,
) -> Result<AttachReport, PeftError> {
    let PeftAdapter { options, tensors, base_model_name: _, revision: _, warnings: _ } = adapter;
    let plan = plan(&Survey::of(model), options, Unmatched::Accept)?;
    let factors = factors::of_plan(&plan, tensors)?;
    check_base_weights(model, &factors)?;

    let data = |tensor: &HostTensor| TensorData::new(tensor.values.clone(), tensor.shape.clone());
    let adapters = factors.iter().map(|factors| {
        let Factors { module, a, b, scale, base_weight: _ } = factors;
        Adapter::from_data(module, data(a), data(b), *scale, options.dropout as f32, device)
    });
    let adapters = adapters.collect();
    Ok(install(model, plan, adapters)?)
}

/// Writes the adapters of a model into a directory, which appears or is replaced as a whole.
///
/// `options` must be those that the adapters were made with, since the ranks and scales in the file follow from them.
/// `base_model_name` is the model's directory or hub id, by which PEFT finds it; empty means unknown. Files of an
/// earlier adapter in `dir` are replaced, other files in it stay.
///
/// # Errors
/// When the model has no adapters or not those that the options describe, when something else is in the place, and
/// when the directory cannot be written. What was in the place is then unchanged.
pub fn save<P: Projections + ?Sized>(
    model: &P,
    options: &LoraOptions,
    base_model_name: &str,
    revision: Option<&str>,
    dir: &Path,
) -> Result<(), PeftError> {
    let tensors = collect(model, options)?;
    let config = config::render(options, all_linear_suffixes(model), base_model_name, revision);
    let tensors = tensors::render(&tensors, &dir.join(TENSORS_FILE))?;
    directory::replace(dir, &[(CONFIG_FILE, config.as_bytes()), (TENSORS_FILE, &tensors)])
}

/// The factors of all adapters by their names in the file, after checking that the options describe them.
fn collect<P: Projections + ?Sized>(
    model: &P,
    options: &LoraOptions,
) -> Result<BTreeMap<String, HostTensor>, PeftError> {
    let plan = plan(&Survey::of(model), options, Unmatched::Accept)?;
    let mut planned: BTreeMap<&str, (usize, f32)> =
        plan.modules.iter().map(|module| (module.name.as_str(), (module.rank, module.scale))).collect();
    let mut tensors = BTreeMap::new();
    let mut problem = None;
    model.projections(&mut |name, linear| {
        let Some(adapter) = &linear.adapter else { return };
        let found = (adapter.rank(), adapter.scale);
        match planned.remove(name) {
            Some(expected) if expected == found => {}
            expected => {
                let describe = |(rank, scale)| format!("rank {rank} and scale {scale}");
                let expected = expected.map_or_else(|| "no adapter".to_owned(), describe);
                let difference = format!("it has {}, the options say {expected}", describe(found));
                problem.get_or_insert(PeftError::OptionsDiffer { module: name.to_owned(), difference });
                return;
            }
        }
        for (key, factor) in [(key_a(name), &adapter.a), (key_b(name), &adapter.b)] {
            match read_back(factor.val(), &key) {
                Ok(tensor) => drop(tensors.insert(key, tensor)),
                Err(error) => drop(problem.get_or_insert(error)),
            }
        }
    });
    if let Some(problem) = problem {
        return Err(problem);
    }
    if tensors.is_empty() {
        return Err(PeftError::NoAdapter);
    }
    if let Some((module, (rank, scale))) = planned.pop_first() {
        let difference = format!("it has no adapter, the options say rank {rank} and scale {scale}");
        return Err(PeftError::OptionsDiffer { module: module.to_owned(), difference });
    }
    Ok(tensors)
}

/// PEFT stores the base weight of an adapted head beside its adapter and would load it. Here it must be the model's.
fn check_base_weights<P: Projections + ?Sized>(model: &P, factors: &[Factors<'_>]) -> Result<(), PeftError> {
    let mut problem = None;
    model.projections(&mut |name, linear| {
        let adapted = factors.iter().find(|factors| factors.module == name);
        let Some((key, stored)) = adapted.and_then(|factors| factors.base_weight.as_ref()) else { return };
        match read_back(linear.weight.dequantise(), key) {
            Ok(ours) if ours.shape == stored.shape && factors::are_same(&ours.values, &stored.values) => {}
            Ok(_) => drop(problem.get_or_insert(PeftError::BaseWeight { tensor: key.clone() })),
            Err(error) => drop(problem.get_or_insert(error)),
        }
    });
    problem.map_or(Ok(()), Err)
}

/// The values of a tensor in f32 on the host.
fn read_back(tensor: Tensor<2>, name: &str) -> Result<HostTensor, PeftError> {
    let failed = |reason: String| PeftError::Device { tensor: name.to_owned(), reason };
    let shape = tensor.dims().to_vec();
    let data = tensor.inner().try_into_data_dtype(DType::F32).map_err(|error| failed(error.to_string()))?;
    let values = data.try_to_vec().map_err(|error| failed(error.to_string()))?;
    Ok(HostTensor { shape, values })
}

/// The bytes of a file, or `None` when there is none.
fn read(path: &Path) -> Result<Option<Vec<u8>>, PeftError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(directory::failed("read", path)(error)),
    }
}
