//! A whole training run from a recipe.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use emberlora_config::{DataFormat, DataSource, RunConfig};
use emberlora_data::{DataOptions, DataReport, Dataset, Format};
use emberlora_lora::detach;
use emberlora_model::hash_files;
use emberlora_quant::FloatDtype;

use crate::adapter::{AdapterChoice, AttachedAdapter, lora_options};
use crate::files::ADAPTER;
use crate::prepare::{Base, LoadedModel, PrepareError, Reporter};
use crate::provenance::{AdapterProvenance, ModelProvenance, PackedProvenance, Versions};
use crate::quantization::quantization_section;
use crate::{
    AdapterWriter, Batches, ChosenDevice, Listener, Provenance, Replica, RunFiles, Seeded, TrainError, TrainOptions,
    Trained, Trainer, device,
};

/// Everything that a recipe asks for, loaded and checked: what is left is to train.
pub struct Run {
    /// The recipe with nothing left open: what `config.yaml` will say.
    pub config: RunConfig,
    /// Where the base model lies, and its tokenizer.
    pub base: Base,
    /// The model with its adapters.
    pub model: LoadedModel,
    /// Its copies on the further devices of the recipe.
    pub replicas: Vec<Replica>,
    /// The adapters.
    pub adapter: AttachedAdapter,
    /// What is trained on.
    pub train: Dataset,
    /// What is evaluated on.
    pub eval: Option<Dataset>,
    /// What the recipe's values meant.
    pub provenance: Provenance,
}

impl Run {
    /// Loads all that a recipe names. What is cheap to refuse is refused first: adapter options that fit no model, an output
    /// that is taken or cannot be written to, a device that is not there, a format it cannot compute in; then the data is
    /// read; the weights come last.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn prepare(config: &RunConfig, reporter: &dyn Reporter) -> Result<Self, PrepareError> {
        // Without `..`, so that a new section of the recipe cannot be forgotten here.
        let RunConfig {
            model: model_section,
            adapter: adapter_section,
            quantization: _,           // read by `LoadedModel::load`
            gradient_checkpointing: _, // read by `LoadedModel::load`, as the device is
            data: _,                   // read by `DataOptions`
            train: _,                  // read by `TrainOptions` in `Run::train`
            output,
            device,
            seed,
        } = config;
        lora_options(adapter_section, *seed)?.check()?;
        RunFiles::check(output)?;
        let devices = device::choose_all(device)?;
        let compute_dtype = devices[0].compute_dtype(model_section.compute_dtype)?;
        if compute_dtype == FloatDtype::F16 {
            return Err(PrepareError::HalfTraining);
        }
        for device in &devices {
            device.compute_dtype(device::recipe_dtype(compute_dtype))?;
            device.weight_dtype(model_section.dtype)?;
        }

        let base = Base::resolve(config, reporter)?;
        let train = base.dataset(DataOptions::train(config), reporter, "train")?;
        let eval = match config.data.eval.is_empty() {
            true => None,
            false => Some(base.dataset(DataOptions::eval(config), reporter, "eval")?),
        };
        let mut model = LoadedModel::load_on(devices[0].clone(), config, &base, AdapterChoice::Recipe)?;
        let adapter = model.adapter.take().ok_or(PrepareError::NoAdapter)?;
        for dataset in [Some(&train), eval.as_ref()].into_iter().flatten() {
            model.check_vocabulary(dataset.documents())?;
        }
        let (longest, trained_for) = (config.data.max_seq_len, model.model.config().max_position_embeddings);
        if longest > trained_for {
            tracing::warn!("data.max_seq_len is {longest}, but the model was trained on positions below {trained_for}");
        }

        let mut of_copies = config.clone();
        of_copies.model.compute_dtype = device::recipe_dtype(compute_dtype);
        let replicas = devices[1..].iter().map(|device| {
            let copy = LoadedModel::load_on(device.clone(), &of_copies, &base, AdapterChoice::Recipe)?;
            Ok(Replica::new(copy.model, device.choice.to_string()))
        });
        let replicas = replicas.collect::<Result<Vec<_>, PrepareError>>()?;

