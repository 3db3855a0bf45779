//! Reading the weights of a model directory into a [`CausalLm`].
//!
//! Files are mapped. A weight that is kept in the format of its file is not copied on a CPU backend that can read the
//! mapping: it costs page cache, which the system can take back, and no memory of the process. A weight that has to be
//! converted or packed is read on its own, piece by piece, so that no second copy of the model exists at any time.

mod check;
mod error;
pub mod export;
mod file;
mod layout;
mod packing;
mod source;

use std::path::{Path, PathBuf};

use burn::module::{Param, ParamId};
use burn::tensor::{Device, Tensor, TensorData};
use emberlora_kernels::{AttentionKind, PackedTensor};
use emberlora_lora::LoraLinear;
use emberlora_quant::FloatDtype;

pub use error::{DecidedBy, LoadError, Mismatch, Misshaped};
pub use packing::QuantizationOptions;
pub(crate) use source::{INDEX, SINGLE, shards};

use crate::attention::{Attention, AttentionShape, QkvProjection, SplitQkv};
use crate::block::Block;
use crate::causal_lm::{CausalLm, Settings, burn_dtype};
use crate::checkpointing::Checkpointing;
use crate::config::{ModelConfig, NormPlacement, QkNorm};
use crate::mlp::{GateUpProjection, Mlp, SplitGateUp};
use crate::rope::Rope;
use check::Projections;
use packing::Plan;
use source::WeightSource;

/// How a model is loaded.
#[derive(Clone, Debug, derive_new::new)]
pub struct LoadOptions {
    /// How the embedding and the projections that are not packed are stored; `None` keeps the format of the files.
    pub dtype: Option<FloatDtype>,
    /// The dtype of activations, norms and biases.
    pub compute_dtype: FloatDtype,
    /// How attention is computed.
    pub attention: AttentionKind,
    /// How projections are packed. `None` takes them as they are in the files: dense, or packed by bitsandbytes, with
    /// which options must agree.
    #[new(default)]
    pub quantization: Option<QuantizationOptions>,
}

/// What loading did.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct LoadReport {
    /// Base parameters; those of a tied head count once.
    pub parameters: usize,
    /// Tensors that were read.
    pub tensors: usize,
    /// Bytes of weights that are used where they lie in the files.
    pub mapped_bytes: usize,
    /// Bytes of weights that were converted or copied.
    pub converted_bytes: usize,
    /// Bytes of codes and scales of the projections that are packed.
    pub packed_bytes: usize,
    /// Parameters that these bytes hold.
    pub packed_parameters: usize,
    /// How they are packed, also where the directory alone says so.
    pub quantization: Option<QuantizationOptions>,
    /// The files, in the order in which they were opened.
    pub files: Vec<PathBuf>,
    /// Tensors of the files that a model of this kind does not need.
    pub ignored: Vec<String>,
}

impl CausalLm {
    /// Loads a model directory in the layout of Hugging Face: `config.json` with `model.safetensors`, or with shards
    /// and `model.safetensors.index.json`.
    ///
    /// The weights are on `device` without autodiff, whether or not it has it: they are constants, and constants mix
    /// with tracked tensors.
    ///
    /// # Errors
    /// Any [`LoadError`]. Names and shapes are compared in both directions before anything is read, and everything
    /// that does not fit is reported at once. What packed weights say of themselves is checked when they are read.
    pub fn load(dir: &Path, options: &LoadOptions, device: &Device) -> Result<(Self, LoadReport), LoadError> {
        let config = ModelConfig::from_dir(dir)?;
        let device = device.clone().without_autodiff();
        for dtype in std::iter::once(options.compute_dtype).chain(options.dtype) {
            if !device.supports_dtype(burn_dtype(dtype)) {
                return Err(LoadError::UnsupportedDtype { dtype, device: format!("{device:?}") });
            }
        }
        let source = WeightSource::open(dir)?;
        let plan = Plan::new(dir, &config, &source, options.quantization.as_ref())?;
        let (ends, projections, ignored) = check::check(dir, &config, &source, &plan)?;

        let report = LoadReport { ignored, ..LoadReport::default() };
        let mut loader = Loader { source: &source, options, device: &device, plan, projections: &projections, report };
        let embedding = loader.frozen::<2>(ends.embedding)?;
        let lm_head = match ends.head {
            Some(_) => loader.linear(layout::HEAD_MODULE, false)?,
            None => LoraLinear::new(embedding.clone(), None),
        };
        let layers =
            (0..config.num_hidden_layers).map(|layer| loader.block(&config, layer)).collect::<Result<_, _>>()?;
        let norm = loader.small(layout::FINAL_NORM)?;
        let Loader { plan, mut report, .. } = loader;
        report.quantization = plan.into_options();

        let model = Self {
            embed_tokens: constant(embedding),
            layers,
            norm: constant(norm),
            lm_head,
            tied: ends.head.is_none(),
            settings: Settings {
                rope: Rope::new(config.rope.clone()),
                config,
                compute_dtype: options.compute_dtype,
                attention: options.attention,
                checkpointing: Checkpointing::default(),
            },
        };
        report.parameters = model.num_base_parameters();
        report.files = source.files.iter().map(|file| file.path.clone()).collect();
        Ok((model, report))
    }
}

/// A parameter that no optimizer touches.
fn constant<const D: usize>(value: Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(ParamId::new(), value)
}

