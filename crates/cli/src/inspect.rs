//! `emberlora inspect`: what will be trained, token by token.

use std::io::{self, Write};
use std::ops::Range;
use std::sync::Arc;

use anstyle::{AnsiColor, Style};
use emberlora_config::RunConfig;
use emberlora_data::{Batch, DataOptions, Segment, Tokenizer};
use emberlora_train::Base;

use crate::args::InspectArgs;
use crate::config;
use crate::terminal::Terminal;

/// Rows that are shown to a person who did not say how many.
const SHOWN: usize = 4;

const TRAINED: Style = AnsiColor::Green.on_default().bold();
const MARK: Style = Style::new().dimmed();
const HEADING: Style = Style::new().bold();

/// Runs `emberlora inspect`.
pub(crate) fn run(args: &InspectArgs, terminal: &Terminal, out: &mut dyn Write) -> anyhow::Result<()> {
    let config = config::load(&args.recipe)?;
    let base = Base::resolve(&config, terminal)?;
    match args.json {
        true => lines(args, &config, &base.tokenizer, out),
        false => show(args, &config, &base, terminal, out),
    }
}

/// The rows of the data in the order of the files, a line each.
fn lines(args: &InspectArgs, config: &RunConfig, tokenizer: &Tokenizer, out: &mut dyn Write) -> anyhow::Result<()> {
    let rows = emberlora_data::inspect(DataOptions::train(config), tokenizer)?;
    for row in rows.take(args.rows.unwrap_or(usize::MAX)) {
        writeln!(out, "{}", serde_json::to_string(&row?)?)?;
    }
    Ok(())
}

/// The rows of the first batches, as the first epoch brings them.
fn show(
    args: &InspectArgs,
    config: &RunConfig,
    base: &Base,
    terminal: &Terminal,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let dataset = base.dataset(DataOptions::train(config), terminal, "train")?;
    writeln!(out, "{}", dataset.report)?;
    let wanted = args.rows.unwrap_or(SHOWN);
    let mut number = 0;
    for batch in dataset.batches(config.seed, 0) {
        for row in rows(&batch) {
            if number == wanted {
                return Ok(());
            }
            number += 1;
            show_row(number, &row, &base.tokenizer, out)?;
        }
    }
    Ok(())
}

/// A row of a batch, taken apart again.
struct Row<'a> {
    batch: &'a Batch,
    segments: Vec<Segment>,
    /// For each token of the batch, how many documents it is a label of.
    labels: Arc<[u32]>,
}

fn rows(batch: &Batch) -> Vec<Row<'_>> {
    let labels: Arc<[u32]> = batch.label_weights().into();
    let mut segments = batch.segments().into_iter().peekable();
    let row = |row| {
        let end = (row + 1) * batch.seq;
        let segments = std::iter::from_fn(|| segments.next_if(|segment| segment.tokens.start < end)).collect();
        Row { batch, segments, labels: labels.clone() }
    };
    (0..batch.rows).map(row).collect()
}

impl Row<'_> {
    /// The documents of the row, as indices into those of the batch.
    fn documents(&self) -> Range<usize> {
        let ends = |segment: &Segment| segment.complete.end;
        let first = self.segments.first().map_or(0, |segment| segment.documents.start);
        first..self.segments.last().map_or(first, ends)
    }

    /// Tokens given, computed and trained.
    fn tokens(&self) -> [usize; 3] {
        let sum = |count: &dyn Fn(&Segment) -> usize| self.segments.iter().map(count).sum();
        [
            sum(&|segment| segment.tokens.len() * segment.documents.len()),
            sum(&|segment| segment.tokens.len()),
            sum(&|segment| self.labels[segment.tokens.clone()].iter().sum::<u32>() as usize),
        ]
    }

    /// The tokens of a segment and whether each is trained, and the tokens before it in its documents.
    fn text(&self, segment: &Segment) -> (Vec<(u32, bool)>, Vec<u32>) {
        let Batch { seq, ids, ends, .. } = self.batch;
        let tokens = segment.tokens.clone().map(|token| (ids[token], self.labels[token] > 0)).collect();
        let first = segment.tokens.start;
        let row = first - first % seq;
        let before = (row..first).filter(|&token| first - row < ends[token] as usize).map(|token| ids[token]).collect();
        (tokens, before)
    }

    /// Whose tokens these are.
    fn owners(&self, segment: &Segment) -> String {
        let complete = &segment.complete;
        let numbers = complete.clone().map(|document| (document - self.documents().start + 1).to_string());
        let sources = complete.clone().map(|document| self.batch.documents[document].to_string());
        let named = match complete.len() {
            1 => format!("document {}", listed(numbers)),
            _ => format!("documents {}", listed(numbers)),
        };
        match segment.documents.len() {
            count if complete.is_empty() => format!("shared by {count} documents"),
            count if count > complete.len() => {
                format!("shared by {count} documents, all of {named}, {}", listed(sources))
            }
            _ => format!("{named}, {}", listed(sources)),
        }
    }
}

/// The first few of `items`, and how many there are beside them.
fn listed(items: impl ExactSizeIterator<Item = String>) -> String {
    const LISTED: usize = 3;
    let more = items.len().saturating_sub(LISTED);
    let listed = items.take(LISTED).collect::<Vec<_>>().join(", ");
    if more == 0 { listed } else { format!("{listed} and {more} more") }
}

