//! From a recipe to something that runs. What is cheap to refuse is refused before anything slow begins.

use std::io;
use std::path::PathBuf;

use emberlora_config::{Attention, GradientCheckpointing, ModelSection, RunConfig};
use emberlora_data::{
    DataError, DataOptions, Dataset, Document, NoProgress, PrefixSharing, TemplateError, Tokenizer, TokenizerError,
};
use emberlora_lora::LoraError;
use emberlora_lora::peft::PeftError;
use emberlora_model::hub::{self, DownloadProgress, HubError};
use emberlora_model::{AttentionKind, CausalLm, Checkpointing, LoadError, LoadOptions, LoadReport, ModelConfig};
use emberlora_quant::UnknownBlockSize;

use crate::TrainError;
use crate::adapter::{self, AdapterChoice, AttachedAdapter};
use crate::device::{self, ChosenDevice, DeviceError};
use crate::quantization::quantization_options;

/// Why a recipe cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// The recipe has no adapter, so there is nothing to train.
    #[error("`adapter.kind: none` leaves nothing to train; set it to `lora`")]
    NoAdapter,
    /// 4-bit blocks of a size that there is not.
    #[error("quantization.block_size: {0}")]
    BlockSize(#[from] UnknownBlockSize),
    /// Gradients of f16 vanish without loss scaling, which is not done.
    #[error(
        "model.compute_dtype: f16 can evaluate and generate, but not train, since its gradients vanish; set it to bf16, f32 or auto"
    )]
    HalfTraining,
    /// `init_from` is another adapter than the recipe describes.
    #[error("{}: {difference}; make the recipe's `adapter` section agree with the adapter that `init_from` names", dir.display())]
    InitFromDiffers {
        /// The adapter's directory.
        dir: PathBuf,
        /// The first difference.
        difference: String,
    },
    /// A token of the data is not in the model's vocabulary.
    #[error(
        "{row}: token {token} is not in the model's vocabulary of {vocab_size}; the tokenizer belongs to another model"
    )]
    Vocabulary {
        /// Where the document came from.
        row: String,
        /// The token.
        token: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// A file could not be hashed.
    #[error("{}: cannot be read", dir.display())]
    Hash {
        /// Its directory.
        dir: PathBuf,
        /// What the operating system says.
        #[source]
        source: io::Error,
    },
    /// The device or a format is not to be had.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The model cannot be found or fetched.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template cannot be used.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The data cannot be used.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The model cannot be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The recipe's adapter options do not fit the model.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// A saved adapter cannot be read, or does not fit the model.
    #[error("adapter {}: {source}", dir.display())]
    Adapter {
        /// The adapter's directory.
        dir: PathBuf,
        /// Why.
        source: PeftError,
    },
    /// The output cannot be used.
    #[error(transparent)]
    Train(#[from] TrainError),
}

impl PrepareError {
    /// Whether a recipe or what it names is to blame, so that trying again changes nothing.
    pub fn is_wrong_input(&self) -> bool {
        match self {
            Self::Hub(HubError::Connection { .. } | HubError::Incomplete { .. }) | Self::Hash { .. } => false,
            Self::Device(DeviceError::Remote(error)) => !error.may_pass(),
            Self::Train(error) => error.is_wrong_input(),
            _ => true,
        }
    }
}

/// Receives the progress of what is slow before a run.
pub trait Reporter {
    /// The data of `split` (`train` or `eval`) is about to be read.
    fn reading(&self, split: &'static str) -> Box<dyn emberlora_data::Progress + '_>;
    /// The model may have to be fetched.
    fn fetching(&self) -> Box<dyn DownloadProgress + '_>;
}

/// Tells nobody.
impl Reporter for () {
    fn reading(&self, _split: &'static str) -> Box<dyn emberlora_data::Progress + '_> {
        Box::new(NoProgress)
    }

    fn fetching(&self) -> Box<dyn DownloadProgress + '_> {
        Box::new(())
    }
}

/// Where a base model lies, and its tokenizer; no weight has been read.
#[derive(Debug)]
pub struct Base {
    /// The directory.
    pub dir: PathBuf,
    /// The commit, for a model of the hub.
    pub commit: Option<String>,
    /// The tokenizer with its chat template.
    pub tokenizer: Tokenizer,
}

impl Base {
    /// Finds the model that a recipe names, fetching it if it must be, and loads its tokenizer.
    ///
    /// # Errors
    /// [`PrepareError::Hub`], [`PrepareError::Tokenizer`].
    pub fn resolve(config: &RunConfig, reporter: &dyn Reporter) -> Result<Self, PrepareError> {
        // Without `..`, so that a new key of the recipe cannot be forgotten here or in `LoadedModel::load`.
        let ModelSection { source, revision, dtype: _, compute_dtype: _, attention: _ } = &config.model;
        let found = hub::resolve(source, revision, &mut *reporter.fetching())?;
        let tokenizer = Tokenizer::from_dir(&found.dir)?;
        Ok(Self { dir: found.dir, commit: found.commit, tokenizer })
    }

    /// Reads the data of `split` (`train` or `eval`). Documents share no prefixes where the model rules it out.
    ///
    /// # Errors
    /// [`PrepareError::Data`]; [`PrepareError::Load`] for a `config.json` that cannot be read.
    pub fn dataset(
        &self,
        options: DataOptions,
        reporter: &dyn Reporter,
        split: &'static str,
    ) -> Result<Dataset, PrepareError> {
        let options = match options.share_prefix.is_on()
            && ModelConfig::from_dir(&self.dir).map_err(LoadError::from)?.positions_depend_on_length()
        {
            true => options.without_sharing(PrefixSharing::PositionsDependOnLength),
            false => options,
        };
        Ok(Dataset::load(options, &self.tokenizer, &*reporter.reading(split))?)
    }
}

/// A model in memory, with or without adapters.
#[derive(Debug)]
pub struct LoadedModel {
    /// The model; its tensors live on the autodiff side of the device.
    pub model: CausalLm,
    /// What was read.
    pub report: LoadReport,
    /// Its adapters.
    pub adapter: Option<AttachedAdapter>,
    /// Where it lives.
    pub device: ChosenDevice,
}

impl LoadedModel {
    /// Loads the model and the adapters that `choice` names, on the first device of the recipe.
    ///
    /// # Errors
    /// Device and formats are looked at first, then the model, then the adapter.
    pub fn load(config: &RunConfig, base: &Base, choice: AdapterChoice<'_>) -> Result<Self, PrepareError> {
        Self::load_on(device::choose(config.device.first())?, config, base, choice)
    }

    /// As [`load`](Self::load), on `device`.
    ///
    /// # Errors
    /// As there.
    pub fn load_on(
        device: ChosenDevice,
        config: &RunConfig,
        base: &Base,
        choice: AdapterChoice<'_>,
    ) -> Result<Self, PrepareError> {
        let ModelSection { source: _, revision: _, dtype, compute_dtype, attention } = &config.model;
        let attention = match attention {
            Attention::Fused => AttentionKind::Fused,
            Attention::Eager => AttentionKind::Eager,
        };
        let options = LoadOptions {
            dtype: device.weight_dtype(*dtype)?,
            compute_dtype: device.compute_dtype(*compute_dtype)?,
            attention,
            quantization: config.quantization.as_ref().map(quantization_options).transpose()?,
        };
        let checkpointing = match config.gradient_checkpointing {
            GradientCheckpointing::None => None,
            GradientCheckpointing::Block => Some(Checkpointing::Block),
            GradientCheckpointing::Sqrt => Some(Checkpointing::Sqrt),
            GradientCheckpointing::Every(blocks) => Some(Checkpointing::Every(blocks)),
        };
        let on = device.device.clone().autodiff();
        let on = if checkpointing.is_some() { on.gradient_checkpointing() } else { on };
        let (mut model, report) = CausalLm::load(&base.dir, &options, &on)?;
        model.set_checkpointing(checkpointing.unwrap_or_default());
        let adapter = adapter::put_on(&mut model, &config.adapter, choice, config.seed, &on)?;
        Ok(Self { model, report, adapter, device })
    }

    /// Whether the model can read every token of `documents`.
    ///
    /// # Errors
    /// [`PrepareError::Vocabulary`] with the first document that it cannot read.
    pub fn check_vocabulary(&self, documents: &[Document]) -> Result<(), PrepareError> {
        let vocab_size = self.model.config().vocab_size;
        for document in documents {
            if let Some(&token) = document.ids.iter().find(|&&id| id as usize >= vocab_size) {
                return Err(PrepareError::Vocabulary { row: document.source.to_string(), token, vocab_size });
            }
        }
        Ok(())
    }
}