struct Loader<'a> {
    source: &'a WeightSource,
    options: &'a LoadOptions,
    device: &'a Device,
    plan: Plan<'a>,
    projections: &'a Projections,
    report: LoadReport,
}

impl Loader<'_> {
    /// A weight of a projection or the embedding, stored as the options ask.
    fn frozen<const D: usize>(&mut self, name: &str) -> Result<Tensor<D>, LoadError> {
        self.tensor(name, self.options.dtype)
    }

    /// A norm or a bias: a few kilobytes, kept in the compute dtype so that no pass has to convert them.
    fn small(&mut self, name: &str) -> Result<Tensor<1>, LoadError> {
        self.tensor(name, Some(self.options.compute_dtype))
    }

    fn tensor<const D: usize>(&mut self, name: &str, dtype: Option<FloatDtype>) -> Result<Tensor<D>, LoadError> {
        let (file, entry) = self.source.entry(name)?.ok_or_else(|| self.missing(name))?;
        let as_stored = if self.device.supports_dtype(burn_dtype(entry.dtype)) { entry.dtype } else { FloatDtype::F32 };
        let dtype = dtype.unwrap_or(as_stored);
        let (bytes, mapped) = file.bytes(&entry, dtype)?;
        let size = bytes.len();
        if mapped {
            self.report.mapped_bytes += size;
        } else {
            self.report.converted_bytes += size;
        }
        self.report.tensors += 1;
        let malformed = |reason: String| LoadError::Malformed { path: file.path.clone(), reason };
        let data = TensorData::try_from_bytes(bytes, entry.shape, burn_dtype(dtype))
            .map_err(|error| malformed(format!("tensor `{name}`: {error}")))?;
        Ok(Tensor::from_data(data, (self.device, burn_dtype(dtype))))
    }

    /// What cannot happen once everything has been compared.
    fn missing(&self, name: &str) -> LoadError {
        LoadError::Malformed {
            path: self.source.files.first().map(|file| file.path.clone()).unwrap_or_default(),
            reason: format!("tensor `{name}` is missing"),
        }
    }

    fn linear(&mut self, name: &str, bias: bool) -> Result<LoraLinear, LoadError> {
        let bias = if bias { Some(self.small(&format!("{name}.bias"))?) } else { None };
        let weight = format!("{name}.weight");
        let shape = *self.projections.get(name).ok_or_else(|| self.missing(&weight))?;
        let Some(packed) = self.plan.read(name, shape)? else {
            return Ok(LoraLinear::new(self.frozen(&weight)?, bias));
        };
        self.report.tensors += 1;
        self.report.packed_bytes += packed.bytes();
        self.report.packed_parameters += shape[0] * shape[1];
        Ok(LoraLinear::packed(PackedTensor::upload(&packed, self.plan.threshold(), self.device), bias))
    }

    fn block(&mut self, config: &ModelConfig, layer: usize) -> Result<Block, LoadError> {
        let prefix = layout::block_prefix(layer);
        let [attention_norm, mlp_norm] = layout::norms(config.norms);
        Ok(Block {
            self_attn: self.attention(config, layer, &format!("{prefix}self_attn."))?,
            mlp: self.mlp(config, &format!("{prefix}mlp."))?,
            attention_norm: constant(self.small(&format!("{prefix}{attention_norm}"))?),
            mlp_norm: constant(self.small(&format!("{prefix}{mlp_norm}"))?),
            post_norms: config.norms == NormPlacement::Post,
            eps: config.rms_norm_eps as f32,
        })
    }

    fn attention(&mut self, config: &ModelConfig, layer: usize, prefix: &str) -> Result<Attention, LoadError> {
        let mut projection = |name: &str| self.linear(&format!("{prefix}{name}"), config.qkv_bias);
        let qkv = if config.fused_qkv {
            QkvProjection::Fused(projection("qkv_proj")?)
        } else {
            QkvProjection::Split(SplitQkv {
                q_proj: projection("q_proj")?,
                k_proj: projection("k_proj")?,
                v_proj: projection("v_proj")?,
            })
        };
        let o_proj = self.linear(&format!("{prefix}o_proj"), config.output_bias)?;
        let mut norm = |name: &str| -> Result<_, LoadError> {
            Ok(match config.qk_norm {
                QkNorm::None => None,
                QkNorm::PerHead | QkNorm::Projection => Some(constant(self.small(&format!("{prefix}{name}.weight"))?)),
            })
        };
        Ok(Attention {
            qkv,
            o_proj,
            q_norm: norm("q_norm")?,
            k_norm: norm("k_norm")?,
            shape: AttentionShape {
                heads: config.num_attention_heads,
                kv_heads: config.num_key_value_heads,
                head_dim: config.head_dim,
                eps: config.rms_norm_eps as f32,
                window: config.windows.get(layer).copied().flatten(),
            },
        })
    }

    fn mlp(&mut self, config: &ModelConfig, prefix: &str) -> Result<Mlp, LoadError> {
        let mut projection = |name: &str| self.linear(&format!("{prefix}{name}"), config.mlp_bias);
        let gate_up = if config.fused_gate_up {
            GateUpProjection::Fused(projection("gate_up_proj")?)
        } else {
            GateUpProjection::Split(SplitGateUp {
                gate_proj: projection("gate_proj")?,
                up_proj: projection("up_proj")?,
            })
        };
        Ok(Mlp { gate_up, down_proj: projection("down_proj")? })
    }
}
