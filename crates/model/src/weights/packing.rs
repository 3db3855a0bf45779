//! Which projections are packed: while they are read, or in the files already.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use emberlora_quant::bnb::{self, BnbError, is_skipped};
use emberlora_quant::{BlockSize, PackedWeight, Packer, QuantKind, Scheme};

use super::check::Projections;
use super::error::{DecidedBy, LoadError, Mismatch, Misshaped};
use super::layout::HEAD_MODULE;
use super::source::WeightSource;
use crate::config::ModelConfig;

/// How the projections of a model are packed.
#[derive(Clone, Debug, PartialEq, derive_new::new)]
pub struct QuantizationOptions {
    /// The format.
    pub scheme: Scheme,
    /// Projections that stay dense, by names as [`is_skipped`] takes them. A head that is the embedding stays dense
    /// whatever they say.
    pub skip: Vec<String>,
    /// With INT8, the magnitude from which on activations are multiplied in full precision while the others are
    /// multiplied in 8 bits (LLM.int8()); 0 multiplies all of them with the dequantised weight.
    pub threshold: f32,
}

/// What is asked for, and what the files say of themselves.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    source: &'a WeightSource,
    options: Option<&'a QuantizationOptions>,
    stored: Option<&'a bnb::Config>,
    /// The parts of each weight that the files hold packed.
    parts: BTreeMap<String, Vec<&'a str>>,
    /// The format of all packed weights, once it is known.
    scheme: Option<Scheme>,
}

impl<'a> Plan<'a> {
    /// Refuses options of another format than `quantization_config` names, and packed weights without one.
    pub(super) fn new(
        dir: &Path,
        config: &'a ModelConfig,
        source: &'a WeightSource,
        options: Option<&'a QuantizationOptions>,
    ) -> Result<Self, LoadError> {
        let stored = config.quantization.as_ref();
        let mut parts = BTreeMap::<_, Vec<_>>::new();
        for name in source.names() {
            let refused = |error| LoadError::Packed { path: source.path_of(name), source: error };
            if let Some(weight) = bnb::weight_of(name).map_err(refused)? {
                parts.entry(weight).or_default().push(name);
            }
        }
        if stored.is_none() && !parts.is_empty() {
            let (path, what) = (dir.join("config.json"), "quantization_config".to_owned());
            let (found, expected) = ("missing".to_owned(), "what the weights were quantised with".to_owned());
            return Err(LoadError::Quantization { path, what, found, expected, because: DecidedBy::Weights });
        }
        let plan = Self { source, options, stored, parts, scheme: options.map(|options| options.scheme) };
        plan.check_config(dir)?;
        Ok(plan)
    }

    /// The block size is not in config.json: every weight tells its own.
    fn check_config(&self, dir: &Path) -> Result<(), LoadError> {
        let (Some(config), Some(options)) = (self.stored, self.options) else { return Ok(()) };
        let differ = |key: &str, found: String, expected: String| {
            let (path, what) = (dir.join("config.json"), format!("quantization_config.{key}"));
            Err(LoadError::Quantization { path, what, found, expected, because: DecidedBy::Options })
        };
        let (found, expected) = (config.kind, options.scheme.kind());
        match options.scheme {
            _ if found != expected => {
                let both_four_bit = found.codebook().and(expected.codebook()).is_some();
                let key = if both_four_bit { "bnb_4bit_quant_type" } else { "load_in_8bit" };
                let named = |kind: QuantKind| match both_four_bit {
                    true => kind.to_string(),
                    false => format!("{} ({kind})", kind == QuantKind::Int8),
                };
                differ(key, named(found), named(expected))
            }
            Scheme::FourBit { double_quant, .. } if double_quant != config.double_quant => {
                differ("bnb_4bit_use_double_quant", config.double_quant.to_string(), double_quant.to_string())
            }
            _ => Ok(()),
        }
    }

    /// Whether the files hold this weight packed.
    pub(super) fn holds(&self, weight: &str) -> bool {
        self.parts.contains_key(weight)
    }

    /// Takes the parts of a weight out of `unused`, if the files hold it packed, and says whether they do.
    pub(super) fn claim(&self, weight: &str, unused: &mut BTreeSet<&str>) -> bool {
        let Some(parts) = self.parts.get(weight) else { return false };
        unused.retain(|name| !parts.contains(name));
        true
    }

    /// Whether the files hold packed what should be packed, and densely what should be dense.
    ///
    /// Options that change nothing are warned of.
    pub(super) fn check(&self, projections: &Projections) -> Result<(), LoadError> {
        if let Some(config) = self.stored {
            for module in projections.keys() {
                self.check_stored(config, module)?;
            }
        }
        let Some(QuantizationOptions { skip, .. }) = self.options else { return Ok(()) };
        let modules = || projections.keys().map(String::as_str).chain([HEAD_MODULE]);
        for name in skip.iter().map(std::slice::from_ref) {
            if !modules().any(|module| is_skipped(module, name)) {
                tracing::warn!("`quantization.skip` names `{}`, which matches no projection", name[0]);
            }
        }
        if projections.keys().all(|module| is_skipped(module, skip)) {
            tracing::warn!("`quantization.skip` leaves out every projection: nothing is packed");
        }
        Ok(())
    }

