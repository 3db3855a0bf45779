//! What a forward pass reads: token ids, positions, and where each token's document begins.

use burn::tensor::{Device, Int, Tensor, TensorData};

/// A rectangle of tokens, possibly with several documents packed into a row.
#[derive(Clone, Debug)]
pub struct Input {
    pub(crate) ids: Tensor<2, Int>,
    pub(crate) starts: Tensor<2, Int>,
    pub(crate) host: HostInput,
}

/// The same on the host: the tables of the rotary embedding are made from it without reading the device.
#[derive(Clone, Debug)]
pub(crate) struct HostInput {
    pub rows: usize,
    pub seq: usize,
    pub positions: Vec<u32>,
    pub starts: Vec<u32>,
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
    /// A token's document begins behind the token.
    #[error("row {row}: token {column} is said to belong to a document that starts at {start}")]
    Start {
        /// The row.
        row: usize,
        /// The token's index in its row.
        column: usize,
        /// The start that was given.
        start: u32,
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
    /// `positions` restart in each document. `starts[i]` is the index within the row of the first token that token
    /// `i` may attend to: the first token of its document, or the token itself where it is padding.
    ///
    /// # Errors
    /// A list of another length, no token at all, or a start behind its token.
    pub fn new(
        rows: usize,
        seq: usize,
        ids: &[u32],
        positions: &[u32],
        starts: &[u32],
        device: &Device,
    ) -> Result<Self, InputError> {
        for (list, found) in [("ids", ids.len()), ("positions", positions.len()), ("starts", starts.len())] {
            if Some(found) != rows.checked_mul(seq) {
                return Err(InputError::Length { list, rows, seq, found });
            }
        }
        if ids.is_empty() {
            return Err(InputError::Empty);
        }
        if let Some(token) = (0..starts.len()).find(|&token| starts[token] as usize > token % seq) {
            return Err(InputError::Start { row: token / seq, column: token % seq, start: starts[token] });
        }
        Ok(Self::build(rows, seq, ids, positions.to_vec(), starts.to_vec(), device))
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
        let positions = (0..rows).flat_map(|_| (cached..cached + seq).map(|position| position as u32)).collect();
        Ok(Self::build(rows, seq, ids, positions, vec![0; found], device))
    }

    fn build(rows: usize, seq: usize, ids: &[u32], positions: Vec<u32>, starts: Vec<u32>, device: &Device) -> Self {
        // Constants take no part in autodiff, so they live on the plain device, where they mix with tracked tensors.
        let device = device.clone().without_autodiff();
        let largest_id = ids.iter().copied().max().unwrap_or(0);
        Self {
            ids: Tensor::from_data(TensorData::new(signed(ids), [rows, seq]), &device),
            starts: Tensor::from_data(TensorData::new(signed(&starts), [rows, seq]), &device),
            host: HostInput { rows, seq, positions, starts, largest_id },
        }
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

impl HostInput {
    /// For each token its row and its document's start, which together name the document.
    pub(crate) fn documents(&self) -> impl Iterator<Item = (usize, u32)> {
        self.starts.iter().enumerate().map(|(token, &start)| (token / self.seq, start))
    }
}

/// Indices as every backend's integer tensors take them.
pub(crate) fn signed(values: &[u32]) -> Vec<i32> {
    values.iter().map(|&value| i32::try_from(value).unwrap_or(i32::MAX)).collect()
}
