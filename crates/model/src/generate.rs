//! Generating text token by token.

use std::cmp::Ordering;
use std::fmt;

use burn::tensor::{Tensor, TensorData};
use emberlora_kernels::rng::mix;
use emberlora_lora::Pass;

use crate::cache::KvCache;
use crate::causal_lm::CausalLm;
use crate::input::{Input, InputError};

/// How the next token is chosen, and when to stop.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingOptions {
    /// 0 takes the likeliest token; above, scores are divided by it before they become probabilities.
    pub temperature: f64,
    /// Draw only among the likeliest tokens that together reach this probability; 1 draws among all
    /// (Holtzman et al. 2019, <https://arxiv.org/abs/1904.09751>).
    pub top_p: f64,
    /// Where the draws come from: the n-th token depends on this seed and n alone.
    pub seed: u64,
    /// Stop after this many tokens.
    pub max_new_tokens: usize,
    /// Stop at these tokens, see [`stop_tokens`](crate::stop_tokens).
    pub eos: Vec<u32>,
}

impl SamplingOptions {
    /// The likeliest token each time.
    pub fn greedy(max_new_tokens: usize, eos: Vec<u32>) -> Self {
        Self { temperature: 0.0, top_p: 1.0, seed: 0, max_new_tokens, eos }
    }
}

/// A generation that cannot begin.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The prompt is empty or holds a token that the model does not know.
    #[error("prompt: {0}")]
    Prompt(#[from] InputError),
    /// The temperature is negative or not a number.
    #[error("temperature is {0}; it must be 0 (greedy) or greater")]
    Temperature(f64),
    /// `top_p` is not a probability above 0.
    #[error("top_p is {0}; it must be greater than 0 and at most 1")]
    TopP(f64),
}

/// Why a generation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model produced an end token.
    Eos,
    /// The limit of new tokens was reached.
    Length,
    /// The model's scores were not finite.
    NotFinite,
    /// The scores could not be computed or read back; what the device said.
    Failed(String),
}

/// An iterator over the tokens that follow a prompt. The end token is not among them.
#[derive(Debug)]
pub struct Generator<'m> {
    model: &'m CausalLm,
    options: SamplingOptions,
    pass: Pass,
    cache: KvCache,
    /// Tokens that the cache does not hold yet: first the prompt, then the last token.
    pending: Vec<u32>,
    produced: usize,
    finish: Option<Finish>,
}

impl<'m> Generator<'m> {
    /// Prepares to continue `prompt`. The model first runs when the first token is asked for.
    ///
    /// # Errors
    /// An empty prompt, a token outside the vocabulary, or options out of range.
    pub fn new(model: &'m CausalLm, prompt: &[u32], options: SamplingOptions) -> Result<Self, GenerateError> {
        Self::with_pass(model, prompt, options, Pass::eval())
    }

    /// The same with a choice between the adapted model and its base.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_pass(
        model: &'m CausalLm,
        prompt: &[u32],
        options: SamplingOptions,
        pass: Pass,
    ) -> Result<Self, GenerateError> {
        if !(options.temperature >= 0.0 && options.temperature.is_finite()) {
            return Err(GenerateError::Temperature(options.temperature));
        }
        if !(options.top_p > 0.0 && options.top_p <= 1.0) {
            return Err(GenerateError::TopP(options.top_p));
        }
        Input::unpacked(1, prompt.len(), prompt, &model.device())?.check(model.config().vocab_size)?;
        // A limit that nobody means to reach must not decide about memory.
        let room = prompt.len() + options.max_new_tokens.min(1024);
        Ok(Self {
            model,
            options,
            pass,
            cache: KvCache::with_capacity(room),
            pending: prompt.to_vec(),
            produced: 0,
            finish: None,
        })
    }

    /// Why it ended, once it has.
    pub fn finish(&self) -> Option<Finish> {
        self.finish.clone()
    }

    /// What went wrong, when it ended neither at an end token nor at the limit.
    pub fn error(&self) -> Option<&str> {
        match self.finish.as_ref()? {
            Finish::Eos | Finish::Length => None,
            Finish::NotFinite => Some("the model's scores are not finite"),
            Finish::Failed(reason) => Some(reason),
        }
    }

    /// Runs the model over the pending tokens and returns the scores of the next one, or why there are none.
    fn scores(&mut self) -> Result<Vec<f32>, Finish> {
        let (seq, cached) = (self.pending.len(), self.cache.len());
        let input = Input::continued(1, seq, &self.pending, cached, &self.model.device())
            .map_err(|error| Finish::Failed(error.to_string()))?;
        let hidden = self.model.step(&input, &mut self.cache, &self.pass);
        let last: Tensor<3> = hidden.narrow(1, seq - 1, 1);
        let data = self.model.logits(last, &self.pass).try_into_data();
        usable(data.map_err(|error| unreadable(&error))?)
    }
}

/// The scores, unless one of them makes no probability.
fn usable(data: TensorData) -> Result<Vec<f32>, Finish> {
    let scores = data.try_into_vec::<f32>().map_err(|error| unreadable(&error))?;
    // −∞ is a legitimate score; NaN and +∞ are not.
    if scores.iter().all(|score| *score < f32::INFINITY) { Ok(scores) } else { Err(Finish::NotFinite) }
}

fn unreadable(error: &dyn fmt::Display) -> Finish {
    Finish::Failed(format!("the scores cannot be read from the device: {error}"))
}

