//! The whole model: embedding, blocks, final norm and head.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation};
use emberlora_kernels::checkpoint::checkpoint;
use emberlora_kernels::{AttentionKind, linear_cross_entropy, rms_norm};
use emberlora_lora::{LoraLinear, Pass, Projections};
use emberlora_quant::FloatDtype;

use crate::block::{Block, Context};
use crate::cache::KvCache;
use crate::checkpointing::Checkpointing;
use crate::config::ModelConfig;
use crate::input::{Input, InputError, signed};
use crate::rope::Rope;

/// A decoder-only language model whose weights are frozen and whose projections can carry adapters.
///
/// Nothing in it requires a gradient until adapters are [attached](emberlora_lora::attach()).
#[derive(Module, Debug)]
pub struct CausalLm {
    /// The table of `embed_tokens`, `[vocab, E]` as stored; the head shares it where the model ties them.
    pub(crate) embed_tokens: Param<Tensor<2>>,
    pub(crate) layers: Vec<Block>,
    pub(crate) norm: Param<Tensor<1>>,
    pub(crate) lm_head: LoraLinear,
    pub(crate) tied: bool,
    #[module(skip)]
    pub(crate) settings: Settings,
}

/// What is not a parameter.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub config: ModelConfig,
    pub rope: Rope,
    pub compute_dtype: FloatDtype,
    pub attention: AttentionKind,
    pub checkpointing: Checkpointing,
}

impl CausalLm {
    /// The configuration that the model was built from.
    pub fn config(&self) -> &ModelConfig {
        &self.settings.config
    }

    /// The dtype of activations.
    pub fn compute_dtype(&self) -> FloatDtype {
        self.settings.compute_dtype
    }

    /// The format of the embedding and of the projections that are not packed, where they are all stored alike.
    pub fn weight_dtype(&self) -> Option<FloatDtype> {
        let mut found = vec![self.embed_tokens.val().dtype()];
        self.projections(&mut |_, linear| found.extend(linear.weight.as_dense().map(|weight| weight.dtype())));
        found.dedup();
        let [dtype] = found[..] else { return None };
        [FloatDtype::F32, FloatDtype::Bf16, FloatDtype::F16].into_iter().find(|&known| burn_dtype(known) == dtype)
    }

    /// Whether head and embedding are one tensor.
    pub fn is_tied(&self) -> bool {
        self.tied
    }

    /// The device that the weights are on, without autodiff.
    pub fn device(&self) -> Device {
        self.embed_tokens.val().device().without_autodiff()
    }

    /// Chooses what the backward pass computes again at one time, where the adapters' device asks for gradient
    /// checkpointing.
    pub fn set_checkpointing(&mut self, checkpointing: Checkpointing) {
        self.settings.checkpointing = checkpointing;
    }

    /// Base parameters, those of a tied head counted once.
    pub fn num_base_parameters(&self) -> usize {
        let mut count = self.embed_tokens.val().shape().num_elements();
        count += self.settings.config.hidden_size * (1 + 2 * self.layers.len());
        for block in &self.layers {
            let norms = [&block.self_attn.q_norm, &block.self_attn.k_norm];
            count += norms.into_iter().flatten().map(|norm| norm.val().dims()[0]).sum::<usize>();
        }
        self.projections(&mut |name, linear| {
            if name != HEAD || !self.tied {
                let bias = linear.bias.as_ref().map_or(0, |bias| bias.val().dims()[0]);
                count += linear.in_features() * linear.out_features() + bias;
            }
        });
        count
    }

