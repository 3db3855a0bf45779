//! All documents of a run in memory, and the epochs made from them.

use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;

use crate::encode::{Encoded, Encoder, Outcome};
use crate::epoch::{Batches, Epochs, Group, Layout};
use crate::options::{DataOptions, Source};
use crate::report::{Counts, DataReport, FileReport};
use crate::row::{FormatChoice, detect, parse_object};
use crate::source::LineReader;
use crate::{DataError, Document, Progress, RowError, RowRef, Tokenizer};

/// The documents of a run.
///
/// Only ids and labels are kept, five bytes a token; the text of the rows is not.
#[derive(Clone, Debug)]
pub struct Dataset {
    epochs: Epochs,
    pad: u32,
    /// What loading found.
    pub report: DataReport,
}

impl Dataset {
    /// Reads, renders and tokenises every file of `options`, on all cores.
    ///
    /// # Errors
    /// A file that cannot be read, a row that does not fit its format (with file and line), and data in which no token
    /// would be trained. The first bad row in the order of the files is the one reported.
    pub fn load(options: DataOptions, tokenizer: &Tokenizer, progress: &dyn Progress) -> Result<Self, DataError> {
        options.check()?;
        let encoder = Encoder::new(&options, tokenizer)?;
        // All files are opened before the first is read: a typo in the last path should not cost the time of the others.
        let readers =
            options.sources.iter().map(|source| LineReader::open(&source.path)).collect::<Result<Vec<_>, _>>()?;
        progress.start(readers.iter().map(LineReader::size).sum());

        let (mut documents, mut groups, mut files) = (Vec::new(), Vec::new(), Vec::new());
        let mut counts = Counts::default();
        for (source, reader) in options.sources.iter().zip(readers) {
            let begin = documents.len();
            let file = load_file(source, reader, &encoder, progress, &mut documents)?;
            counts.add(&file.counts);
            groups.push(Group { documents: begin..documents.len(), weight: source.weight });
            files.push(file);
        }
        progress.finish();
        if counts.trained_tokens == 0 {
            let files: Vec<String> = options.sources.iter().map(|source| source.path.display().to_string()).collect();
            return Err(nothing_trained(files.join(", "), &counts, options.max_seq_len));
        }

        let layout = options.layout();
        Ok(Self::new(Epochs::new(documents, groups, layout), padding_id(tokenizer), files, counts, options.seed))
    }

    /// Takes documents that were made elsewhere; `pad` fills up short rows.
    ///
    /// # Errors
    /// A document whose marks do not match its tokens or that is longer than `layout.max_seq_len`, a layout without
    /// rows, and documents in which no token would be trained.
    pub fn from_documents(documents: Vec<Document>, layout: Layout, pad: u32) -> Result<Self, DataError> {
        layout.check()?;
        let max_seq_len = layout.max_seq_len;
        let mut counts = Counts::default();
        for document in &documents {
            let (ids, labels) = (document.ids.len(), document.trained.len());
            let RowRef { file, line } = &document.source;
            if ids != labels {
                return Err(RowError::LabelCount { ids, labels }.at(file, *line));
            }
            if ids > max_seq_len {
                return Err(RowError::TooLong { tokens: ids, max_seq_len }.at(file, *line));
            }
            counts.add_row(Outcome::Kept, ids, document.trained_tokens());
        }
        if counts.trained_tokens == 0 {
            let files = "the given documents".to_owned();
            return Err(nothing_trained(files, &counts, max_seq_len));
        }
        let groups = vec![Group { documents: 0..documents.len(), weight: 1.0 }];
        Ok(Self::new(Epochs::new(documents, groups, layout), pad, Vec::new(), counts, 0))
    }

    fn new(epochs: Epochs, pad: u32, files: Vec<FileReport>, counts: Counts, seed: u64) -> Self {
        let (padding, first_epoch) = epochs.measure(seed);
        let Layout { packing, .. } = epochs.layout;
        let share_prefix = epochs.layout.sharing();
        let report = DataReport { files, counts, packing, padding, share_prefix, first_epoch };
        Dataset { epochs, pad, report }
    }

    /// Every document once, in the order of the files.
    pub fn documents(&self) -> &[Document] {
        &self.epochs.documents
    }

