//! `emberlora inspect`: what will be trained, token by token.

use std::io::{self, Write};
use std::ops::Range;

use anstyle::{AnsiColor, Style};
use emberlora_config::RunConfig;
use emberlora_data::{Batch, DataOptions, RowRef, Tokenizer};
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
        let mut sources = batch.documents.iter();
        for row in 0..batch.rows {
            if number == wanted {
                return Ok(());
            }
            number += 1;
            show_row(number, &Row::of(&batch, row, &mut sources), &base.tokenizer, out)?;
        }
    }
    Ok(())
}

/// A row of a batch, taken apart again.
struct Row<'a> {
    ids: &'a [u32],
    /// Whether a token is a label.
    trained: Vec<bool>,
    documents: Vec<(Range<usize>, Option<&'a RowRef>)>,
}

impl<'a> Row<'a> {
    /// Row `row` of `batch`; `sources` stands at its first document.
    fn of(batch: &'a Batch, row: usize, sources: &mut impl Iterator<Item = &'a RowRef>) -> Self {
        let columns = row * batch.seq..(row + 1) * batch.seq;
        let mut trained = vec![false; batch.seq];
        for target in &batch.targets {
            // The hidden state at a position predicts the token after it.
            let labelled = target.position as usize + 1;
            if columns.contains(&labelled) {
                trained[labelled - columns.start] = true;
            }
        }
        let documents = documents(&batch.ends[columns.clone()]);
        let documents = documents.into_iter().map(|columns| (columns, sources.next())).collect();
        Self { ids: &batch.ids[columns], trained, documents }
    }
}

/// The columns of each document of a row. A padding token may attend to itself alone, and no document is one token long.
fn documents(ends: &[u32]) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut begin = 0;
    while begin < ends.len() {
        let end = ends[begin] as usize;
        if end - begin > 1 {
            found.push(begin..end);
        }
        begin = end;
    }
    found
}

fn show_row(number: usize, row: &Row<'_>, tokenizer: &Tokenizer, out: &mut dyn Write) -> anyhow::Result<()> {
    let tokens: usize = row.documents.iter().map(|(columns, _)| columns.len()).sum();
    let trained = row.trained.iter().filter(|&&trained| trained).count();
    let padding = row.ids.len() - tokens;
    writeln!(out, "\n{HEADING}row {number}: {tokens} tokens, {trained} trained, {padding} padding{HEADING:#}")?;
    for (index, (columns, source)) in row.documents.iter().enumerate() {
        let source = source.map_or(String::new(), |source| format!(", {source}"));
        let trained = row.trained[columns.clone()].iter().filter(|&&trained| trained).count();
        let count = columns.len();
        writeln!(out, "{MARK}── document {}{source}: {count} tokens, {trained} trained ──{MARK:#}", index + 1)?;
        show_tokens(&row.ids[columns.clone()], &row.trained[columns.clone()], tokenizer, out)?;
    }
    Ok(())
}

/// Writes tokens with `│` between them, those that are trained in colour and between `⟦` and `⟧`.
fn show_tokens(ids: &[u32], trained: &[bool], tokenizer: &Tokenizer, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut stream = tokenizer.decode_stream(false);
    let (mut before, mut open_line) = (None, false);
    for (&id, &trained) in ids.iter().zip(trained) {
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

    use emberlora_data::Document;

    use super::*;

    #[test]
    fn padding_is_no_document() {
        assert_eq!(documents(&[3, 3, 3, 5, 5, 6, 7, 8]), [0..3, 3..5]);
        assert_eq!(documents(&[2, 2]), vec![0..2]);
        assert!(documents(&[1, 2, 3]).is_empty());
        assert!(documents(&[]).is_empty());
    }

    #[test]
    fn a_batch_comes_apart_as_it_was_put_together() {
        let document = |line, trained: &[bool]| {
            let ids = (0..trained.len() as u32).map(|id| 10 * line as u32 + id).collect();
            Document::new(ids, trained.to_vec(), RowRef::new(Path::new("a").into(), line), None)
        };
        let [one, two, three] =
            [document(1, &[false, true, true]), document(2, &[true, false, true]), document(3, &[false, true])];
        let batch = Batch::new(&[vec![&one, &two], vec![&three]], 99);
        let mut sources = batch.documents.iter();
        let rows: Vec<Row<'_>> = (0..2).map(|row| Row::of(&batch, row, &mut sources)).collect();

        let lines = |row: &Row<'_>| -> Vec<_> {
            row.documents.iter().map(|(columns, source)| (columns.clone(), source.unwrap().line)).collect()
        };
        assert_eq!(lines(&rows[0]), [(0..3, 1), (3..6, 2)]);
        // The first token of a document has no predecessor, so it is no label whatever its row says.
        assert_eq!(rows[0].trained, [false, true, true, false, false, true]);
        assert_eq!(lines(&rows[1]), [(0..2, 3)]);
        assert_eq!(rows[1].trained, [false, true, false, false, false, false]);
        assert_eq!(rows[1].ids, [30, 31, 99, 99, 99, 99]);
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable("a\x1b[31m\r\nb\tc\u{9b}"), "a\\u{1b}[31m\\r\nb\tc\\u{9b}");
    }
}
