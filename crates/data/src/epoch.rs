//! The order of one epoch: which documents take part, in which rows, in which batches.

use std::ops::Range;

use crate::batch::Batch;
use crate::order::{Stream, generator, shuffle};
use crate::packing::{PrefixTree, best_fit_decreasing, common_prefix, pack_shared};
use crate::report::{EpochTokens, Padding};
use crate::{DataError, Document, PrefixSharing};

/// How documents are laid out in batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Rows per batch; the last batch of an epoch may have fewer.
    pub batch_size: usize,
    /// Capacity of a packed row in computed tokens.
    pub max_seq_len: usize,
    /// Whether several documents share a row.
    pub packing: bool,
    /// Whether the documents of a packed row share the tokens that they begin with.
    pub share_prefix: PrefixSharing,
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

    /// Whether prefixes are shared, given that a row of one document has nothing to share.
    pub fn sharing(self) -> PrefixSharing {
        match self.share_prefix {
            PrefixSharing::On if !self.packing => PrefixSharing::PackingOff,
            sharing => sharing,
        }
    }
}

/// The documents of one source and how often they take part in an epoch.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Group {
    pub documents: Range<usize>,
    pub weight: f64,
}

/// Everything that the epochs of a run are made of.
#[derive(Clone, Debug)]
pub(crate) struct Epochs {
    pub documents: Vec<Document>,
    groups: Vec<Group>,
    pub layout: Layout,
    /// Where prefixes are shared.
    prefixes: Option<PrefixTree>,
}

impl Epochs {
    pub(crate) fn new(documents: Vec<Document>, groups: Vec<Group>, layout: Layout) -> Self {
        let prefixes = layout.sharing().is_on().then(|| PrefixTree::new(&documents));
        Epochs { documents, groups, layout, prefixes }
    }

    /// The batches of an epoch, with `pad` in short rows.
    pub(crate) fn batches(&self, seed: u64, epoch: u64, pad: u32) -> Batches<'_> {
        Batches { epochs: self, rows: self.rows(self.layout.packing, seed, epoch), pad, next: 0 }
    }

    /// Whether every epoch has the same number of rows, whatever the seed.
    pub(crate) fn are_equally_long(&self) -> bool {
        // A share of the rows has the same size in every epoch, but not the same lengths to pack. With shared prefixes,
        // what a document adds to a row depends on the documents before it, whose order is the epoch's.
        !self.layout.packing || self.prefixes.is_none() && self.groups.iter().all(|group| group.weight.fract() == 0.0)
    }

    /// The rows of an epoch, each a list of document indices.
    ///
    /// Shuffled: the documents are permuted, packed (ties between equally long documents follow the permutation), and the
    /// rows are permuted, since packing leaves them sorted by their longest document. In order: without packing, the order
    /// of the files; with it, rows by their first document in that order, and the documents of a row in that order, unless
    /// they share prefixes, which only neighbours can.
    fn rows(&self, packing: bool, seed: u64, epoch: u64) -> Vec<Vec<usize>> {
        let mut members: Vec<usize> = Vec::new();
        for (index, group) in self.groups.iter().enumerate() {
            sample(group, index, seed, epoch, &mut members);
        }
        if self.layout.shuffle {
            shuffle(&mut members, &mut generator(seed, Stream::Documents, epoch, 0));
        }
        if !packing {
            return members.into_iter().map(|document| vec![document]).collect();
        }
        let mut rows = self.pack(&members);
        if self.layout.shuffle {
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

    fn pack(&self, members: &[usize]) -> Vec<Vec<usize>> {
        match &self.prefixes {
            Some(prefixes) => pack_shared(&self.documents, prefixes, members, self.layout.max_seq_len),
            None => {
                let lengths: Vec<usize> = members.iter().map(|&document| self.documents[document].ids.len()).collect();
                best_fit_decreasing(&lengths, self.layout.max_seq_len)
            }
        }
    }

    /// What packing saves in the first epoch.
    pub(crate) fn measure(&self, seed: u64) -> (Padding, EpochTokens) {
        let unpacked = self.rows(false, seed, 0);
        let packed = self.rows(true, seed, 0);
        let padding = Padding { unpacked: self.padding(&unpacked), packed: self.padding(&packed) };
        (padding, self.tokens(if self.layout.packing { &packed } else { &unpacked }))
    }

    /// The share of padding in batches of these rows.
    fn padding(&self, rows: &[Vec<usize>]) -> f64 {
        let (mut tokens, mut size) = (0, 0);
        for batch in rows.chunks(self.layout.batch_size) {
            let lengths: Vec<usize> = batch.iter().map(|row| self.computed(row)).collect();
            tokens += lengths.iter().sum::<usize>();
            size += lengths.len() * lengths.iter().max().unwrap_or(&0);
        }
        if size == 0 { 0.0 } else { (size - tokens) as f64 / size as f64 }
    }

    fn tokens(&self, rows: &[Vec<usize>]) -> EpochTokens {
        let documents = || rows.iter().flatten().map(|&document| &self.documents[document]);
        EpochTokens {
            given: documents().map(|document| document.ids.len()).sum(),
            computed: rows.iter().map(|row| self.computed(row)).sum(),
            trained: documents().map(Document::trained_tokens).sum(),
        }
    }

    /// Tokens of a row that are not padding.
    fn computed(&self, row: &[usize]) -> usize {
        let ids = |document: usize| &self.documents[document].ids[..];
        let Some(prefixes) = &self.prefixes else {
            return row.iter().map(|&document| ids(document).len()).sum();
        };
        let mut row = row.to_vec();
        row.sort_unstable_by_key(|&document| prefixes.rank(document));
        let first = row.first().map_or(0, |&document| ids(document).len());
        let added = |pair: &[usize]| ids(pair[1]).len() - common_prefix(ids(pair[0]), ids(pair[1]));
        first + row.windows(2).map(added).sum::<usize>()
    }

    fn batch(&self, rows: &[Vec<usize>], pad: u32) -> Batch {
        let rows: Vec<Vec<&Document>> =
            rows.iter().map(|row| row.iter().map(|&document| &self.documents[document]).collect()).collect();
        match self.prefixes {
            Some(_) => Batch::shared(&rows, pad),
            None => Batch::new(&rows, pad),
        }
    }
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

/// The batches of one epoch, laid out one at a time.
///
/// Skipping is free: `nth`, `skip` and [`Batches::get`] lay out nothing that is not asked for.
#[derive(Clone, Debug)]
pub struct Batches<'a> {
    epochs: &'a Epochs,
    rows: Vec<Vec<usize>>,
    pad: u32,
    next: usize,
}

impl Batches<'_> {
    /// Number of batches in the epoch, whatever was already taken.
    pub fn total(&self) -> usize {
        self.rows.len().div_ceil(self.epochs.layout.batch_size)
    }

    /// The tokens of the epoch, whatever was already taken.
    pub fn tokens(&self) -> EpochTokens {
        self.epochs.tokens(&self.rows)
    }

    /// Batch `index` of the epoch, whatever was already taken.
    pub fn get(&self, index: usize) -> Option<Batch> {
        let batch_size = self.epochs.layout.batch_size;
        let begin = index.checked_mul(batch_size)?;
        let end = self.rows.len().min(begin.checked_add(batch_size)?);
        let rows = self.rows.get(begin..end).filter(|rows| !rows.is_empty())?;
        Some(self.epochs.batch(rows, self.pad))
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
