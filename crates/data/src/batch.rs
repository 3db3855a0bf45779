//! What the trainer sees: rectangular blocks of tokens and the labels that count.

use crate::packing::common_prefix;
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
    /// Flat index of the last token of each of `documents`; the tokens that it may attend to are the whole document.
    pub last_tokens: Vec<u32>,
}

impl Batch {
    /// Lays out documents, row by row, one after the other, and fills up short rows with `pad`. Documents without tokens
    /// are left out.
    pub fn new(rows: &[Vec<&Document>], pad: u32) -> Self {
        Self::assemble(rows.iter().map(|row| RowLayout::new(row)).collect(), pad)
    }

    /// As [`Batch::new`], but each row becomes a forest in which its documents share the tokens that they begin with. The
    /// documents of a row are in the order of their tokens, and every prefix is there once.
    pub fn shared(rows: &[Vec<&Document>], pad: u32) -> Self {
        Self::assemble(rows.iter().map(|row| RowLayout::shared(row)).collect(), pad)
    }

    fn assemble(rows: Vec<RowLayout<'_>>, pad: u32) -> Self {
        let seq = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        let size = rows.len() * seq;
        let mut batch = Batch {
            rows: rows.len(),
            seq,
            ids: Vec::with_capacity(size),
            positions: Vec::with_capacity(size),
            ends: Vec::with_capacity(size),
            targets: Vec::new(),
            tokens: 0,
            computed: 0,
            documents: Vec::new(),
            last_tokens: Vec::new(),
        };
        for row in rows {
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

    fn push_row(&mut self, row: RowLayout<'_>, pad: u32) {
        let begin = self.ids.len() as u32;
        let filled = row.ids.len();
        let missing = self.seq - filled;
        self.targets.extend(row.targets().map(|target| Target { position: begin + target.position, ..target }));
        for (document, last) in row.documents {
            self.tokens += document.ids.len();
            self.documents.push(document.source.clone());
            self.last_tokens.push(begin + last);
        }
        self.computed += filled;
        self.ids.extend(row.ids);
        self.ids.extend(std::iter::repeat_n(pad, missing));
        self.positions.extend(row.positions);
        self.positions.extend(0..missing as u32);
        self.ends.extend(row.ends);
        self.ends.extend((filled..self.seq).map(|column| column as u32 + 1));
    }
}

/// The documents of a row, before it is known how much padding follows.
#[derive(Default)]
struct RowLayout<'a> {
    ids: Vec<u32>,
    positions: Vec<u32>,
    ends: Vec<u32>,
    /// Each document with the column of its last token.
    documents: Vec<(&'a Document, u32)>,
    /// Column and token of each label of each document.
    labels: Vec<(u32, u32)>,
    /// The columns of the document that was laid out last.
    path: Vec<u32>,
}

impl<'a> RowLayout<'a> {
    fn new(documents: &[&'a Document]) -> Self {
        let mut row = Self::default();
        for document in documents {
            row.push(document, 0);
        }
        row.finish()
    }

    fn shared(documents: &[&'a Document]) -> Self {
        let mut row = Self::default();
        // In this order, the documents that begin with a prefix are neighbours: what a document has in common with the
        // one before it is all that it has in common with any one before it.
        let mut documents = documents.to_vec();
        documents.sort_by(|a, b| a.ids.cmp(&b.ids));
        let mut before: &[u32] = &[];
        for document in documents {
            row.push(document, common_prefix(before, &document.ids));
            before = &document.ids;
        }
        row.finish()
    }

    /// Lays out a document that goes on from the first `shared` tokens of the one before it.
    fn push(&mut self, document: &'a Document, shared: usize) {
        self.leave(shared);
        for (position, &id) in document.ids.iter().enumerate().skip(shared) {
            self.path.push(self.ids.len() as u32);
            self.ids.push(id);
            self.positions.push(position as u32);
            // Known when the last document that goes on from here has been laid out.
            self.ends.push(0);
        }
        if let Some(&last) = self.path.last() {
            self.documents.push((document, last));
        }
        // From 1: nothing in this document precedes its first token.
        let trained = (1..document.ids.len()).filter(|&i| document.trained[i]);
        self.labels.extend(trained.map(|i| (self.path[i - 1], document.ids[i])));
    }

    /// No document to come goes on from the current path beyond its first `kept` tokens.
    fn leave(&mut self, kept: usize) {
        let end = self.ids.len() as u32;
        for column in self.path.drain(kept..) {
            self.ends[column as usize] = end;
        }
    }

    fn finish(mut self) -> Self {
        self.leave(0);
        self.labels.sort_unstable();
        self
    }

    fn targets(&self) -> impl Iterator<Item = Target> {
        self.labels.chunk_by(|a, b| a == b).map(|equal| {
            let (position, token) = equal[0];
            Target { position, token, weight: equal.len() as u32 }
        })
    }
}
