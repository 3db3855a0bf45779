//! What the trainer sees: rectangular blocks of tokens and the labels that count.

use crate::{Document, RowRef};

/// One label: the hidden state at `position` has to predict `token`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// Flat index `row * seq + column` of the hidden state that predicts.
    pub position: u32,
    /// The token that follows it in the same document.
    pub token: u32,
}

/// A block of `rows × seq` tokens, row-major, holding one or more whole documents per row.
///
/// The targets are the only labels. A token is a target only if its predecessor belongs to the same document, so the
/// first token of a document is never predicted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns: the length of the longest row, so that no column is padding alone.
    pub seq: usize,
    /// Token ids, `rows * seq`, filled up with the padding id.
    pub ids: Vec<u32>,
    /// Position of each token within its document; padding counts from 0 as a document of its own.
    pub positions: Vec<u32>,
    /// For each token the column of the first token it may attend to: the first of its document. A padding token may
    /// attend only to itself, which keeps its row of attention weights finite.
    pub starts: Vec<u32>,
    /// The labels, in the order of their position.
    pub targets: Vec<Target>,
    /// Tokens that are not padding.
    pub tokens: usize,
    /// Where the documents come from, row by row.
    pub documents: Vec<RowRef>,
}

impl Batch {
    /// Lays out documents, row by row, and fills up short rows with `pad`.
    pub fn new(rows: &[Vec<&Document>], pad: u32) -> Self {
        let length = |row: &Vec<&Document>| row.iter().map(|document| document.ids.len()).sum::<usize>();
        let seq = rows.iter().map(length).max().unwrap_or(0);
        let size = rows.len() * seq;
        let mut batch = Batch {
            rows: rows.len(),
            seq,
            ids: Vec::with_capacity(size),
            positions: Vec::with_capacity(size),
            starts: Vec::with_capacity(size),
            targets: Vec::new(),
            tokens: 0,
            documents: Vec::new(),
        };
        for row in rows {
            let begin = batch.ids.len();
            for document in row {
                batch.push_document(document, begin);
            }
            batch.pad_row(begin, pad);
        }
        batch
    }

    /// The share of this batch that is padding, from 0 to 1.
    pub fn padding(&self) -> f64 {
        match self.ids.len() {
            0 => 0.0,
            size => (size - self.tokens) as f64 / size as f64,
        }
    }

    fn push_document(&mut self, document: &Document, row_begin: usize) {
        let first = self.ids.len();
        let length = document.ids.len();
        self.ids.extend_from_slice(&document.ids);
        self.positions.extend(0..length as u32);
        self.starts.extend(std::iter::repeat_n((first - row_begin) as u32, length));
        // From 1: nothing in this document precedes its first token.
        self.targets.extend(
            (1..length)
                .filter(|&i| document.trained[i])
                .map(|i| Target { position: (first + i - 1) as u32, token: document.ids[i] }),
        );
        self.tokens += length;
        self.documents.push(document.source.clone());
    }

    fn pad_row(&mut self, row_begin: usize, pad: u32) {
        let filled = self.ids.len() - row_begin;
        let missing = self.seq - filled;
        self.ids.extend(std::iter::repeat_n(pad, missing));
        self.positions.extend(0..missing as u32);
        self.starts.extend(filled as u32..self.seq as u32);
    }
}
