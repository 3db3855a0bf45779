//! What a forward pass reads: token ids, positions, and which tokens see which.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::rope::Rope;

/// A rectangle of tokens, possibly with several documents packed into a row, which may share what they begin with.
#[derive(Clone, Debug)]
pub struct Input {
    pub(crate) ids: Tensor<2, Int>,
    /// `[rows, cached + seq, 2]`: the end and the position of every token that is there.
    pub(crate) spans: Tensor<3, Int>,
    /// Cosines and sines for the positions, where they have been made.
    pub(crate) tables: Option<[Tensor<3>; 2]>,
    pub(crate) host: HostInput,
}

/// The same on the host: the tables of the rotary embedding are made from it without reading the device.
#[derive(Clone, Debug)]
pub(crate) struct HostInput {
    pub rows: usize,
    pub seq: usize,
    /// Tokens of each row that a cache holds.
    pub cached: usize,
    pub positions: Vec<u32>,
    pub ends: Vec<u32>,
    pub largest_id: u32,
}

/// An [`Input`] that is not a rectangle, or that no model can read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InputError {
    /// A list does not have one value per token.
    #[error("`{list}` has {found} values for {rows} rows of {seq} tokens")]
    Length {
        /// Which list.
        list: &'static str,
        /// Rows of the rectangle.
        rows: usize,
        /// Tokens of a row.
        seq: usize,
        /// Its length.
        found: usize,
    },
    /// There is no token.
    #[error("the input has no tokens")]
    Empty,
    /// A token that does not see itself, or that is seen by tokens behind the row.
    #[error("row {row}: the end of token {column} is {end}; an end lies behind its own column, at most at {seq}")]
    End {
        /// The row.
        row: usize,
        /// The token's index in its row.
        column: usize,
        /// The end that was given.
        end: u32,
        /// Tokens of a row.
        seq: usize,
    },
    /// A token is seen by tokens that do not see the token which it continues.
    #[error(
        "row {row}: token {column} ends at {end}, but token {parent}, which it continues, at {parent_end}; the tokens \
         of a row form trees in preorder, so that their intervals are nested"
    )]
    Nesting {
        /// The row.
        row: usize,
        /// The token's index in its row.
        column: usize,
        /// Its end.
        end: u32,
        /// The token that it continues.
        parent: usize,
        /// The end of that.
        parent_end: u32,
    },
    /// A token's position is not the next one on its path.
    #[error("row {row}: token {column} has position {position} and continues a path at position {expected}")]
    Path {
        /// The row.
        row: usize,
        /// The token's index in its row.
        column: usize,
        /// The position that was given.
        position: u32,
        /// One more than that of the token which it continues, or 0 where it continues none.
        expected: u32,
    },
    /// Labels whose lists differ in length.
    #[error("`{list}` has {found} values for {labels} labelled positions")]
    Labels {
        /// Which list.
        list: &'static str,
        /// Its length.
        found: usize,
        /// How many positions there are.
        labels: usize,
    },
    /// A labelled position that there is not.
    #[error("labelled position {position} is outside {rows} rows of {seq} tokens")]
    Position {
        /// The flat index.
        position: u32,
        /// Rows of the rectangle.
        rows: usize,
        /// Tokens of a row.
        seq: usize,
    },
    /// A token id is not in the model's vocabulary.
    #[error("token id {id} is outside the model's vocabulary of {vocab_size}; does the tokenizer belong to the model?")]
    Vocabulary {
        /// The id.
        id: u32,
        /// Rows of the embedding table.
        vocab_size: usize,
    },
}

impl Input {
    /// Makes an input from row-major lists of `rows * seq` values.
    ///
    /// A row is a forest in depth-first preorder: a token is directly followed by the tokens that continue it, on any
    /// path, and `ends[i]` is the column after the last of them. Token `i` sees token `j` of its row if and only if
    /// `j <= i < ends[j]`. Documents beside one another are such a forest: every token of a document ends where the
    /// document does.
    ///
    /// `positions` count along a path from 0 at its first token. A token that continues none and is continued by none
    /// may have any position, for it sees itself alone: padding consists of such tokens.
    ///
    /// # Errors
    /// A list of another length, no token at all, or ends and positions that are not those of a forest.
    pub fn new(
        rows: usize,
        seq: usize,
        ids: &[u32],
        positions: &[u32],
        ends: &[u32],
        device: &Device,
    ) -> Result<Self, InputError> {
        for (list, found) in [("ids", ids.len()), ("positions", positions.len()), ("ends", ends.len())] {
            if Some(found) != rows.checked_mul(seq) {
                return Err(InputError::Length { list, rows, seq, found });
            }
        }
        if ids.is_empty() {
            return Err(InputError::Empty);
        }
        for (row, (ends, positions)) in ends.chunks(seq).zip(positions.chunks(seq)).enumerate() {
            check_forest(row, ends, positions)?;
        }
        let spans = ends.iter().zip(positions).flat_map(|(&end, &position)| [end, position]).collect();
        let host = HostInput {
            rows,
            seq,
            cached: 0,
            positions: positions.to_vec(),
            ends: ends.to_vec(),
            largest_id: largest(ids),
        };
        Ok(Self::build(ids, spans, host, device))
    }

