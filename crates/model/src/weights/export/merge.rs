//! From a model and an adapter to one dense model.

use std::collections::BTreeMap;
use std::path::Path;

use emberlora_lora::peft::{self, Factors, PeftError};
use emberlora_quant::bnb::{self, Element, Part};
use emberlora_quant::{FloatDtype, PackedWeight, convert};
use half::{bf16, f16};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::directory;
use super::error::ExportError;
use super::rewrite::{ExportProgress, ExportReport, Job, Rewrite};
use super::shard::ShardWriter;
use crate::config::{ModelConfig, read_object};
use crate::weights::LoadError;
use crate::weights::check::{self, Ends, Projections};
use crate::weights::file::{Entry, WeightFile};
use crate::weights::layout::{EMBEDDING, HEAD, HEAD_MODULE};
use crate::weights::packing::{Plan, QuantizationOptions};
use crate::weights::source::WeightSource;

/// Elements that are in memory at a time, in f32.
const CHUNK: usize = 1 << 20;

/// How an adapter is merged.
#[derive(Clone, Debug, Default, PartialEq, derive_new::new)]
pub struct MergeOptions {
    /// How the projections were packed when the adapter was trained: it has learnt to correct their rounding, so it is
    /// added to what their dequantised weights are. `None` takes the projections as they are in the files.
    pub quantization: Option<QuantizationOptions>,
    /// The format of the result; `None` keeps the format of every tensor, and for packed weights that of the embedding.
    pub dtype: Option<FloatDtype>,
}

/// Adds the adapter in the directory `adapter` to the model in `dir` and writes the result to `out`, as a directory of a
/// dense model without an adapter: `W + scale · B · A` for every adapted projection, computed in f32 and rounded once, in
/// the same shards. A head that is tied to the embedding and adapted is a tensor of its own then.
///
/// # Errors
/// Any [`ExportError`]; `out` is then as it was.
pub fn merge(
    dir: &Path,
    adapter: &Path,
    out: &Path,
    options: &MergeOptions,
    progress: &mut dyn ExportProgress,
) -> Result<ExportReport, ExportError> {
    directory::check(out)?;
    let MergeOptions { quantization, dtype } = options;
    let config = ModelConfig::from_dir(dir)?;
    let source = WeightSource::open(dir)?;
    let plan = Plan::new(dir, &config, &source, quantization.as_ref())?;
    let (ends, projections, ignored) = check::check(dir, &config, &source, &plan)?;

    let refused = |source: PeftError| ExportError::Adapter { dir: adapter.to_owned(), source };
    let loaded = peft::load(adapter).map_err(refused)?;
    let mut all = projections.clone();
    all.insert(HEAD_MODULE.to_owned(), [config.vocab_size, config.hidden_size]);
    let factors = peft::factors(&loaded, all, Some(HEAD_MODULE)).map_err(refused)?;
    let factors: BTreeMap<String, Factors<'_>> = factors.into_iter().map(|f| (f.module.clone(), f)).collect();
    let unties = ends.head.is_none() && factors.contains_key(HEAD_MODULE);

    let mut tensors = source.names();
    tensors.retain(|&name| !ignored.iter().any(|ignored| ignored == name));
    for module in projections.keys() {
        plan.claim(&format!("{module}.weight"), &mut tensors);
    }
    let embedding = source.entry(ends.embedding)?.map_or(FloatDtype::F32, |(_, entry)| entry.dtype);
    let json = config_json(read_object(&dir.join("config.json"))?, *dtype, unties);
    let job = Job { dir, source: &source, tensors, config: json, out };
    let projections_merged = factors.len();
    let mut merging = Merging { plan, projections, factors, ends, unties, dtype: *dtype, embedding, adapter };
    let mut report = job.run(&mut merging, progress)?;
    report.projections = projections_merged;
    Ok(report)
}

