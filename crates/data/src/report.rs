//! What loading found, for people and for the resolved recipe.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

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

/// The share of computed tokens that is padding, from 0 to 1, over the first epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Padding {
    /// With one document per row.
    pub unpacked: f64,
    /// With documents packed into rows.
    pub packed: f64,
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
            true => write!(f, "padding {packed:.1} % with packing, {unpacked:.1} % without"),
            false => write!(f, "padding {unpacked:.1} % (packing would leave {packed:.1} %)"),
        }
    }
}