    fn check_stored(&self, config: &bnb::Config, module: &str) -> Result<(), LoadError> {
        let what = weight_name(module);
        let found = self.parts.contains_key(&what);
        let asked = self.options.map(|options| (!is_skipped(module, &options.skip), DecidedBy::Options));
        let expected = [Some((!config.skips(module), DecidedBy::Config)), asked].into_iter().flatten();
        let named = |packed: bool| if packed { format!("packed in {}", config.kind) } else { "dense".to_owned() };
        match { expected }.find(|(expected, _)| *expected != found) {
            Some((expected, because)) => {
                let (path, found, expected) = (self.source.path_of(&what), named(found), named(expected));
                Err(LoadError::Quantization { path, what, found, expected, because })
            }
            None => Ok(()),
        }
    }

    /// Reads the weight of a projection that is packed, or that is to be; `None` leaves it dense.
    pub(super) fn read(&mut self, module: &str, shape: [usize; 2]) -> Result<Option<PackedWeight>, LoadError> {
        let weight = weight_name(module);
        match (self.stored, self.options) {
            (Some(config), _) if self.parts.contains_key(&weight) => self.unpack(config, &weight, shape).map(Some),
            (None, Some(options)) if !is_skipped(module, &options.skip) => self.pack(&weight, shape, options.scheme),
            _ => Ok(None),
        }
    }

    /// Packs a dense weight piece by piece.
    fn pack(&self, weight: &str, shape: [usize; 2], scheme: Scheme) -> Result<Option<PackedWeight>, LoadError> {
        let Some((file, entry)) = self.source.entry(weight)? else { return Ok(None) };
        let refused = |source| LoadError::Pack { path: file.path.clone(), source };
        let mut packer = Packer::new(weight, shape, entry.dtype, scheme).map_err(refused)?;
        file.pieces(&entry.range, |piece| packer.push(piece).map_err(refused))?;
        packer.finish().map(Some).map_err(refused)
    }

    /// Reads a packed weight, which must have the format of config.json, of the options and of all others.
    fn unpack(&mut self, config: &bnb::Config, weight: &str, shape: [usize; 2]) -> Result<PackedWeight, LoadError> {
        let path = self.source.path_of(weight);
        let failure = OnceCell::new();
        let found = bnb::from_tensors(weight, |name| match self.source.file_of(name)?.stored(name) {
            Ok(tensor) => tensor,
            Err(error) => {
                // The first one is told; what it leads to is not.
                let _ = failure.set(error);
                None
            }
        });
        if let Some(error) = failure.into_inner() {
            return Err(error);
        }
        let missing = || BnbError::Missing { tensor: first_part(weight, config.kind), weight: weight.to_owned() };
        let packed = found
            .and_then(|found| found.ok_or_else(missing))
            .map_err(|source| LoadError::Packed { path: path.clone(), source })?;
        if packed.shape() != shape {
            let (name, expected, found) = (weight.to_owned(), shape.to_vec(), packed.shape().to_vec());
            let mismatch = Mismatch { misshaped: vec![Misshaped { name, expected, found }], ..Mismatch::default() };
            return Err(LoadError::Mismatch { dir: path.parent().unwrap_or(&path).to_owned(), mismatch });
        }
        let found = packed.scheme();
        let (expected, because) = match self.scheme {
            Some(scheme) => (scheme, if self.options.is_some() { DecidedBy::Options } else { DecidedBy::Others }),
            None => (Scheme::new(config.kind, block_size(found), config.double_quant), DecidedBy::Config),
        };
        if found != expected {
            let (what, found, expected) = (weight.to_owned(), found.to_string(), expected.to_string());
            return Err(LoadError::Quantization { path, what, found, expected, because });
        }
        self.scheme = Some(found);
        Ok(packed)
    }

    /// The threshold of products with INT8 weights.
    pub(super) fn threshold(&self) -> f32 {
        let stored = || self.stored.map_or(0.0, |config| config.threshold as f32);
        self.options.map_or_else(stored, |options| options.threshold)
    }

    /// How the model is packed, whoever said so.
    pub(super) fn into_options(self) -> Option<QuantizationOptions> {
        let threshold = self.threshold();
        self.options.cloned().or_else(|| {
            let (config, scheme) = (self.stored?, self.scheme?);
            let skip = config.skip.clone().unwrap_or_else(|| vec![HEAD_MODULE.to_owned()]);
            // config.json also has one where nothing reads it.
            let threshold = if scheme == Scheme::Int8 { threshold } else { 0.0 };
            Some(QuantizationOptions::new(scheme, skip, threshold))
        })
    }
}

fn weight_name(module: &str) -> String {
    format!("{module}.weight")
}

/// The part without which nothing says how a weight is packed.
fn first_part(weight: &str, kind: QuantKind) -> String {
    match kind.codebook() {
        Some(codebook) => format!("{weight}.quant_state.bitsandbytes__{codebook}"),
        None => format!("{}.SCB", weight.trim_end_matches(".weight")),
    }
}

/// Its block size where a format has one.
fn block_size(scheme: Scheme) -> BlockSize {
    match scheme {
        Scheme::FourBit { block_size, .. } => block_size,
        Scheme::Int8 => BlockSize::default(),
    }
}
