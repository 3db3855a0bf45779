//! What loading needs to know, apart from the tokenizer.

use std::path::PathBuf;

use emberlora_config::{
    ChatTemplateChoice, DataFormat, DataSection, DataSource, LossOn, Overflow, RunConfig, SharePrefix,
};
use serde::Serialize;

use crate::DataError;
use crate::epoch::Layout;
use crate::row::Format;

/// One file of rows.
#[derive(Clone, Debug, PartialEq, derive_new::new)]
pub struct Source {
    /// The file: JSON Lines, plain or compressed with gzip or zstd.
    pub path: PathBuf,
    /// What its rows look like; `None` lets the first row decide.
    pub format: Option<Format>,
    /// How often each row takes part in an epoch. 2.0 is twice; 0.5 is a half of the rows, another one each epoch.
    pub weight: f64,
}

/// Whether documents of a packed row share the tokens that they begin with, and if not, why.
///
/// Sharing changes what is computed, never the result: so it needs a model in which a token's hidden state depends on
/// nothing but the tokens up to it and their positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PrefixSharing {
    /// Every prefix of a row is computed once.
    On,
    /// The recipe says `data.share_prefix: off`.
    OffByRecipe,
    /// Each row holds one document.
    PackingOff,
    /// Every document has a dropout mask of its own.
    Dropout,
    /// The model's position embeddings depend on the length of the document.
    PositionsDependOnLength,
}

impl PrefixSharing {
    /// Whether prefixes are shared.
    pub fn is_on(self) -> bool {
        self == PrefixSharing::On
    }
}

/// How files become batches.
#[derive(Clone, Debug, PartialEq)]
pub struct DataOptions {
    /// The files, read in this order.
    pub sources: Vec<Source>,
    /// Which chat template renders conversations.
    pub chat_template: ChatTemplateChoice,
    /// Which tokens of a conversation, or of a prompt and its completion, are trained.
    pub loss_on: LossOn,
    /// The longest document and the capacity of a packed row, in tokens.
    pub max_seq_len: usize,
    /// What happens to longer documents.
    pub overflow: Overflow,
    /// Whether several documents share a row.
    pub packing: bool,
    /// Whether the documents of a packed row share the tokens that they begin with.
    pub share_prefix: PrefixSharing,
    /// Whether each epoch has an order of its own.
    pub shuffle: bool,
    /// Rows per batch.
    pub batch_size: usize,
    /// The seed of the run; here only for the padding that the report shows.
    pub seed: u64,
}

impl DataOptions {
    /// How a run reads its training data. What the model rules out is not known here: see
    /// [`DataOptions::without_sharing`].
    pub fn train(config: &RunConfig) -> Self {
        let options = Self::new(&config.data, &config.data.train, config.data.shuffle, config);
        // Evaluation drops nothing, and may share.
        if config.adapter.dropout > 0.0 { options.without_sharing(PrefixSharing::Dropout) } else { options }
    }

    /// How a run reads its evaluation data: as its training data, but in the order of the files. Without evaluation
    /// files in the recipe the list of sources is empty.
    pub fn eval(config: &RunConfig) -> Self {
        Self::new(&config.data, &config.data.eval, false, config)
    }

    /// Shares no prefixes, for a reason that lies outside the data; one that is already known stays.
    #[must_use]
    pub fn without_sharing(mut self, reason: PrefixSharing) -> Self {
        if self.share_prefix.is_on() {
            self.share_prefix = reason;
        }
        self
    }

    fn new(data: &DataSection, sources: &[DataSource], shuffle: bool, config: &RunConfig) -> Self {
        // Without `..`, so that a new key of the recipe cannot be forgotten here. Files and order are the caller's.
        let DataSection {
            train: _,
            eval: _,
            format,
            chat_template,
            loss_on,
            max_seq_len,
            overflow,
            packing,
            share_prefix,
            shuffle: _,
        } = data;
        DataOptions {
            sources: sources.iter().map(|source| resolve(source, *format)).collect(),
            chat_template: chat_template.clone(),
            loss_on: *loss_on,
            max_seq_len: *max_seq_len,
            overflow: *overflow,
            packing: *packing,
            share_prefix: match share_prefix {
                SharePrefix::Off => PrefixSharing::OffByRecipe,
                SharePrefix::Auto if !packing => PrefixSharing::PackingOff,
                SharePrefix::Auto => PrefixSharing::On,
            },
            shuffle,
            batch_size: config.train.batch_size,
            seed: config.seed,
        }
    }

    pub(crate) fn layout(&self) -> Layout {
        Layout {
            batch_size: self.batch_size,
            max_seq_len: self.max_seq_len,
            packing: self.packing,
            share_prefix: self.share_prefix,
            shuffle: self.shuffle,
        }
    }

    /// Refuses options under which nothing could be loaded.
    pub(crate) fn check(&self) -> Result<(), DataError> {
        if self.sources.is_empty() {
            return Err(DataError::NoSources);
        }
        self.layout().check()?;
        match self.sources.iter().find(|source| !(source.weight > 0.0 && source.weight <= DataSource::MAX_WEIGHT)) {
            Some(source) => Err(DataError::Weight { path: source.path.clone(), weight: source.weight }),
            None => Ok(()),
        }
    }
}

impl From<&RunConfig> for DataOptions {
    fn from(config: &RunConfig) -> Self {
        DataOptions::train(config)
    }
}

/// A source without a format of its own takes the section's.
fn resolve(source: &DataSource, section_format: DataFormat) -> Source {
    let DataSource { path, format, weight } = source;
    let format = if *format == DataFormat::Auto { section_format } else { *format };
    Source::new(path.clone(), chosen(format), *weight)
}

fn chosen(format: DataFormat) -> Option<Format> {
    match format {
        DataFormat::Auto => None,
        DataFormat::Chat => Some(Format::Chat),
        DataFormat::Prompt => Some(Format::Prompt),
        DataFormat::Alpaca => Some(Format::Alpaca),
        DataFormat::Text => Some(Format::Text),
        DataFormat::Tokens => Some(Format::Tokens),
    }
}
