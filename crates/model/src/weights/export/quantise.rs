//! From a dense model to one whose projections are packed, as transformers and bitsandbytes write it.

use std::path::Path;

use emberlora_quant::FloatDtype;
use emberlora_quant::bnb::{self, Element, Part};

use super::directory;
use super::error::ExportError;
use super::rewrite::{ExportProgress, ExportReport, Job, Rewrite};
use super::shard::ShardWriter;
use crate::config::{ModelConfig, read_object};
use crate::weights::check::{self, Projections};
use crate::weights::file::WeightFile;
use crate::weights::layout::HEAD_MODULE;
use crate::weights::packing::{Plan, QuantizationOptions};
use crate::weights::source::WeightSource;

/// Packs the projections of the model in `dir` and writes the result to `out` as a directory that transformers loads
/// with bitsandbytes: the same shards, `config.json` with a `quantization_config`, and the tokenizer and what else
/// belongs to the model. Embeddings, norms and biases stay as they are.
///
/// `compute_dtype` is what transformers will dequantise 4-bit weights to.
///
/// # Errors
/// Any [`ExportError`]; `out` is then as it was.
pub fn quantise(
    dir: &Path,
    out: &Path,
    options: &QuantizationOptions,
    compute_dtype: FloatDtype,
    progress: &mut dyn ExportProgress,
) -> Result<ExportReport, ExportError> {
    directory::check(out)?;
    if let Some(name) = options.skip.iter().find(|name| !is_plain(name)) {
        return Err(ExportError::SkipPattern { name: name.clone() });
    }
    let config = ModelConfig::from_dir(dir)?;
    if let Some(quantization) = &config.quantization {
        return Err(ExportError::AlreadyQuantised { dir: dir.to_owned(), kind: quantization.kind });
    }
    let source = WeightSource::open(dir)?;
    let plan = Plan::new(dir, &config, &source, Some(options))?;
    let (ends, projections, ignored) = check::check(dir, &config, &source, &plan)?;

    let mut json = read_object(&dir.join("config.json"))?;
    let written = bnb_config(options, compute_dtype, ends.head.is_none());
    json.insert("quantization_config".to_owned(), written.to_json());
    let mut tensors = source.names();
    tensors.retain(|&name| !ignored.iter().any(|ignored| ignored == name));
    let job = Job { dir, source: &source, tensors, config: json, out };
    let mut packing = Packing { plan, options, projections: &projections, packed: 0 };
    let mut report = job.run(&mut packing, progress)?;
    report.projections = packing.packed;
    Ok(report)
}

/// What transformers is told. It would convert a tied head that no name keeps from it.
fn bnb_config(options: &QuantizationOptions, compute_dtype: FloatDtype, is_tied: bool) -> bnb::Config {
    let QuantizationOptions { scheme, skip, threshold } = options;
    let double_quant = matches!(scheme, emberlora_quant::Scheme::FourBit { double_quant: true, .. });
    let mut skip = skip.clone();
    if is_tied && !bnb::is_skipped(HEAD_MODULE, &skip) {
        skip.push(HEAD_MODULE.to_owned());
    }
    // What it leaves out without being told.
    let skip = if skip == [HEAD_MODULE] { None } else { Some(skip) };
    bnb::Config { kind: scheme.kind(), double_quant, compute_dtype, skip, threshold: f64::from(*threshold) }
}

/// Whether a name means the same as a regular expression, but for dots.
fn is_plain(name: &str) -> bool {
    name.chars().all(|c| c.is_alphanumeric() || "._-".contains(c))
}

struct Packing<'a> {
    plan: Plan<'a>,
    options: &'a QuantizationOptions,
    projections: &'a Projections,
    packed: usize,
}

impl Packing<'_> {
    /// The module and the shape of a weight that is to be packed.
    fn packed<'n>(&self, name: &'n str) -> Option<(&'n str, [usize; 2])> {
        let module = name.strip_suffix(".weight")?;
        let shape = *self.projections.get(module)?;
        (!bnb::is_skipped(module, &self.options.skip)).then_some((module, shape))
    }
}

impl Rewrite for Packing<'_> {
    fn parts(&self, name: &str, file: &WeightFile) -> Result<Vec<Part>, ExportError> {
        if let Some((_, shape)) = self.packed(name) {
            return Ok(bnb::parts(name, shape, self.options.scheme));
        }
        let entry = file.entry(name)?;
        Ok(entry.map(|entry| Part::new(name, Element::Float(entry.dtype), Some(entry.shape))).into_iter().collect())
    }

    fn write(&mut self, name: &str, file: &WeightFile, shard: &mut ShardWriter) -> Result<(), ExportError> {
        if let Some((module, shape)) = self.packed(name)
            && let Some(packed) = self.plan.read(module, shape)?
        {
            self.packed += 1;
            return bnb::to_tensors(name, &packed).iter().try_for_each(|(name, tensor)| shard.put(name, tensor));
        }
        let Some(entry) = file.entry(name)? else { return Ok(()) };
        let mut offset = 0;
        file.pieces(&entry.range, |piece| -> Result<(), ExportError> {
            shard.write(name, offset, piece)?;
            offset += piece.len();
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use emberlora_quant::{BlockSize, QuantKind, Scheme};

    use super::*;

    #[test]
    fn transformers_is_told_to_leave_a_tied_head_alone() {
        let scheme = Scheme::new(QuantKind::Nf4, BlockSize::default(), true);
        let skip = |names: &[&str], is_tied| {
            let names = names.iter().map(|&name| name.to_owned()).collect();
            bnb_config(&QuantizationOptions::new(scheme, names, 6.0), FloatDtype::F32, is_tied).skip
        };
        let some = |names: &[&str]| Some(names.iter().map(|&name| name.to_owned()).collect());
        assert_eq!(skip(&["lm_head"], false), None);
        assert_eq!(skip(&["q_proj"], false), some(&["q_proj"]));
        assert_eq!(skip(&["q_proj"], true), some(&["q_proj", "lm_head"]));
        assert_eq!(skip(&["head"], true), some(&["head"]));
        assert_eq!(skip(&[], false), some(&[]));
        assert_eq!(skip(&[], true), None);
    }
}
