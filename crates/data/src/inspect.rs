//! Rows one at a time, as the model will see them.

use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use crate::dataset::choose_format;
use crate::encode::{Encoded, Encoder, Outcome};
use crate::options::{DataOptions, Source};
use crate::row::{Format, FormatChoice};
use crate::source::LineReader;
use crate::{DataError, RowError, RowRef, Tokenizer};

/// A row after rendering, tokenisation and truncation. Rows that a run would drop are shown too.
#[derive(Clone, Debug)]
pub struct InspectedRow {
    /// Where the row stands.
    pub source: RowRef,
    /// The format it was read as.
    pub format: Format,
    /// The rendered text, whole even where the tokens are truncated.
    pub text: String,
    /// Token ids.
    pub ids: Vec<u32>,
    /// Unshifted labels: -100 where a token is not trained.
    pub labels: Vec<i64>,
    /// The text each token adds. A character that takes several tokens appears with the last of them.
    pub pieces: Vec<String>,
    /// What a run does with the row.
    pub outcome: Outcome,
}

/// A row as `emberlora inspect --json` prints it.
#[derive(Debug, Serialize)]
struct JsonRow<'a> {
    file: &'a Path,
    line: usize,
    format: Format,
    #[serde(flatten)]
    outcome: Outcome,
    text: &'a str,
    input_ids: &'a [u32],
    labels: &'a [i64],
}

impl Serialize for InspectedRow {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let InspectedRow { source, format, text, ids, labels, pieces: _, outcome } = self;
        let RowRef { file, line } = source;
        JsonRow { file, line: *line, format: *format, outcome: *outcome, text, input_ids: ids, labels }
            .serialize(serializer)
    }
}

/// The rows of all files, read as they are asked for.
#[derive(Debug)]
pub struct InspectRows<'a> {
    encoder: Encoder<'a>,
    sources: std::vec::IntoIter<Source>,
    open: Option<OpenFile>,
    failed: bool,
}

#[derive(Debug)]
struct OpenFile {
    source: Source,
    path: Arc<Path>,
    reader: LineReader,
    choice: Option<FormatChoice>,
}

/// Reads the rows of `options` one at a time, without loading the files.
///
/// # Errors
/// When the options or the chat template cannot be used. The iterator ends after its first error.
pub fn inspect<'a>(options: DataOptions, tokenizer: &'a Tokenizer) -> Result<InspectRows<'a>, DataError> {
    options.check()?;
    let encoder = Encoder::new(&options, tokenizer)?.keeping_text();
    Ok(InspectRows { encoder, sources: options.sources.into_iter(), open: None, failed: false })
}

impl InspectRows<'_> {
    fn advance(&mut self) -> Result<Option<InspectedRow>, DataError> {
        loop {
            let Some(file) = &mut self.open else {
                let Some(source) = self.sources.next() else { return Ok(None) };
                let reader = LineReader::open(&source.path)?;
                let path = Arc::from(source.path.as_path());
                self.open = Some(OpenFile { source, path, reader, choice: None });
                continue;
            };
            let Some(row) = file.reader.next_line()? else {
                if file.choice.is_none() {
                    return Err(DataError::Empty { path: file.source.path.clone() });
                }
                self.open = None;
                continue;
            };
            let choice = match file.choice {
                Some(choice) => choice,
                None => *file.choice.insert(choose_format(&file.source, &row)?),
            };
            let (line, bytes) = row;
            let source = RowRef::new(file.path.clone(), line);
            return show(&self.encoder, choice, &bytes, source)
                .map(Some)
                .map_err(|error| error.at(&file.source.path, line));
        }
    }
}

fn show(encoder: &Encoder<'_>, choice: FormatChoice, bytes: &[u8], source: RowRef) -> Result<InspectedRow, RowError> {
    let Encoded { document, outcome } = encoder.encode_line(choice, bytes, source)?;
    Ok(InspectedRow {
        format: choice.format,
        labels: document.labels(),
        pieces: pieces(encoder.tokenizer(), &document.ids)?,
        text: document.text.unwrap_or_default(),
        ids: document.ids,
        source: document.source,
        outcome,
    })
}

/// What each token adds to the text.
fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Result<Vec<String>, RowError> {
    let mut stream = tokenizer.decode_stream(false);
    let mut pieces =
        ids.iter().map(|&id| Ok(stream.step(id)?.unwrap_or_default())).collect::<Result<Vec<String>, RowError>>()?;
    // Truncation can leave a character without its last token.
    if let (Some(rest), Some(last)) = (stream.finish()?, pieces.last_mut()) {
        last.push_str(&rest);
    }
    Ok(pieces)
}

impl Iterator for InspectRows<'_> {
    type Item = Result<InspectedRow, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let row = self.advance().transpose();
        self.failed = !matches!(row, Some(Ok(_)));
        row
    }
}