fn show_row(number: usize, row: &Row<'_>, tokenizer: &Tokenizer, out: &mut dyn Write) -> anyhow::Result<()> {
    let [given, computed, trained] = row.tokens();
    let documents = match row.documents().len() {
        1 => "1 document".to_owned(),
        count => format!("{count} documents"),
    };
    let padding = row.batch.seq - computed;
    let shared = if computed < given { format!(", {computed} computed") } else { String::new() };
    writeln!(
        out,
        "\n{HEADING}row {number}: {documents}, {given} tokens{shared}, {trained} trained, {padding} padding{HEADING:#}"
    )?;
    for segment in &row.segments {
        let (tokens, before) = row.text(segment);
        let rule = "──".repeat(segment.level + 1);
        let trained = tokens.iter().filter(|&&(_, trained)| trained).count();
        let after = if before.is_empty() { String::new() } else { format!(" after {} shared", before.len()) };
        let (owners, count) = (row.owners(segment), tokens.len());
        let unit = if count == 1 { "token" } else { "tokens" };
        writeln!(out, "{MARK}{rule} {owners}: {count} {unit}{after}, {trained} trained ──{MARK:#}")?;
        show_tokens(&tokens, &before, tokenizer, out)?;
    }
    Ok(())
}

/// Writes tokens with `│` between them, those that are trained in colour and between `⟦` and `⟧`. The tokens of
/// `context` come before them and are not written.
fn show_tokens(
    tokens: &[(u32, bool)],
    context: &[u32],
    tokenizer: &Tokenizer,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let mut stream = tokenizer.decode_stream(false);
    for &id in context {
        stream.step(id)?;
    }
    let (mut before, mut open_line) = (None, false);
    for &(id, trained) in tokens {
        // A character of several tokens stands with its last one.
        let piece = printable(&stream.step(id)?.unwrap_or_default()).replace('\n', "↵\n");
        let border = match (before, trained) {
            (Some(true), false) => "⟧",
            (Some(false) | None, true) => "⟦",
            (Some(_), _) => "│",
            (None, false) => "",
        };
        styled(border, MARK, out)?;
        show_piece(&piece, trained, out)?;
        (before, open_line) = (Some(trained), !piece.ends_with('\n'));
    }
    if let Some(rest) = stream.finish()? {
        show_piece(&printable(&rest), before == Some(true), out)?;
    }
    if before == Some(true) {
        styled("⟧", MARK, out)?;
    }
    if open_line || before == Some(true) {
        writeln!(out)?;
    }
    Ok(())
}

fn show_piece(piece: &str, trained: bool, out: &mut dyn Write) -> io::Result<()> {
    styled(piece, if trained { TRAINED } else { Style::new() }, out)
}

fn styled(text: &str, style: Style, out: &mut dyn Write) -> io::Result<()> {
    match text {
        "" => Ok(()),
        _ => write!(out, "{style}{text}{style:#}"),
    }
}

/// The text with its control characters escaped, line breaks and tabs excepted: data must not steer the terminal.
pub(crate) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' | '\t' => shown.push(character),
            _ if character.is_control() => shown.extend(character.escape_default()),
            _ => shown.push(character),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use emberlora_data::{Document, RowRef};

    use super::*;

    fn document(line: usize, ids: &[u32], trained: &[bool]) -> Document {
        Document::new(ids.to_vec(), trained.to_vec(), RowRef::new(Path::new("a").into(), line), None)
    }

    #[test]
    fn a_batch_comes_apart_as_it_was_put_together() {
        let [one, two, three] = [
            document(1, &[10, 11, 12], &[false, true, true]),
            document(2, &[20, 21, 22], &[true, false, true]),
            document(3, &[30, 31], &[false, true]),
        ];
        let batch = Batch::new(&[vec![&one, &two], vec![&three]], 99);
        let rows = rows(&batch);
        assert_eq!([rows[0].documents(), rows[1].documents()], [0..2, 2..3]);
        // The first token of a document has no predecessor, so it is no label whatever its row says.
        assert_eq!([rows[0].tokens(), rows[1].tokens()], [[6, 6, 3], [2, 2, 1]]);
        let [_, second] = &rows[0].segments[..] else { panic!("{:?}", rows[0].segments) };
        assert_eq!(rows[0].text(second), (vec![(20, false), (21, false), (22, true)], vec![]));
        assert_eq!(rows[0].owners(second), "document 2, a:2");
    }

    #[test]
    fn what_documents_share_is_there_once_and_says_whose_it_is() {
        let documents = [
            document(1, &[1, 2, 3], &[false, true, true]),
            document(2, &[1, 2, 4, 5], &[false, true, false, true]),
            document(3, &[1, 2], &[false, true]),
            document(4, &[1, 2, 4, 5], &[false, false, false, true]),
        ];
        let batch = Batch::shared(&[documents.iter().collect()], 99);
        let rows = rows(&batch);
        assert_eq!(rows[0].tokens(), [13, 5, 6]);
        let owners: Vec<String> = rows[0].segments.iter().map(|segment| rows[0].owners(segment)).collect();
        assert_eq!(
            owners,
            ["shared by 4 documents, all of document 1, a:3", "document 2, a:1", "documents 3, 4, a:2, a:4"]
        );
        assert_eq!(rows[0].text(&rows[0].segments[2]), (vec![(4, false), (5, true)], vec![1, 2]));
    }

    #[test]
    fn long_lists_are_cut_short() {
        let list = |count: usize| listed((1..=count).map(|number| number.to_string()).collect::<Vec<_>>().into_iter());
        assert_eq!([list(1), list(3), list(5)], ["1", "1, 2, 3", "1, 2, 3 and 2 more"]);
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable("a\x1b[31m\r\nb\tc\u{9b}"), "a\\u{1b}[31m\\r\nb\tc\\u{9b}");
    }
}
