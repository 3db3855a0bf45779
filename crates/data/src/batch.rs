//! What the trainer sees: rectangular blocks of tokens and the labels that count.

use crate::{Document, RowRef};

/// One label: the hidden state at `position` has to predict `token`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// Flat index `row * seq + column` of the hidden state that predicts.
    pub position: u32,
    /// The token that follows it in a document.
    pub token: u32,
    /// How many documents have this label here: 1 where no prefix is shared. The loss counts it as often.
    pub weight: u32,
}

/// A block of `rows × seq` tokens, row-major, holding one or more whole documents per row.
///
/// A row is a forest: documents may share the tokens that they begin with, and a shared token is there once. The trees
/// lie in depth-first order, so that the tokens that continue a token, on any path, directly follow it: they are its
/// columns up to [`ends`](Batch::ends). Token `i` may attend to token `j` of its row if and only if
/// `j <= i < ends[j]`, that is, if `j` is `i` or stands before it in a document.
///
/// The targets are the only labels. A token is a target only at its predecessor in the same document, so the first token
/// of a document is never predicted; where several documents go on from a shared token, each has its target there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns: the length of the longest row, so that no column is padding alone.
    pub seq: usize,
    /// Token ids, `rows * seq`, filled up with the padding id.
    pub ids: Vec<u32>,
    /// Position of each token within its documents; padding counts from 0 as a document of its own.
    pub positions: Vec<u32>,
    /// For each token the column after the last one that may attend to it. Only a padding token attends to itself, which
    /// keeps its row of attention weights finite.
    pub ends: Vec<u32>,
    /// The labels, in the order of their position, then of their token; no two are equal in both.
    pub targets: Vec<Target>,
    /// Tokens given: the lengths of the documents together.
    pub tokens: usize,
    /// Tokens computed: those that are not padding. At most `tokens`, and as many where no prefix is shared.
    pub computed: usize,
    /// Where the documents come from, row by row.
    pub documents: Vec<RowRef>,
}

impl Batch {
    /// Lays out documents, row by row, one after the other, and fills up short rows with `pad`.
    pub fn new(rows: &[Vec<&Document>], pad: u32) -> Self {
        let layouts: Vec<RowLayout> = rows.iter().map(|row| RowLayout::new(row)).collect();
        let seq = layouts.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        let size = rows.len() * seq;
        let mut batch = Batch {
            rows: rows.len(),
            seq,
            ids: Vec::with_capacity(size),
            positions: Vec::with_capacity(size),
            ends: Vec::with_capacity(size),
            targets: Vec::new(),
            tokens: rows.iter().flatten().map(|document| document.ids.len()).sum(),
            computed: layouts.iter().map(|row| row.ids.len()).sum(),
            documents: rows.iter().flatten().map(|document| document.source.clone()).collect(),
        };
        for row in layouts {
            batch.push_row(row, pad);
        }
        batch
    }

    /// Labels, each as often as documents have it.
    pub fn trained_tokens(&self) -> usize {
        self.targets.iter().map(|target| target.weight as usize).sum()
    }

    /// The share of this batch that is padding, from 0 to 1.
    pub fn padding(&self) -> f64 {
        match self.ids.len() {
            0 => 0.0,
            size => (size - self.computed) as f64 / size as f64,
        }
    }

    fn push_row(&mut self, row: RowLayout, pad: u32) {
        let begin = self.ids.len() as u32;
        let filled = row.ids.len();
        let missing = self.seq - filled;
        self.targets.extend(row.targets().map(|target| Target { position: begin + target.position, ..target }));
        self.ids.extend(row.ids);
        self.ids.extend(std::iter::repeat_n(pad, missing));
        self.positions.extend(row.positions);
        self.positions.extend(0..missing as u32);
        self.ends.extend(row.ends);
        self.ends.extend((filled..self.seq).map(|column| column as u32 + 1));
    }
}

/// The documents of a row, before it is known how much padding follows.
struct RowLayout {
    ids: Vec<u32>,
    positions: Vec<u32>,
    ends: Vec<u32>,
    /// Column and token of each label of each document.
    labels: Vec<(u32, u32)>,
}

impl RowLayout {
    fn new(documents: &[&Document]) -> Self {
        let mut row = RowLayout { ids: Vec::new(), positions: Vec::new(), ends: Vec::new(), labels: Vec::new() };
        for document in documents {
            row.push(document);
        }
        row.labels.sort_unstable();
        row
    }

    fn push(&mut self, document: &Document) {
        let first = self.ids.len() as u32;
        let length = document.ids.len() as u32;
        self.ids.extend_from_slice(&document.ids);
        self.positions.extend(0..length);
        self.ends.extend(std::iter::repeat_n(first + length, length as usize));
        // From 1: nothing in this document precedes its first token.
        let trained = (1..document.ids.len()).filter(|&i| document.trained[i]);
        self.labels.extend(trained.map(|i| (first + i as u32 - 1, document.ids[i])));
    }

    fn targets(&self) -> impl Iterator<Item = Target> {
        self.labels.chunk_by(|a, b| a == b).map(|equal| {
            let (position, token) = equal[0];
            Target { position, token, weight: equal.len() as u32 }
        })
    }
}
