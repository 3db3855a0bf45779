//! Adapters on disk, in the format of PEFT 0.21: `adapter_config.json` beside `adapter_model.safetensors`.
//!
//! The tensors are named `base_model.model.<module>.lora_A.weight` (`[r, in]`) and `….lora_B.weight` (`[out, r]`).
//! What [`save`] writes loads with `PeftModel.from_pretrained`; what PEFT writes for LoRA on linear layers loads here.
//! Settings that change the numbers and are not supported are errors, keys that are not known are warnings.

mod config;
mod directory;
mod error;
mod tensors;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use emberlora_quant::{FloatDtype, convert};

pub use error::PeftError;
pub use tensors::HostTensor;

use crate::attach::{AttachReport, install};
use crate::plan::{Unmatched, all_linear_suffixes, plan};
use crate::{Adapter, LoraOptions, Projections};
use tensors::{key_a, key_b, key_base_weight};

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
    let plan = plan(model, options, Unmatched::Accept)?;
    let mut unused: BTreeMap<&str, &HostTensor> = tensors.iter().map(|(name, t)| (name.as_str(), t)).collect();
    let (mut missing, mut base_weights, mut factors) = (Vec::new(), BTreeMap::new(), Vec::new());
    for module in &plan.modules {
        let name = module.name.as_str();
        let mut take = |key: String, expected: [usize; 2]| match unused.remove(key.as_str()) {
            Some(found) if found.shape == expected => Ok(Some(TensorData::new(found.values.clone(), expected))),
            Some(found) => {
                Err(PeftError::Shape { tensor: key, expected: expected.to_vec(), found: found.shape.clone() })
            }
            None => {
                missing.push(key);
                Ok(None)
            }
        };
        let a = take(key_a(name), [module.rank, module.in_features])?;
        let b = take(key_b(name), [module.out_features, module.rank])?;
        factors.extend(a.zip(b));
        let key = key_base_weight(name);
        if let Some(weight) = unused.remove(key.as_str()) {
            base_weights.insert(name.to_owned(), (key, weight));
        }
    }
    if !missing.is_empty() || !unused.is_empty() {
        let unused = unused.into_keys().map(str::to_owned).collect();
        return Err(PeftError::Mismatch { missing, unused });
    }
    check_base_weights(model, &base_weights)?;

    let adapters =
        plan.modules.iter().zip(factors).map(|(module, (a, b))| {
            Adapter::from_data(&module.name, a, b, module.scale, options.dropout as f32, device)
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
    let plan = plan(model, options, Unmatched::Accept)?;
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
fn check_base_weights<P: Projections + ?Sized>(
    model: &P,
    expected: &BTreeMap<String, (String, &HostTensor)>,
) -> Result<(), PeftError> {
    let mut problem = None;
    model.projections(&mut |name, linear| {
        let Some((key, stored)) = expected.get(name) else { return };
        match read_back(linear.weight.dequantise(), key) {
            Ok(ours) if same_weight(&ours, stored) => {}
            Ok(_) => drop(problem.get_or_insert(PeftError::BaseWeight { tensor: key.clone() })),
            Err(error) => drop(problem.get_or_insert(error)),
        }
    });
    problem.map_or(Ok(()), Err)
}

/// Whether two weights are equal, up to one of them having been rounded to a narrower format.
fn same_weight(a: &HostTensor, b: &HostTensor) -> bool {
    let bytes = |t: &HostTensor| t.values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>();
    let (x, y) = (bytes(a), bytes(b));
    a.shape == b.shape
        && [FloatDtype::F32, FloatDtype::Bf16, FloatDtype::F16].into_iter().any(|dtype| {
            matches!((convert(&x, FloatDtype::F32, dtype), convert(&y, FloatDtype::F32, dtype)), (Ok(x), Ok(y)) if x == y)
        })
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