        let config = resolved(config, &devices, &base, &model, &train.report, eval.as_ref().map(|data| &data.report));
        let provenance = Provenance {
            versions: Versions::default(),
            device: config.device.to_string(),
            seed: *seed,
            model: ModelProvenance {
                source: model_section.source.clone(),
                commit: base.commit.clone(),
                files: match base.commit {
                    Some(_) => BTreeMap::new(),
                    None => hash_files(&base.dir)?,
                },
                dtype: config.model.dtype.to_string(),
                packed: PackedProvenance::of(&model.report),
                compute_dtype: config.model.compute_dtype.to_string(),
            },
            tokenizer_sha256: base.tokenizer.sha256().to_owned(),
            chat_template_sha256: base
                .tokenizer
                .chat_template(&config.data.chat_template)?
                .map(|template| template.hash().to_owned()),
            init_from: match &adapter.loaded_from {
                None => None,
                Some(dir) => {
                    Some(AdapterProvenance::of(dir).map_err(|source| PrepareError::Hash { dir: dir.clone(), source })?)
                }
            },
            trainable_parameters: adapter.report.trainable_parameters,
            train: train.report.clone(),
            eval: eval.as_ref().map(|dataset| dataset.report.clone()),
        };
        Ok(Self { config, base, model, replicas, adapter, train, eval, provenance })
    }

    /// Trains, telling `listeners` and writing the files of the run into the recipe's `output`.
    ///
    /// The run's own model is afterwards the one that training started from: the base, with adapters only where the recipe
    /// took their values from elsewhere. Fresh ones compute nothing, and a copy of them would stay in memory throughout.
    ///
    /// # Errors
    /// See [`Trainer::run`] and [`RunFiles::create`].
    pub fn train(
        &mut self,
        listeners: &mut [&mut dyn Listener],
        interrupt: &AtomicBool,
    ) -> Result<Trained, TrainError> {
        let (output, seed) = (&self.config.output, self.config.seed);
        let model = self.model.model.clone();
        if self.adapter.loaded_from.is_none() {
            detach(&mut self.model.model);
        }
        let train = Seeded::new(&self.train, seed);
        let eval = self.eval.as_ref().map(|dataset| Seeded::new(dataset, seed));
        let trainer = Trainer::new(
            model,
            &train,
            eval.as_ref().map(|eval| eval as &dyn Batches),
            TrainOptions::new(&self.config.train, seed),
            Some(AdapterWriter::new(
                self.adapter.options.clone(),
                self.config.model.source.clone(),
                self.base.commit.clone(),
                output.join(ADAPTER),
            )),
        )?;
        let trainer = trainer.spread(self.model.device.choice.to_string(), self.replicas.clone())?;
        // When nothing but training can fail any more, so that a failed start does not take the directory.
        let mut files = RunFiles::create(output, &self.provenance.annotate(&self.config.to_yaml()), &self.provenance)?;
        let mut all: Vec<&mut dyn Listener> = vec![&mut files];
        for listener in listeners {
            all.push(&mut **listener);
        }
        trainer.run(&mut all, interrupt)
    }
}

/// The recipe with what was found filled in for what it left open.
fn resolved(
    config: &RunConfig,
    devices: &[ChosenDevice],
    base: &Base,
    model: &LoadedModel,
    train: &DataReport,
    eval: Option<&DataReport>,
) -> RunConfig {
    let mut config = config.clone();
    config.model.revision = base.commit.clone().unwrap_or(config.model.revision);
    config.model.dtype = model.model.weight_dtype().map_or(config.model.dtype, device::recipe_dtype);
    let found = || model.report.quantization.as_ref().and_then(quantization_section);
    config.quantization = config.quantization.take().or_else(found);
    config.model.compute_dtype = device::recipe_dtype(model.model.compute_dtype());
    config.device = devices.iter().map(|device| device.choice.clone()).collect();
    fill_formats(&mut config.data.train, train);
    if let Some(eval) = eval {
        fill_formats(&mut config.data.eval, eval);
    }
    config
}

fn fill_formats(sources: &mut [DataSource], report: &DataReport) {
    for (source, file) in sources.iter_mut().zip(&report.files) {
        source.format = match file.format.format {
            Format::Chat => DataFormat::Chat,
            Format::Prompt => DataFormat::Prompt,
            Format::Alpaca => DataFormat::Alpaca,
            Format::Text => DataFormat::Text,
            Format::Tokens => DataFormat::Tokens,
        };
    }
}