/// What `config.json` says of the result.
fn config_json(mut json: Map<String, Value>, dtype: Option<FloatDtype>, unties: bool) -> Map<String, Value> {
    json.shift_remove("quantization_config");
    if let Some(dtype) = dtype {
        // The name that transformers 5 writes and the one before it.
        let keys = ["dtype", "torch_dtype"].map(|key| (key, json.contains_key(key)));
        let has_none = keys.iter().all(|(_, is_there)| !is_there);
        for (key, is_there) in keys {
            if is_there || (has_none && key == "dtype") {
                json.insert(key.to_owned(), json!(bnb::torch_name(dtype)));
            }
        }
    }
    if unties {
        json.insert("tie_word_embeddings".to_owned(), json!(false));
    }
    json
}

struct Merging<'a> {
    plan: Plan<'a>,
    projections: Projections,
    factors: BTreeMap<String, Factors<'a>>,
    ends: Ends,
    /// Whether the head becomes a tensor of its own.
    unties: bool,
    dtype: Option<FloatDtype>,
    /// The format of the embedding.
    embedding: FloatDtype,
    adapter: &'a Path,
}

/// A tensor as it was before the adapter.
enum Before<'a> {
    Dense(&'a WeightFile, Entry),
    Packed(PackedWeight),
}

impl Merging<'_> {
    /// The tensors that `name` becomes, each with the module whose adapter is added to it.
    fn targets<'n>(&self, name: &'n str) -> Vec<(&'n str, Option<&'n str>)> {
        if self.unties && name == self.ends.embedding {
            return vec![(EMBEDDING, None), (HEAD, Some(HEAD_MODULE))];
        }
        vec![(name, name.strip_suffix(".weight"))]
    }

    fn before<'f>(&mut self, name: &str, file: &'f WeightFile) -> Result<Option<Before<'f>>, ExportError> {
        let module = name.strip_suffix(".weight").filter(|_| name != self.ends.embedding);
        if let Some((module, &shape)) = module.and_then(|module| Some((module, self.projections.get(module)?)))
            && let Some(packed) = self.plan.read(module, shape)?
        {
            return Ok(Some(Before::Packed(packed)));
        }
        Ok(file.entry(name)?.map(|entry| Before::Dense(file, entry)))
    }

    /// Shape and format of what `name` becomes.
    fn result(&self, name: &str, file: &WeightFile) -> Result<(Vec<usize>, FloatDtype), ExportError> {
        let module = name.strip_suffix(".weight");
        if let Some(shape) = module.and_then(|module| self.projections.get(module)).filter(|_| self.plan.holds(name)) {
            return Ok((shape.to_vec(), self.dtype.unwrap_or(self.embedding)));
        }
        let entry = file.entry(name)?;
        Ok(entry.map_or((Vec::new(), self.embedding), |entry| (entry.shape, self.dtype.unwrap_or(entry.dtype))))
    }
}

impl Rewrite for Merging<'_> {
    fn parts(&self, name: &str, file: &WeightFile) -> Result<Vec<Part>, ExportError> {
        let (shape, dtype) = self.result(name, file)?;
        let part = |(name, _)| Part::new(name, Element::Float(dtype), Some(shape.clone()));
        Ok(self.targets(name).into_iter().map(part).collect())
    }

    fn write(&mut self, name: &str, file: &WeightFile, shard: &mut ShardWriter) -> Result<(), ExportError> {
        let (shape, dtype) = self.result(name, file)?;
        let Some(before) = self.before(name, file)? else { return Ok(()) };
        for (target, module) in self.targets(name) {
            let factors = module.and_then(|module| self.factors.get(module));
            match (&before, factors) {
                (Before::Dense(file, entry), None) if entry.dtype == dtype => copy(target, file, entry, shard)?,
                _ => {
                    let change = Change { target, file, factors, dtype, adapter: self.adapter };
                    change.write(&before, &shape, shard)?;
                }
            }
        }
        Ok(())
    }
}

/// Writes a tensor as it is.
fn copy(name: &str, file: &WeightFile, entry: &Entry, shard: &mut ShardWriter) -> Result<(), ExportError> {
    let mut offset = 0;
    file.pieces(&entry.range, |piece| -> Result<(), ExportError> {
        shard.write(name, offset, piece)?;
        offset += piece.len();
        Ok(())
    })
}