impl Iterator for Generator<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        if self.finish.is_some() {
            return None;
        }
        if self.produced == self.options.max_new_tokens {
            self.finish = Some(Finish::Length);
            return None;
        }
        let scores = match self.scores() {
            Ok(scores) => scores,
            Err(finish) => {
                self.finish = Some(finish);
                return None;
            }
        };
        let token = choose(&scores, &self.options, self.produced as u64);
        if self.options.eos.contains(&token) {
            self.finish = Some(Finish::Eos);
            return None;
        }
        self.produced += 1;
        self.pending = vec![token];
        Some(token)
    }
}

/// The index of the next token.
fn choose(scores: &[f32], options: &SamplingOptions, step: u64) -> u32 {
    let best = largest(scores);
    if options.temperature == 0.0 {
        return best as u32;
    }
    let top = f64::from(scores[best]);
    let mut candidates: Vec<(u32, f64)> = scores
        .iter()
        .enumerate()
        .map(|(token, &score)| (token as u32, ((f64::from(score) - top) / options.temperature).exp()))
        .collect();
    if options.top_p < 1.0 {
        keep_likeliest(&mut candidates, options.top_p);
    }
    let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
    // 53 bits: as many as a double in [0, 1) has.
    let drawn = (mix(options.seed, &[step]) >> 11) as f64 / (1u64 << 53) as f64 * total;
    let mut passed = 0.0;
    for &(token, weight) in &candidates {
        passed += weight;
        if drawn < passed {
            return token;
        }
    }
    // Rounding can leave `drawn` at the very end.
    best as u32
}

/// The first of the largest, as `argmax` of PyTorch.
fn largest(scores: &[f32]) -> usize {
    let better = |best: usize, at: usize| if scores[at] > scores[best] { at } else { best };
    (1..scores.len()).fold(0, better)
}

/// Keeps the smallest set of likeliest tokens whose probability reaches `top_p`.
fn keep_likeliest(candidates: &mut Vec<(u32, f64)>, top_p: f64) {
    let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
    let enough = top_p * total;
    // All tokens below this together stay short of what may be left out, so the rest reaches `enough` without them;
    // sorting a whole vocabulary for every token would cost more than the draw.
    let least = (1.0 - top_p) * total / candidates.len() as f64;
    candidates.retain(|(_, weight)| *weight >= least);
    candidates.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal));
    let mut sum = 0.0;
    let kept = candidates.iter().take_while(|(_, weight)| {
        let more = sum < enough;
        sum += weight;
        more
    });
    let kept = kept.count().max(1);
    candidates.truncate(kept);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn options(temperature: f64, top_p: f64, seed: u64) -> SamplingOptions {
        SamplingOptions { temperature, top_p, seed, max_new_tokens: 1, eos: Vec::new() }
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(choose(&[0.0, 2.0, 2.0, -1.0], &options(0.0, 1.0, 7), 0), 1);
        assert_eq!(choose(&[f32::NEG_INFINITY, -3.0], &options(0.0, 1.0, 7), 0), 1);
    }

    #[test]
    fn a_draw_depends_on_seed_and_step_alone() {
        let scores: Vec<f32> = (0..50).map(|i| (i as f32 * 0.7).sin()).collect();
        let draws = |seed| (0..40).map(|step| choose(&scores, &options(1.0, 1.0, seed), step)).collect::<Vec<_>>();
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let scores = [0.0f32, 3f32.ln()];
        let ones = (0..4000).filter(|&step| choose(&scores, &options(1.0, 1.0, 3), step) == 1).count();
        assert!((2850..3150).contains(&ones), "{ones} of 4000, expected about 3000");
        let cold = (0..200).filter(|&step| choose(&scores, &options(0.05, 1.0, 3), step) == 1).count();
        assert_eq!(cold, 200);
    }

    #[test]
    fn top_p_leaves_the_tail_out() {
        // Probabilities 0.5, 0.3, 0.2.
        let scores = [5f32.ln(), 3f32.ln(), 2f32.ln()];
        let drawn = |top_p| (0..300).map(|step| choose(&scores, &options(1.0, top_p, 9), step)).max().unwrap();
        assert_eq!((drawn(0.4), drawn(0.6), drawn(0.9)), (0, 1, 2));
    }

    proptest! {
        #[test]
        fn top_p_keeps_what_sorting_the_whole_vocabulary_keeps(
            scores in prop::collection::vec(-20i32..20, 1..200),
            divisor in prop::sample::select(vec![1.0, 4.0, 50.0]),
            top_p in 0.01f64..0.999,
        ) {
            let weights = scores.iter().map(|&score| (f64::from(score) / divisor).exp());
            let mut kept: Vec<(u32, f64)> = (0..).zip(weights).collect();
            let mut sorted = kept.clone();
            keep_likeliest(&mut kept, top_p);

            let enough = top_p * sorted.iter().map(|(_, weight)| weight).sum::<f64>();
            sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
            let mut sum = 0.0;
            let needed = sorted.iter().take_while(|(_, weight)| {
                let more = sum < enough;
                sum += weight;
                more
            });
            let needed = needed.count();
            prop_assert_eq!(&kept[..], &sorted[..needed]);
        }
    }

    #[test]
    fn scores_that_are_not_finite_are_told_from_scores_that_cannot_be_read() {
        let data = |scores: [f32; 2]| TensorData::new(scores.to_vec(), [2]);
        assert_eq!(usable(data([f32::NEG_INFINITY, 1.0])), Ok(vec![f32::NEG_INFINITY, 1.0]));
        assert_eq!(usable(data([f32::NAN, 1.0])), Err(Finish::NotFinite));
        assert_eq!(usable(data([f32::INFINITY, 1.0])), Err(Finish::NotFinite));
        let Err(Finish::Failed(reason)) = usable(TensorData::new(vec![1i32, 2], [2])) else { panic!("it was read") };
        assert!(reason.contains("cannot be read"), "{reason}");
    }
}
