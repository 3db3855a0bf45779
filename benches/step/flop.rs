//! The floating-point operations that a step cannot do without, and the rate at which the machine's GEMM does such.

use std::collections::BTreeMap;
use std::time::Duration;

use burn::tensor::Device;
use emberlora::lora::Projections;
use emberlora::model::CausalLm;
use serde_json::{Value, json};

use crate::support::{Gemm, Rounds, alternate};

/// Logits that exist at one time when the head is measured, as in the fused loss: 32 MiB.
const HEAD_ELEMENTS: usize = 1 << 23;
const HEAD: &str = "lm_head";

/// Floating-point operations of one optimizer step, by where they arise. A multiplication and its addition are two. What
/// is only computed again, to save memory, does not count: a step with gradient checkpointing needs no more than one
/// without.
pub struct Flop {
    /// Frozen projections of the blocks: 4 for each parameter and token, 2 where no gradient to the input is needed.
    frozen: f64,
    /// Projection to the vocabulary, for labelled tokens only.
    head: f64,
    /// A and B of all adapters.
    adapters: f64,
    /// Scores and weighted sums over the pairs that causality and the window leave.
    attention: f64,
}

impl Flop {
    /// Those of a step over `rows` documents of `seq` tokens each, of which `labels` have to be predicted.
    pub fn of_step(model: &CausalLm, rows: usize, seq: usize, labels: usize) -> Self {
        let (tokens, labels) = ((rows * seq) as f64, labels as f64);
        let config = model.config();
        let last = format!("model.layers.{}.", config.num_hidden_layers - 1);
        let (mut frozen, mut head, mut adapters) = (0.0, 0.0, 0.0);
        model.projections(&mut |name, linear| {
            let (k, n) = (linear.in_features() as f64, linear.out_features() as f64);
            let labelled_only = name == HEAD || name.strip_prefix(&last).is_some_and(follows_attention);
            let (met, frozen) =
                (if labelled_only { labels } else { tokens }, if name == HEAD { &mut head } else { &mut frozen });
            // x Wᵀ, and dy W where something trainable lies below.
            let passes = if reads_the_embedding(name) { 1.0 } else { 2.0 };
            *frozen += passes * 2.0 * met * k * n;
            if let Some(adapter) = &linear.adapter {
                let rank = adapter.a.val().dims()[0] as f64;
                // x Aᵀ, (x Aᵀ) Bᵀ; dy B, dA, dB; and (dy B) A for dx.
                let for_dx = if reads_the_embedding(name) { 0.0 } else { k };
                adapters += 2.0 * met * rank * (3.0 * n + 2.0 * k + for_dx);
            }
        });
        let width = (config.num_attention_heads * config.head_dim) as f64;
        let pairs: f64 = (0..config.num_hidden_layers)
            .map(|layer| pairs(seq, config.windows.get(layer).copied().flatten()) * rows as f64)
            .sum();
        // Forward Q Kᵀ and P V; backward dP, dV, dQ and dK.
        let attention = 6.0 * 2.0 * width * pairs;
        Self { frozen, head, adapters, attention }
    }

    pub fn total(&self) -> f64 {
        self.frozen + self.head + self.adapters + self.attention
    }

    pub fn in_units_of(&self, unit: f64) -> Value {
        let Self { frozen, head, adapters, attention } = self;
        json!({
            "frozen": frozen / unit,
            "head": head / unit,
            "adapters": adapters / unit,
            "attention": attention / unit,
            "total": self.total() / unit,
        })
    }
}

/// The first block's q, k and v: below them there is nothing that needs a gradient.
fn reads_the_embedding(name: &str) -> bool {
    name.strip_prefix("model.layers.0.self_attn.").is_some_and(|projection| projection != "o_proj")
}

/// What the last block computes for labelled tokens only.
fn follows_attention(projection: &str) -> bool {
    projection == "self_attn.o_proj" || projection.starts_with("mlp.")
}

/// Pairs of a query and a key that it sees, in one document.
fn pairs(seq: usize, window: Option<usize>) -> f64 {
    (1..=seq).map(|seen| window.map_or(seen, |window| seen.min(window)) as f64).sum()
}

/// The products of a step's frozen projections as plain f32 GEMM, whose rate is the machine's limit for the step.
pub struct Limit {
    /// `[m, n, k]` and how many times the step needs such a product; the head is measured on a chunk of its rows, so
    /// it needs that chunk several times.
    shapes: BTreeMap<[usize; 3], f64>,
}

impl Limit {
    /// That of a step over `tokens` tokens.
    pub fn of(model: &CausalLm, tokens: usize) -> Self {
        let mut shapes = BTreeMap::new();
        model.projections(&mut |name, linear| {
            let (k, n) = (linear.in_features(), linear.out_features());
            let rows = if name == HEAD { tokens.min(HEAD_ELEMENTS / n).max(1) } else { tokens };
            *shapes.entry([rows, n, k]).or_default() += tokens as f64 / rows as f64;
        });
        Self { shapes }
    }

    /// Floating-point operations per second over all products, each shape weighing what the step spends on it.
    pub fn rate(&self, device: &Device) -> f64 {
        let rounds = Rounds { most: 7, budget: Duration::from_secs(5) };
        let (mut flop, mut seconds) = (0.0, 0.0);
        for (&[m, n, k], times) in &self.shapes {
            let gemm = Gemm::new(m, n, k, device);
            flop += times * gemm.flop();
            seconds += times * alternate(rounds, [&mut || gemm.run()])[0];
        }
        flop / seconds
    }
}