    /// Rows of one document each.
    ///
    /// # Errors
    /// No token, or not `rows * seq` of them.
    pub fn unpacked(rows: usize, seq: usize, ids: &[u32], device: &Device) -> Result<Self, InputError> {
        Self::continued(rows, seq, ids, 0, device)
    }

    /// Rows of one document each that go on behind `cached` tokens which a [`KvCache`](crate::KvCache) holds.
    ///
    /// # Errors
    /// No token, or not `rows * seq` of them.
    pub fn continued(rows: usize, seq: usize, ids: &[u32], cached: usize, device: &Device) -> Result<Self, InputError> {
        let found = ids.len();
        if Some(found) != rows.checked_mul(seq) {
            return Err(InputError::Length { list: "ids", rows, seq, found });
        }
        if found == 0 {
            return Err(InputError::Empty);
        }
        let end = (cached + seq) as u32;
        let spans = (0..rows).flat_map(|_| (0..end).flat_map(|position| [end, position])).collect();
        let host = HostInput {
            rows,
            seq,
            cached,
            positions: (0..rows).flat_map(|_| cached as u32..end).collect(),
            ends: vec![end; found],
            largest_id: largest(ids),
        };
        Ok(Self::build(ids, spans, host, device))
    }

    fn build(ids: &[u32], spans: Vec<u32>, host: HostInput, device: &Device) -> Self {
        // Constants take no part in autodiff, so they live on the plain device, where they mix with tracked tensors.
        let device = device.clone().without_autodiff();
        let HostInput { rows, seq, cached, .. } = host;
        Self {
            ids: Tensor::from_data(TensorData::new(signed(ids), [rows, seq]), &device),
            spans: Tensor::from_data(TensorData::new(signed(&spans), [rows, cached + seq, 2]), &device),
            tables: None,
            host,
        }
    }

    /// Cosines and sines of every position's angles, `[rows, seq, R/2]` in f32, on `device`.
    pub(crate) fn rotary_tables(&self, rope: &Rope, device: &Device) -> [Tensor<3>; 2] {
        let shape = [self.host.rows, self.host.seq, rope.half()];
        let (cos, sin) = rope.tables(&self.host.positions, self.host.documents());
        [cos, sin].map(|values| Tensor::from_data(TensorData::new(values, shape), (device, DType::F32)))
    }

    /// `[rows, seq]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.host.rows, self.host.seq]
    }

    /// Whether a model with this vocabulary can read every token.
    ///
    /// # Errors
    /// [`InputError::Vocabulary`] with the largest id.
    pub fn check(&self, vocab_size: usize) -> Result<(), InputError> {
        match self.host.largest_id {
            id if (id as usize) < vocab_size => Ok(()),
            id => Err(InputError::Vocabulary { id, vocab_size }),
        }
    }
}

/// Whether the ends of a row are those of trees in preorder, and its positions count along their paths.
fn check_forest(row: usize, ends: &[u32], positions: &[u32]) -> Result<(), InputError> {
    let seq = ends.len();
    // The path to the token before: each is continued by the next.
    let mut path: Vec<usize> = Vec::new();
    for (column, (&end, &position)) in ends.iter().zip(positions).enumerate() {
        if end as usize <= column || end as usize > seq {
            return Err(InputError::End { row, column, end, seq });
        }
        while path.pop_if(|token| ends[*token] as usize <= column).is_some() {}
        let parent = path.last().copied();
        if let Some(parent) = parent
            && end > ends[parent]
        {
            return Err(InputError::Nesting { row, column, end, parent, parent_end: ends[parent] });
        }
        let alone = parent.is_none() && end as usize == column + 1;
        let expected = parent.map_or(0, |parent| positions[parent].saturating_add(1));
        if position != expected && !alone {
            return Err(InputError::Path { row, column, position, expected });
        }
        path.push(column);
    }
    Ok(())
}

fn largest(ids: &[u32]) -> u32 {
    ids.iter().copied().max().unwrap_or(0)
}

impl HostInput {
    /// For each token its row and the first token of its tree, which together name the document. Documents that share
    /// tokens have one name.
    pub(crate) fn documents(&self) -> impl Iterator<Item = (usize, u32)> {
        let (mut root, mut end) = (0, 0);
        self.ends.iter().enumerate().map(move |(token, &token_end)| {
            let (row, column) = (token / self.seq, (self.cached + token % self.seq) as u32);
            if column >= end || token % self.seq == 0 {
                (root, end) = (column, token_end);
            }
            (row, root)
        })
    }
}

/// Indices as every backend's integer tensors take them.
pub(crate) fn signed(values: &[u32]) -> Vec<i32> {
    values.iter().map(|&value| i32::try_from(value).unwrap_or(i32::MAX)).collect()
}
