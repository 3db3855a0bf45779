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

    /// Whether head and embedding are one tensor.
    pub fn is_tied(&self) -> bool {
        self.tied
    }

    /// The device that the weights are on, without autodiff.
    pub fn device(&self) -> Device {
        self.embed_tokens.val().device().without_autodiff()
    }

    /// Chooses what the backward pass computes again.
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
        starts: &[u32],
    ) -> Result<Input, InputError> {
        let input = Input::new(rows, seq, ids, positions, starts, &self.device())?;
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
        let context = self.context(input, pass);
        let mut x = self.embed(input);
        match self.settings.checkpointing.group(self.layers.len()) {
            None => x = self.layers.iter().fold(x, |x, block| block.forward(x, &context, None)),
            Some(group) => {
                for blocks in self.layers.chunks(group) {
                    let context = context.clone();
                    x = checkpoint(&blocks.to_vec(), x, move |blocks: &Vec<Block>, x| {
                        blocks.iter().fold(x, |x, block| block.forward(x, &context, None))
                    });
                }
            }
        }
        self.normed(x)
    }

    /// Hidden states of tokens that follow those in `cache`, which takes them in. For evaluation: no dropout, no
    /// checkpoints.
    ///
    /// The starts of `input` are indices into the cached tokens followed by the new ones; see [`Input::continued`].
    ///
    /// # Panics
    /// When an id is outside the vocabulary, or the cache holds another number of rows.
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
    /// `positions[i]` is the flat index `row * seq + column` of the hidden state that predicts `tokens[i]`. Only those
    /// rows meet the head, and their logits exist in pieces only, unless the head carries an adapter.
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
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(InputError::Vocabulary { id, vocab_size });
        }
        if labels == 0 {
            // A sum over nothing that can still be differentiated.
            return Ok(hidden.slice([0..1, 0..1, 0..1]).reshape([1]).cast(DType::F32).mul_scalar(0.0));
        }

        let device = self.device();
        let index = |values: &[u32]| Tensor::<1, Int>::from_data(TensorData::new(signed(values), [labels]), &device);
        let weights = Tensor::<1>::from_data(TensorData::new(weights.to_vec(), [labels]), (&device, DType::F32));
        let hidden = hidden.reshape([rows * seq, width]).select(0, index(positions));
        let targets = index(tokens);
        if self.lm_head.adapter.is_none() || !pass.adapters {
            return Ok(linear_cross_entropy(hidden, self.lm_head.weight.val(), targets, weights));
        }
        let logits = self.lm_head.forward(hidden, pass).cast(DType::F32);
        let log_probabilities = activation::log_softmax(logits, 1).gather(1, targets.unsqueeze_dim(1));
        Ok((log_probabilities.reshape([labels]) * weights).sum().neg())
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
            starts: input.starts.clone(),
            attention: self.settings.attention,
            pass: *pass,
        }
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
