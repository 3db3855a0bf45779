//! Batches on the device before the model gets to them: everything that has to be brought there is brought ahead.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use crate::causal_lm::CausalLm;
use crate::input::{Input, InputError, signed};
use crate::rope::Rope;

/// What the hidden states of an input have to predict.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Labels<'a> {
    /// Flat indices `row * seq + column` of the hidden states that predict; one may predict several tokens.
    pub positions: &'a [u32],
    /// The tokens that they predict.
    pub tokens: &'a [u32],
    /// What each counts in the loss.
    pub weights: &'a [f32],
}

/// Makes inputs for a model, on any thread: it knows of the model what an input depends on, and no weight.
#[derive(Clone, Debug)]
pub struct Uploader {
    device: Device,
    vocab_size: usize,
    rope: Rope,
    /// Whether rows without labels may be left out.
    selects: bool,
}

/// An input and its labels, on the device.
#[derive(Clone, Debug)]
pub struct Labelled {
    pub(crate) input: Input,
    /// The rows that go through what follows the attention of the last block; `None` for all.
    pub(crate) selected: Option<Tensor<1, Int>>,
    /// Where the hidden state of each label is among the selected ones; `None` where they are in the order of the labels.
    pub(crate) places: Option<Tensor<1, Int>>,
    pub(crate) targets: Tensor<1, Int>,
    pub(crate) weights: Tensor<1>,
}

/// The share of labelled rows up to which selecting them costs less than it saves.
const SELECTED_UP_TO: f64 = 0.9;

impl CausalLm {
    /// Makes inputs for this model.
    pub fn uploader(&self) -> Uploader {
        let (vocab_size, rope) = (self.settings.config.vocab_size, self.settings.rope.clone());
        Uploader { device: self.device(), vocab_size, rope, selects: !self.rows_depend_on_each_other() }
    }
}

impl Uploader {
    /// Makes an [`Input`] with all that the model derives from it, and checks its ids.
    ///
    /// # Errors
    /// See [`Input::new`] and [`Input::check`].
    pub fn input(
        &self,
        rows: usize,
        seq: usize,
        ids: &[u32],
        positions: &[u32],
        ends: &[u32],
    ) -> Result<Input, InputError> {
        let mut input = Input::new(rows, seq, ids, positions, ends, &self.device)?;
        input.check(self.vocab_size)?;
        input.tables = Some(input.rotary_tables(&self.rope, &self.device));
        Ok(input)
    }

    /// Puts labels to an input.
    ///
    /// # Errors
    /// Lists of different lengths, a position outside the input, or a token outside the vocabulary.
    pub fn label(&self, input: Input, labels: Labels<'_>) -> Result<Labelled, InputError> {
        let [rows, seq] = input.dims();
        labels.check([rows, seq], self.vocab_size)?;
        let Labels { positions, tokens, weights } = labels;
        let mut labelled = positions.to_vec();
        labelled.sort_unstable();
        labelled.dedup();
        let few = labelled.len() as f64 <= SELECTED_UP_TO * (rows * seq) as f64;
        let all = labelled.is_empty() || !few || !self.selects;
        let place = |position: &u32| match all {
            true => *position,
            false => labelled.partition_point(|labelled| labelled < position) as u32,
        };
        let places: Vec<u32> = positions.iter().map(place).collect();
        let hidden = if all { rows * seq } else { labelled.len() };
        let in_order = places.iter().copied().eq(0..hidden as u32);
        Ok(Labelled {
            selected: (!all).then(|| indices(&labelled, &self.device)),
            places: (!in_order).then(|| indices(&places, &self.device)),
            targets: indices(tokens, &self.device),
            weights: weights_of(weights, &self.device),
            input,
        })
    }
}

impl Labels<'_> {
    pub(crate) fn check(&self, [rows, seq]: [usize; 2], vocab_size: usize) -> Result<(), InputError> {
        let labels = self.positions.len();
        for (list, found) in [("tokens", self.tokens.len()), ("weights", self.weights.len())] {
            if found != labels {
                return Err(InputError::Labels { list, found, labels });
            }
        }
        if let Some(&position) = self.positions.iter().find(|&&position| position as usize >= rows * seq) {
            return Err(InputError::Position { position, rows, seq });
        }
        match self.tokens.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(InputError::Vocabulary { id, vocab_size }),
            None => Ok(()),
        }
    }
}

pub(crate) fn indices(values: &[u32], device: &Device) -> Tensor<1, Int> {
    Tensor::from_data(TensorData::new(signed(values), [values.len()]), device)
}

pub(crate) fn weights_of(values: &[f32], device: &Device) -> Tensor<1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), (device, DType::F32))
}
