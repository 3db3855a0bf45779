//! The whole model: embedding, blocks, final norm and head.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Int, Tensor, activation};
use emberlora_kernels::checkpoint::{Values, checkpoint};
use emberlora_kernels::{AttentionKind, linear_cross_entropy, rms_norm};
use emberlora_lora::{LoraLinear, Pass, Projections};
use emberlora_quant::FloatDtype;

use crate::block::{Block, Context};
use crate::cache::KvCache;
use crate::checkpointing::Checkpointing;
use crate::config::ModelConfig;
use crate::input::{Input, InputError};
use crate::labelled::{Labelled, Labels, indices, weights_of};
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
        self.uploader().input(rows, seq, ids, positions, ends)
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
    fn blocks(&self, input: &Input, rows: Option<Tensor<1, Int>>, pass: &Pass) -> Tensor<3> {
        let inner = self.context(input, pass);
        let last = Context { rows, ..inner.clone() };
        let mut x = self.embed(input);
        for group in self.settings.checkpointing.groups(self.layers.len()) {
            let ends_model = group.blocks.end == self.layers.len();
            let (inner, end) = (inner.clone(), if ends_model { last.clone() } else { inner.clone() });
            let forward = move |blocks: &[Block], x: Tensor<3>, values: Values| {
                let Some((block, blocks)) = blocks.split_last() else { return x };
                let x = blocks.iter().fold(x, |x, block| block.forward(x, &inner, None));
                block.forward(x, &Context { values, ..end.clone() }, None)
            };
            let blocks = &self.layers[group.blocks];
            x = match group.kept {
                true => forward(blocks, x, Values::Read),
                false => {
                    checkpoint(&blocks.to_vec(), x, move |blocks: &Vec<Block>, x, values| forward(blocks, x, values))
                }
            };
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

    /// `Σ weight · −log p(token)` over the labels, in f32, `[1]`. Only labelled rows go through what follows the attention
    /// of the last block, unless it takes activations in 8 bits.
    ///
    /// # Panics
    /// When the batch was not made with this model's [`uploader`](Self::uploader).
    pub fn loss_of(&self, batch: &Labelled, pass: &Pass) -> Tensor<1> {
        let hidden = self.blocks(&batch.input, batch.selected.clone(), pass);
        self.weighted_loss(hidden, batch.places.clone(), batch.targets.clone(), batch.weights.clone(), pass)
    }

    /// Whether leaving rows out of the last block would change the others: with activations in 8 bits, a column is an
    /// outlier in all rows when it is one in any.
    pub(crate) fn rows_depend_on_each_other(&self) -> bool {
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
        let [rows, seq, _] = hidden.dims();
        Labels { positions, tokens, weights }.check([rows, seq], self.settings.config.vocab_size)?;
        let (device, in_order) = (self.device(), positions.iter().copied().eq(0..(rows * seq) as u32));
        let places = (!in_order).then(|| indices(positions, &device));
        Ok(self.weighted_loss(hidden, places, indices(tokens, &device), weights_of(weights, &device), pass))
    }

    /// `places` are the flat indices of the hidden states that predict `targets`, one each; `None` for all in order.
    fn weighted_loss(
        &self,
        hidden: Tensor<3>,
        places: Option<Tensor<1, Int>>,
        targets: Tensor<1, Int>,
        weights: Tensor<1>,
        pass: &Pass,
    ) -> Tensor<1> {
        let ([rows, seq, width], [labels]) = (hidden.dims(), targets.dims());
        if labels == 0 {
            // A sum over nothing that can still be differentiated.
            return hidden.slice([0..1, 0..1, 0..1]).reshape([1]).cast(DType::F32).mul_scalar(0.0);
        }
        let hidden = hidden.reshape([rows * seq, width]);
        let hidden = match places {
            Some(places) => hidden.select(0, places),
            None => hidden,
        };
        if (self.lm_head.adapter.is_none() || !pass.adapters) && !self.lm_head.weight.quantises_activations() {
            return linear_cross_entropy(hidden, self.lm_head.weight.frozen(), targets, weights);
        }
        let logits = self.lm_head.forward(hidden, pass).cast(DType::F32);
        let log_probabilities = activation::log_softmax(logits, 1).gather(1, targets.unsqueeze_dim(1));
        (log_probabilities.reshape([labels]) * weights).sum().neg()
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
        let tables = input.tables.clone();
        let [cos, sin] = tables.unwrap_or_else(|| input.rotary_tables(&self.settings.rope, &self.device()));
        let (spans, attention) = (input.spans.clone(), self.settings.attention);
        Context { cos, sin, spans, rows: None, attention, pass: *pass, values: Values::Read }
    }
}

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