/// What is done to a tensor.
struct Change<'a> {
    target: &'a str,
    file: &'a WeightFile,
    factors: Option<&'a Factors<'a>>,
    dtype: FloatDtype,
    adapter: &'a Path,
}

impl Change<'_> {
    /// Goes through the tensor in whole rows.
    fn write(&self, before: &Before<'_>, shape: &[usize], shard: &mut ShardWriter) -> Result<(), ExportError> {
        let (rows, columns) = match *shape {
            [rows, columns] => (rows, columns),
            _ => (shape.iter().product(), 1),
        };
        let step = (CHUNK / columns.max(1)).max(1);
        let mut values = Vec::new();
        for first in (0..rows).step_by(step) {
            values.resize(step.min(rows - first) * columns, 0.0);
            let start = first * columns;
            read(before, start, &mut values)?;
            if let Some(factors) = self.factors {
                if !factors.agree_with(start, &values) {
                    let tensor = factors.base_weight.as_ref().map_or_else(String::new, |(key, _)| key.clone());
                    let source = PeftError::BaseWeight { tensor };
                    return Err(ExportError::Adapter { dir: self.adapter.to_owned(), source });
                }
                add(factors, first, columns, &mut values);
            }
            self.check(&values, first, columns)?;
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let bytes =
                convert(&bytes, FloatDtype::F32, self.dtype).map_err(|error| self.malformed(error.to_string()))?;
            shard.write(self.target, start * self.dtype.size(), &bytes)?;
        }
        Ok(())
    }

    /// Refuses numbers that would be stored as infinities, and those that are none.
    fn check(&self, values: &[f32], first: usize, columns: usize) -> Result<(), ExportError> {
        let largest = match self.dtype {
            FloatDtype::F32 => f32::MAX,
            FloatDtype::Bf16 => bf16::MAX.to_f32(),
            FloatDtype::F16 => f16::MAX.to_f32(),
        };
        match values.iter().position(|value| value.is_nan() || value.abs() > largest) {
            None => Ok(()),
            Some(index) => Err(ExportError::Unstorable {
                tensor: self.target.to_owned(),
                row: first + index / columns,
                column: index % columns,
                value: values[index],
                dtype: self.dtype,
            }),
        }
    }

    fn malformed(&self, reason: String) -> LoadError {
        LoadError::Malformed { path: self.file.path.clone(), reason }
    }
}

/// Reads elements from `start` on as f32.
fn read(before: &Before<'_>, start: usize, values: &mut [f32]) -> Result<(), ExportError> {
    let (file, entry) = match before {
        Before::Packed(packed) => {
            packed.dequantise(start, values);
            return Ok(());
        }
        Before::Dense(file, entry) => (file, entry),
    };
    let size = entry.dtype.size();
    let range = entry.range.start + start * size..entry.range.start + (start + values.len()) * size;
    let mut done = 0;
    file.pieces(&range, |piece| -> Result<(), ExportError> {
        let wide = convert(piece, entry.dtype, FloatDtype::F32)
            .map_err(|error| LoadError::Malformed { path: file.path.clone(), reason: error.to_string() })?;
        let (wide, _) = wide.as_chunks();
        values[done..].iter_mut().zip(wide).for_each(|(value, &bytes)| *value = f32::from_le_bytes(bytes));
        done += wide.len();
        Ok(())
    })
}

/// Adds `scale · B · A` to whole rows from row `first` on.
fn add(factors: &Factors<'_>, first: usize, columns: usize, values: &mut [f32]) {
    let Factors { a, b, scale, .. } = factors;
    let rank = a.shape[0];
    values.par_chunks_mut(columns).enumerate().for_each_init(
        || vec![0f32; columns],
        |delta, (row, values)| {
            delta.fill(0.0);
            for (weight, a) in b.values[(first + row) * rank..][..rank].iter().zip(a.values.chunks_exact(columns)) {
                delta.iter_mut().zip(a).for_each(|(delta, a)| *delta += weight * a);
            }
            values.iter_mut().zip(&*delta).for_each(|(value, delta)| *value += scale * delta);
        },
    );
}