    /// Makes an [`Input`] on the model's device and checks its ids.
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
        let input = Input::new(rows, seq, ids, positions, ends, &self.device())?;
        input.check(self.settings.config.vocab_size)?;
        Ok(input)
    }

    /// Hidden states behind the final norm.
    ///
    /// # Shapes
    /// * result: `[rows, seq, E]` in the compute dtype
    ///
    /// # Panics
    /// When an id is outside the vocabulary; [`input`](Self::input) refuses such an input.
    pub fn hidden(&self, input: &Input, pass: &Pass) -> Tensor<3> {
        self.blocks(input, None, pass)
    }

    /// Hidden states behind the final norm, `[rows, seq, E]`; only those of `rows`, `[1, rows, E]`, where there are any.
    fn blocks(&self, input: &Input, rows: Option<&[u32]>, pass: &Pass) -> Tensor<3> {
        let context = self.context(input, pass);
        let last = Context { rows: rows.map(|rows| self.indices(rows)), ..context.clone() };
        let layers = self.layers.len();
        let size = self.settings.checkpointing.group(layers);
        let mut x = self.embed(input);
        for (index, blocks) in self.layers.chunks(size).enumerate() {
            let (context, last) = (context.clone(), last.clone());
            x = checkpoint(&blocks.to_vec(), x, move |blocks: &Vec<Block>, x| {
                blocks.iter().zip(index * size + 1..).fold(x, |x, (block, number)| {
                    block.forward(x, if number == layers { &last } else { &context }, None)
                })
            });
        }
        self.normed(x)
    }

    /// Hidden states of tokens that follow those in `cache`, which takes them in. For evaluation: no dropout, no
    /// checkpoints.
    ///
    /// # Panics
    /// When an id is outside the vocabulary, or the cache holds another number of rows or tokens than `input`
    /// [continues](Input::continued).
    pub fn step(&self, input: &Input, cache: &mut KvCache, pass: &Pass) -> Tensor<3> {
        let context = self.context(input, &Pass { dropout: None, ..*pass });
        let layers = cache.layers(self.layers.len());
        let blocks = self.layers.iter().zip(layers);
        let x = blocks.fold(self.embed(input), |x, (block, cache)| block.forward(x, &context, Some(cache)));
        self.normed(x)
    }

    /// The head's scores in f32.
    ///
    /// # Shapes
    /// * `hidden`: `[B, S, E]`, result: `[B, S, vocab]`
    pub fn logits(&self, hidden: Tensor<3>, pass: &Pass) -> Tensor<3> {
        self.lm_head.forward(hidden, pass).cast(DType::F32)
    }

    /// `Σ weight · −log p(token)` over the labelled positions, in f32, `[1]`.
    ///
    /// `positions[i]` is the flat index `row * seq + column` of the hidden state that predicts `tokens[i]`; a position
    /// may predict several tokens. Only labelled rows go through what follows the attention of the last block, unless it
    /// takes activations in 8 bits.
    ///
    /// # Errors
    /// Lists of different lengths, a position outside the input, or a token outside the vocabulary.
    ///
    /// # Panics
    /// When an id is outside the vocabulary; [`input`](Self::input) refuses such an input.
    pub fn loss_of(
        &self,
        input: &Input,
        positions: &[u32],
        tokens: &[u32],
        weights: &[f32],
        pass: &Pass,
    ) -> Result<Tensor<1>, InputError> {
        let [rows, seq] = input.dims();
        self.check_labels([rows, seq], positions, tokens, weights)?;
        let mut labelled = positions.to_vec();
        labelled.sort_unstable();
        labelled.dedup();
        let few = labelled.len() as f64 <= SELECTED_UP_TO * (rows * seq) as f64;
        if labelled.is_empty() || !few || self.rows_depend_on_each_other() {
            return self.loss(self.hidden(input, pass), positions, tokens, weights, pass);
        }
        let hidden = self.blocks(input, Some(&labelled), pass);
        let place = |position: &u32| labelled.partition_point(|labelled| labelled < position) as u32;
        let places: Vec<u32> = positions.iter().map(place).collect();
        self.loss(hidden, &places, tokens, weights, pass)
    }

    /// Whether leaving rows out of the last block would change the others: with activations in 8 bits, a column is an
    /// outlier in all rows when it is one in any.
    fn rows_depend_on_each_other(&self) -> bool {
        let projections = self.layers.last().into_iter().flat_map(Block::projections);
        projections.map(|(_, linear)| linear).any(|linear| linear.weight.quantises_activations())
    }

    /// As [`loss_of`](Self::loss_of), for [hidden](Self::hidden) states that are there already.
    ///
    /// Only labelled rows meet the head, and their logits exist in pieces only, unless the head carries an adapter or
    /// takes its input in 8 bits.
    ///
    /// # Errors
    /// Lists of different lengths, a position outside `hidden`, or a token outside the vocabulary.
    pub fn loss(
        &self,
        hidden: Tensor<3>,
        positions: &[u32],
        tokens: &[u32],
        weights: &[f32],
        pass: &Pass,
    ) -> Result<Tensor<1>, InputError> {
        let [rows, seq, width] = hidden.dims();
        self.check_labels([rows, seq], positions, tokens, weights)?;
        let labels = positions.len();
        if labels == 0 {
            // A sum over nothing that can still be differentiated.
            return Ok(hidden.slice([0..1, 0..1, 0..1]).reshape([1]).cast(DType::F32).mul_scalar(0.0));
        }

        let hidden = hidden.reshape([rows * seq, width]);
        let in_order = positions.iter().copied().eq(0..(rows * seq) as u32);
        let hidden = if in_order { hidden } else { hidden.select(0, self.indices(positions)) };
        let weights = TensorData::new(weights.to_vec(), [labels]);
        let weights = Tensor::<1>::from_data(weights, (&self.device(), DType::F32));
        let targets = self.indices(tokens);
        if (self.lm_head.adapter.is_none() || !pass.adapters) && !self.lm_head.weight.quantises_activations() {
            return Ok(linear_cross_entropy(hidden, self.lm_head.weight.frozen(), targets, weights));
        }
        let logits = self.lm_head.forward(hidden, pass).cast(DType::F32);
        let log_probabilities = activation::log_softmax(logits, 1).gather(1, targets.unsqueeze_dim(1));
        Ok((log_probabilities.reshape([labels]) * weights).sum().neg())
    }

    fn check_labels(
        &self,
        [rows, seq]: [usize; 2],
        positions: &[u32],
        tokens: &[u32],
        weights: &[f32],
    ) -> Result<(), InputError> {
        let labels = positions.len();
        for (list, found) in [("tokens", tokens.len()), ("weights", weights.len())] {
            if found != labels {
                return Err(InputError::Labels { list, found, labels });
            }
        }
        if let Some(&position) = positions.iter().find(|&&position| position as usize >= rows * seq) {
            return Err(InputError::Position { position, rows, seq });
        }
        let vocab_size = self.settings.config.vocab_size;
        match tokens.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(InputError::Vocabulary { id, vocab_size }),
            None => Ok(()),
        }
    }

    fn indices(&self, values: &[u32]) -> Tensor<1, Int> {
        Tensor::from_data(TensorData::new(signed(values), [values.len()]), &self.device())
    }

    fn embed(&self, input: &Input) -> Tensor<3> {
        let [rows, seq] = input.dims();
        let ids = input.ids.clone().reshape([rows * seq]);
        // Rows are selected first, so that only they are converted.
        let selected = self.embed_tokens.val().select(0, ids);
        selected.cast(burn_dtype(self.settings.compute_dtype)).reshape([rows, seq, self.settings.config.hidden_size])
    }

    fn normed(&self, x: Tensor<3>) -> Tensor<3> {
        rms_norm(x, self.norm.val(), self.settings.config.rms_norm_eps as f32)
    }

    /// The tables are made here once for all blocks.
    fn context(&self, input: &Input, pass: &Pass) -> Context {
        let shape = [input.host.rows, input.host.seq, self.settings.rope.half()];
        let (cos, sin) = self.settings.rope.tables(&input.host.positions, input.host.documents());
        let device = self.device();
        let table = |values: Vec<f32>| Tensor::from_data(TensorData::new(values, shape), (&device, DType::F32));
        Context {
            cos: table(cos),
            sin: table(sin),
            spans: input.spans.clone(),
            rows: None,
            attention: self.settings.attention,
            pass: *pass,
        }
    }
}

/// The share of labelled rows up to which selecting them costs less than it saves.
const SELECTED_UP_TO: f64 = 0.9;

const HEAD: &str = "lm_head";

impl Projections for CausalLm {
    fn projections(&self, f: &mut dyn FnMut(&str, &LoraLinear)) {
        for (number, block) in self.layers.iter().enumerate() {
            for (name, linear) in block.projections() {
                f(&format!("model.layers.{number}.{name}"), linear);
            }
        }
        f(HEAD, &self.lm_head);
    }

    fn visit_projections(&mut self, f: &mut dyn FnMut(&str, &mut LoraLinear)) {
        for (number, block) in self.layers.iter_mut().enumerate() {
            for (name, linear) in block.projections_mut() {
                f(&format!("model.layers.{number}.{name}"), linear);
            }
        }
        f(HEAD, &mut self.lm_head);
    }

    fn output_head(&self) -> Option<&str> {
        Some(HEAD)
    }
}

/// Burn's name for a storage format.
pub(crate) fn burn_dtype(dtype: FloatDtype) -> DType {
    match dtype {
        FloatDtype::F32 => DType::F32,
        FloatDtype::Bf16 => DType::BF16,
        FloatDtype::F16 => DType::F16,
    }
}
