//! Everything that can be wrong with a file of rows.

use std::fmt;
use std::io;
use std::path::PathBuf;

use emberlora_config::DataSource;

use crate::MessageError;
use crate::row::{Format, FormatChoice};

/// Why the data of a run could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// No file is configured.
    #[error("no data file is given: set `data.train` to a path or to a list of {{path, format, weight}}")]
    NoSources,
    /// A size that must be at least one is zero.
    #[error("`{name}` is {found}; it must be at least {least}")]
    Size {
        /// The option's name.
        name: &'static str,
        /// Its value.
        found: usize,
        /// The smallest value that makes sense.
        least: usize,
    },
    /// A source's weight is not a positive number, or too large a one.
    #[error(
        "{}: weight {weight} is not a number above 0 and of at most {}; leave the file out to give it no weight",
        path.display(),
        DataSource::MAX_WEIGHT
    )]
    Weight {
        /// The source's file.
        path: PathBuf,
        /// The weight that was found.
        weight: f64,
    },
    /// A file could not be opened.
    #[error("{}: cannot be opened: {error}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        #[source]
        error: io::Error,
    },
    /// The path is a directory or another thing that is not a file.
    #[error("{}: is not a file; expected a file with one JSON object per line", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A file could not be read to its end, or its compressed content is damaged.
    #[error("{}: cannot be read as {kind} after line {line}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// How the file is stored: plain text, gzip or zstd.
        kind: &'static str,
        /// The last complete line, 0 if there was none.
        line: usize,
        /// What went wrong.
        #[source]
        error: io::Error,
    },
    /// A file without a single row.
    #[error("{}: contains no rows; expected one JSON object per line", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A row that cannot be used.
    #[error("{}:{line}: {error}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// What is wrong with the row.
        #[source]
        error: Box<RowError>,
    },
    /// The chat template cannot be used.
    #[error(transparent)]
    Template(#[from] crate::TemplateError),
    /// No row is left that has a trained token.
    #[error(
        "no token would be trained: of {rows} rows in {files}, {too_long} were dropped as longer than max_seq_len = {max_seq_len} \
         and {untrained} have no trained token within it; check `data.loss_on`, `data.max_seq_len` and the labels (`emberlora inspect` shows them)"
    )]
    NothingTrained {
        /// The files, as listed.
        files: String,
        /// Rows that were read.
        rows: usize,
        /// Rows dropped for their length.
        too_long: usize,
        /// Rows dropped because nothing in them is trained.
        untrained: usize,
        /// The limit in force.
        max_seq_len: usize,
    },
}

/// Why one row cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RowError {
    /// The bytes of the line are not UTF-8.
    #[error("is not valid UTF-8 (byte {offset} of the line); convert the file to UTF-8")]
    Utf8 {
        /// Offset of the first invalid byte within the line.
        offset: usize,
    },
    /// The line is not JSON.
    #[error("is not valid JSON: {message} (column {column}){hint}")]
    Json {
        /// The parser's message.
        message: String,
        /// Column within the line, from 1.
        column: usize,
        /// What the file may be instead, or nothing.
        hint: &'static str,
    },
    /// The line is JSON, but not an object.
    #[error("expected a JSON object, found {found}{hint}")]
    NotAnObject {
        /// Kind of the value.
        found: &'static str,
        /// What the file may be instead, or nothing.
        hint: &'static str,
    },
    /// No format has the keys of the first row.
    #[error(
        "no known format has the keys {found}; expected `messages` (chat), `prompt` and `completion` (prompt), \
         `instruction` and `output` (alpaca), `text` (text), or `input_ids` and `labels` (tokens)"
    )]
    UnknownFormat {
        /// The keys of the row.
        found: Keys,
    },
    /// A key that the format needs is missing.
    #[error("does not fit the format {format}: key `{key}` is missing, found {found}")]
    MissingKey {
        /// The file's format.
        format: FormatChoice,
        /// The key.
        key: &'static str,
        /// The keys of the row.
        found: Keys,
    },
    /// A value of the wrong type.
    #[error("does not fit the format {format}: `{key}` must be {expected}, found {found}")]
    WrongType {
        /// The file's format.
        format: FormatChoice,
        /// The key or the path within the row.
        key: String,
        /// What is allowed.
        expected: &'static str,
        /// What the row has.
        found: String,
    },
    /// A message that no template can read.
    #[error("does not fit the format {format}: messages[{index}]: {error}")]
    Message {
        /// The file's format.
        format: FormatChoice,
        /// Index of the message.
        index: usize,
        /// What is wrong with it.
        #[source]
        error: MessageError,
    },
    /// A conversation, but no template to render it with.
    #[error(
        "is a conversation, but the tokenizer has no chat template: set `data.chat_template` to chatml, tulu, llama3, \
         zephyr or a .jinja file"
    )]
    NoTemplate,
    /// `input_ids` and `labels` differ in length.
    #[error(
        "`input_ids` has {ids} entries and `labels` has {labels}; each token needs one label (-100 where it is not trained)"
    )]
    LabelCount {
        /// Number of tokens.
        ids: usize,
        /// Number of labels.
        labels: usize,
    },
    /// A label that is neither -100 nor the token itself.
    #[error(
        "labels[{index}] is {label}, expected -100 or the token at the same index ({id}): labels are not shifted, the trainer shifts them"
    )]
    Label {
        /// Index into `labels`.
        index: usize,
        /// The label.
        label: i64,
        /// The token at that index.
        id: u32,
    },
    /// A token id the tokenizer does not have.
    #[error(
        "input_ids[{index}] is {id}, but the vocabulary has {vocab_size} entries; was the row made with another tokenizer?"
    )]
    Vocabulary {
        /// Index into `input_ids`.
        index: usize,
        /// The id.
        id: i64,
        /// Number of ids.
        vocab_size: usize,
    },
    /// An `attention_mask` that hides tokens.
    #[error(
        "attention_mask[{index}] is 0: padded rows are not supported, leave padding out of `input_ids` and `labels`"
    )]
    Padded {
        /// Index of the first hidden token.
        index: usize,
    },
    /// A prompt and its completion share a token, and encoding them apart changes the text.
    #[error(
        "a token covers both the end of `prompt` and the beginning of `completion`, and encoding them apart changes the text: \
         begin the completion with a space or a line break, or end the prompt with one"
    )]
    Boundary,
    /// The row is longer than allowed and `overflow` is `error`.
    #[error(
        "has {tokens} tokens, more than max_seq_len = {max_seq_len} (data.overflow is `error`; `truncate` and `drop` continue)"
    )]
    TooLong {
        /// Length of the row.
        tokens: usize,
        /// The limit.
        max_seq_len: usize,
    },
    /// The chat template refuses the conversation, or its spans cannot be established.
    #[error(transparent)]
    Template(#[from] crate::TemplateError),
    /// The tokenizer fails.
    #[error(transparent)]
    Tokenizer(#[from] crate::TokenizerError),
}

impl RowError {
    pub(crate) fn at(self, path: &std::path::Path, line: usize) -> DataError {
        DataError::Row { path: path.to_path_buf(), line, error: Box::new(self) }
    }
}

/// The keys of a row, shown as a short list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys(pub Vec<String>);

impl fmt::Display for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 12;
        if self.0.is_empty() {
            return f.write_str("no keys at all");
        }
        for (index, key) in self.0.iter().take(SHOWN).enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}`{}`", key.escape_debug())?;
        }
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

impl fmt::Display for FormatChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FormatChoice { format, detected: true } => write!(f, "`{format}` (chosen from the first row)"),
            FormatChoice { format, detected: false } => write!(f, "`{format}`"),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
