//! The order of one epoch: which documents take part, in which rows, in which batches.

use std::ops::Range;

use crate::batch::Batch;
use crate::order::{Stream, generator, shuffle};
use crate::packing::best_fit_decreasing;
use crate::report::Padding;
use crate::{DataError, Document};

/// How documents are laid out in batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Rows per batch; the last batch of an epoch may have fewer.
    pub batch_size: usize,
    /// Capacity of a packed row in tokens.
    pub max_seq_len: usize,
    /// Whether several documents share a row.
    pub packing: bool,
    /// Whether each epoch has an order of its own.
    pub shuffle: bool,
}

impl Layout {
    pub(crate) fn check(self) -> Result<(), DataError> {
        // A single token has no predecessor that could predict it.
        if self.max_seq_len < 2 {
            return Err(DataError::Size { name: "max_seq_len", found: self.max_seq_len, least: 2 });
        }
        if self.batch_size < 1 {
            return Err(DataError::Size { name: "batch_size", found: self.batch_size, least: 1 });
        }
        Ok(())
    }
}

/// The documents of one source and how often they take part in an epoch.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Group {
    pub documents: Range<usize>,
    pub weight: f64,
}

/// The rows of an epoch, each a list of document indices.
///
/// Shuffled: the documents are permuted, packed (ties between equally long documents follow the permutation), and the
/// rows are permuted, since packing leaves them sorted by their longest document. In order: without packing, the order
/// of the files; with it, rows by their first document in that order, and the documents of a row in that order.
pub(crate) fn plan(documents: &[Document], groups: &[Group], layout: Layout, seed: u64, epoch: u64) -> Vec<Vec<usize>> {
    let mut members: Vec<usize> = Vec::new();
    for (index, group) in groups.iter().enumerate() {
        sample(group, index, seed, epoch, &mut members);
    }
    if layout.shuffle {
        shuffle(&mut members, &mut generator(seed, Stream::Documents, epoch, 0));
    }
    if !layout.packing {
        return members.into_iter().map(|document| vec![document]).collect();
    }
    let lengths: Vec<usize> = members.iter().map(|&document| documents[document].ids.len()).collect();
    let mut rows = best_fit_decreasing(&lengths, layout.max_seq_len);
    if layout.shuffle {
        shuffle(&mut rows, &mut generator(seed, Stream::PackedRows, epoch, 0));
    } else {
        rows.iter_mut().for_each(|row| row.sort_unstable());
        rows.sort_unstable();
    }
    for place in rows.iter_mut().flatten() {
        *place = members[*place];
    }
    rows
}

/// Adds the documents of a group: as often as the whole part of its weight says, and for the rest of the weight a
/// subset that depends on the seed and the epoch. A group never vanishes from an epoch altogether.
fn sample(group: &Group, index: usize, seed: u64, epoch: u64, members: &mut Vec<usize>) {
    let Group { documents, weight } = group;
    let whole = weight.floor();
    for _ in 0..whole as usize {
        members.extend(documents.clone());
    }
    let share = (weight - whole) * documents.len() as f64;
    let least = usize::from(whole == 0.0 && !documents.is_empty());
    let count = (share.round() as usize).clamp(least, documents.len());
    if count > 0 {
        let mut chosen: Vec<usize> = documents.clone().collect();
        shuffle(&mut chosen, &mut generator(seed, Stream::Sample, epoch, index as u64));
        chosen.truncate(count);
        chosen.sort_unstable();
        members.extend(chosen);
    }
}

/// The share of padding in batches of these rows.
fn padding(documents: &[Document], rows: &[Vec<usize>], batch_size: usize) -> f64 {
    let length = |row: &Vec<usize>| row.iter().map(|&document| documents[document].ids.len()).sum::<usize>();
    let (mut tokens, mut size) = (0, 0);
    for batch in rows.chunks(batch_size) {
        tokens += batch.iter().map(length).sum::<usize>();
        size += batch.len() * batch.iter().map(length).max().unwrap_or(0);
    }
    if size == 0 { 0.0 } else { (size - tokens) as f64 / size as f64 }
}

/// What packing saves in the first epoch.
pub(crate) fn measure_padding(documents: &[Document], groups: &[Group], layout: Layout, seed: u64) -> Padding {
    let share = |packing| {
        let rows = plan(documents, groups, Layout { packing, ..layout }, seed, 0);
        padding(documents, &rows, layout.batch_size)
    };
    Padding { unpacked: share(false), packed: share(true) }
}

/// The batches of one epoch, laid out one at a time.
///
/// Skipping is free: `nth`, `skip` and [`Batches::get`] lay out nothing that is not asked for.
#[derive(Clone, Debug)]
pub struct Batches<'a> {
    documents: &'a [Document],
    rows: Vec<Vec<usize>>,
    batch_size: usize,
    pad: u32,
    next: usize,
}

impl<'a> Batches<'a> {
    pub(crate) fn new(documents: &'a [Document], rows: Vec<Vec<usize>>, batch_size: usize, pad: u32) -> Self {
        Batches { documents, rows, batch_size, pad, next: 0 }
    }

    /// Number of batches in the epoch, whatever was already taken.
    pub fn total(&self) -> usize {
        self.rows.len().div_ceil(self.batch_size)
    }

    /// Batch `index` of the epoch, whatever was already taken.
    pub fn get(&self, index: usize) -> Option<Batch> {
        let begin = index.checked_mul(self.batch_size)?;
        let end = self.rows.len().min(begin.checked_add(self.batch_size)?);
        let rows = self.rows.get(begin..end).filter(|rows| !rows.is_empty())?;
        let rows: Vec<Vec<&Document>> =
            rows.iter().map(|row| row.iter().map(|&document| &self.documents[document]).collect()).collect();
        Some(Batch::new(&rows, self.pad))
    }
}

impl Iterator for Batches<'_> {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        self.nth(0)
    }

    fn nth(&mut self, skipped: usize) -> Option<Batch> {
        let index = self.next.saturating_add(skipped);
        let batch = self.get(index);
        self.next = if batch.is_some() { index + 1 } else { self.total() };
        batch
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.total() - self.next;
        (left, Some(left))
    }
}

impl ExactSizeIterator for Batches<'_> {}
