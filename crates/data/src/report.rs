//! What loading found, for people and for the resolved recipe.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::PrefixSharing;
use crate::encode::{DropReason, Outcome};
use crate::row::FormatChoice;
use crate::source::Compression;

/// Counts of rows and tokens. Rows count once here, whatever the weight of their file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Rows read.
    pub rows: usize,
    /// Rows that became documents.
    pub documents: usize,
    /// Tokens in these documents.
    pub tokens: usize,
    /// Tokens that are predicted during training.
    pub trained_tokens: usize,
    /// Documents that were cut to `max_seq_len`.
    pub truncated: usize,
    /// Rows left out: `too_long` and `untrained` together.
    pub dropped: usize,
    /// Rows left out because they are longer than `max_seq_len`.
    pub too_long: usize,
    /// Rows left out because none of the tokens within `max_seq_len` is trained.
    pub untrained: usize,
}

impl Counts {
    pub(crate) fn add_row(&mut self, outcome: Outcome, tokens: usize, trained: usize) {
        self.rows += 1;
        match outcome {
            Outcome::Kept => {}
            Outcome::Truncated { .. } => self.truncated += 1,
            Outcome::Dropped(reason) => {
                self.dropped += 1;
                match reason {
                    DropReason::TooLong { .. } => self.too_long += 1,
                    DropReason::Untrained { .. } => self.untrained += 1,
                }
                return;
            }
        }
        self.documents += 1;
        self.tokens += tokens;
        self.trained_tokens += trained;
    }

    pub(crate) fn add(&mut self, other: &Counts) {
        let Counts { rows, documents, tokens, trained_tokens, truncated, dropped, too_long, untrained } = *other;
        self.rows += rows;
        self.documents += documents;
        self.tokens += tokens;
        self.trained_tokens += trained_tokens;
        self.truncated += truncated;
        self.dropped += dropped;
        self.too_long += too_long;
        self.untrained += untrained;
    }
}

/// One file as it was read.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FileReport {
    /// The path as configured.
    pub path: PathBuf,
    /// SHA-256 of its bytes on disk, in hexadecimal.
    pub sha256: String,
    /// Its size on disk.
    pub bytes: u64,
    /// How it is stored.
    pub compression: Compression,
    /// What its rows look like and whether the first row decided that.
    #[serde(flatten)]
    pub format: FormatChoice,
    /// The weight of its rows.
    pub weight: f64,
    /// What was in it.
    #[serde(flatten)]
    pub counts: Counts,
}

/// The share of the tokens in batches that is padding, from 0 to 1, over the first epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Padding {
    /// With one document per row.
    pub unpacked: f64,
    /// With documents packed into rows.
    pub packed: f64,
}

/// The tokens of an epoch. Rows count as often as their file's weight says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EpochTokens {
    /// The lengths of the documents together.
    pub given: usize,
    /// What is computed of them: a prefix that documents of a row share, once. Padding does not count.
    pub computed: usize,
    /// Labels, each as often as documents have it.
    pub trained: usize,
}

/// What loading found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DataReport {
    /// Each file.
    pub files: Vec<FileReport>,
    /// All files together.
    #[serde(flatten)]
    pub counts: Counts,
    /// Whether documents are packed.
    pub packing: bool,
    /// What packing saves, or would save.
    pub padding: Padding,
    /// Whether documents of a row share prefixes, and if not, why.
    pub share_prefix: PrefixSharing,
    /// The tokens of the first epoch.
    pub first_epoch: EpochTokens,
}

/// A few lines for a terminal.
impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for file in &self.files {
            let FormatChoice { format, detected } = file.format;
            let how = if detected { " (chosen from its first row)" } else { "" };
            write!(f, "{}: format {format}{how}, {} rows", file.path.display(), file.counts.rows)?;
            if file.weight != 1.0 {
                write!(f, ", weight {}", file.weight)?;
            }
            writeln!(f)?;
        }
        let Counts { rows, documents, tokens, trained_tokens, truncated, dropped, too_long, untrained } = self.counts;
        let share = 100.0 * trained_tokens as f64 / tokens.max(1) as f64;
        writeln!(f, "{rows} rows, {documents} documents, {tokens} tokens, {trained_tokens} trained ({share:.1} %)")?;
        if truncated > 0 {
            writeln!(f, "{truncated} truncated to max_seq_len")?;
        }
        if dropped > 0 {
            writeln!(f, "{dropped} dropped ({too_long} too long, {untrained} without a trained token)")?;
        }
        let Padding { unpacked, packed } = self.padding;
        let (packed, unpacked) = (100.0 * packed, 100.0 * unpacked);
        match self.packing {
            true => writeln!(f, "padding {packed:.1} % with packing, {unpacked:.1} % without")?,
            false => writeln!(f, "padding {unpacked:.1} % (packing would leave {packed:.1} %)")?,
        }
        let EpochTokens { given, computed, trained } = self.first_epoch;
        write!(f, "first epoch: {given} tokens given, {computed} computed, {trained} trained; ")?;
        match self.share_prefix {
            PrefixSharing::On => {
                let saved = 100.0 * (given - computed) as f64 / given.max(1) as f64;
                write!(f, "shared prefixes save {saved:.1} %")
            }
            PrefixSharing::OffByRecipe => write!(f, "prefixes are not shared (data.share_prefix: off)"),
            PrefixSharing::PackingOff => write!(f, "prefixes are not shared (data.packing: false)"),
            PrefixSharing::Dropout => write!(f, "prefixes are not shared (adapter.dropout is above 0)"),
            PrefixSharing::PositionsDependOnLength => {
                write!(f, "prefixes are not shared (the model's positions depend on the length of a document)")
            }
        }
    }
}