    /// The batches of an epoch. Their content and order depend on the data, the options, `seed` and `epoch`, never on
    /// which epochs were asked for before.
    pub fn batches(&self, seed: u64, epoch: u64) -> Batches<'_> {
        self.epochs.batches(seed, epoch, self.pad)
    }

    /// Optimizer steps in an epoch: one for every `accumulation` batches, and one for what is left at the end.
    ///
    /// Only packing can make this differ between epochs: with fractional weights or with shared prefixes.
    pub fn steps_in_epoch(&self, seed: u64, epoch: u64, accumulation: usize) -> usize {
        self.batches(seed, epoch).total().div_ceil(accumulation.max(1))
    }

    /// Optimizer steps in a run of `epochs` epochs, at most `usize::MAX`. A part of an epoch is that part of its steps,
    /// rounded up. Where epochs differ, each is packed to be counted, but those after the first thousand count as the
    /// first.
    pub fn total_steps(&self, seed: u64, epochs: f64, accumulation: usize) -> usize {
        const COUNTED: u64 = 1000;
        let whole = epochs.floor().max(0.0) as u64;
        let steps = |epoch| self.steps_in_epoch(seed, epoch, accumulation);
        let counted = if self.epochs.are_equally_long() { 0 } else { whole.min(COUNTED) };
        let alike = match whole - counted {
            0 => 0,
            alike => steps(0).saturating_mul(usize::try_from(alike).unwrap_or(usize::MAX)),
        };
        let in_whole_epochs = (0..counted).map(steps).fold(alike, usize::saturating_add);
        let part = epochs - whole as f64;
        if part <= 0.0 {
            return in_whole_epochs;
        }
        in_whole_epochs.saturating_add((part * steps(whole) as f64).ceil() as usize)
    }
}

/// What fills up short rows. Its value has no influence on anything: padding is neither attended to nor a label.
fn padding_id(tokenizer: &Tokenizer) -> u32 {
    tokenizer.pad_id().or(tokenizer.eos_id()).unwrap_or(0)
}

/// Lines that are tokenised together: enough to keep all cores busy, few enough to move the progress bar.
const CHUNK_BYTES: usize = 1 << 20;

fn load_file(
    source: &Source,
    mut reader: LineReader,
    encoder: &Encoder<'_>,
    progress: &dyn Progress,
    documents: &mut Vec<Document>,
) -> Result<FileReport, DataError> {
    let path: Arc<Path> = Arc::from(source.path.as_path());
    let mut counts = Counts::default();
    let mut choice = None;
    let mut advanced = 0;
    loop {
        let lines = next_chunk(&mut reader)?;
        let Some(first) = lines.first() else { break };
        let choice = match choice {
            Some(choice) => choice,
            None => *choice.insert(choose_format(source, first)?),
        };
        let encoded: Vec<Result<Encoded, DataError>> = lines
            .par_iter()
            .map(|(line, bytes)| {
                let row = RowRef::new(path.clone(), *line);
                encoder.encode_line(choice, bytes, row).map_err(|error| error.at(&path, *line))
            })
            .collect();
        for encoded in encoded {
            let Encoded { document, outcome } = encoded?;
            counts.add_row(outcome, document.ids.len(), document.trained_tokens());
            if !matches!(outcome, Outcome::Dropped(_)) {
                documents.push(document);
            }
        }
        progress.advance(reader.consumed() - advanced);
        advanced = reader.consumed();
    }
    let Some(format) = choice else {
        return Err(DataError::Empty { path: source.path.clone() });
    };
    let compression = reader.compression();
    let fingerprint = reader.finish()?;
    progress.advance(fingerprint.bytes - advanced);
    Ok(FileReport {
        path: source.path.clone(),
        sha256: fingerprint.sha256,
        bytes: fingerprint.bytes,
        compression,
        format,
        weight: source.weight,
        counts,
    })
}

fn next_chunk(reader: &mut LineReader) -> Result<Vec<(usize, Vec<u8>)>, DataError> {
    let (mut lines, mut size) = (Vec::new(), 0);
    while size < CHUNK_BYTES
        && let Some((line, bytes)) = reader.next_line()?
    {
        size += bytes.len();
        lines.push((line, bytes));
    }
    Ok(lines)
}

/// The format the recipe gives, or the one the file's first row has.
pub(crate) fn choose_format(source: &Source, (line, bytes): &(usize, Vec<u8>)) -> Result<FormatChoice, DataError> {
    match source.format {
        Some(format) => Ok(FormatChoice { format, detected: false }),
        None => parse_object(bytes).and_then(|object| detect(&object)).map_err(|error| error.at(&source.path, *line)),
    }
}

fn nothing_trained(files: String, counts: &Counts, max_seq_len: usize) -> DataError {
    DataError::NothingTrained {
        files,
        rows: counts.rows,
        too_long: counts.too_long,
        untrained: counts.untrained,
        max_seq_len,
    }
}
