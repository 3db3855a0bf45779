//! Rotary position embedding: inverse frequencies and the cos/sin tables.
//!
//! The formulas are those of transformers' `modeling_rope_utils.py`; each [`RopeScaling`] names its source.

use std::borrow::Cow;
use std::collections::HashMap;
use std::f64::consts::PI;

/// How the inverse frequencies are derived from the base.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Su et al. 2021, <https://arxiv.org/abs/2104.09864>: `theta^(-2i/d)`.
    Default,
    /// Position interpolation: every frequency divided by `factor` (Chen et al. 2023, <https://arxiv.org/abs/2306.15595>).
    Linear {
        /// How many times longer the context becomes.
        factor: f64,
    },
    /// NTK-aware scaling of the base once a sequence is longer than `max_position_embeddings`.
    Dynamic {
        /// How fast the base grows.
        factor: f64,
    },
    /// Llama 3.1's: long wavelengths divided by `factor`, short ones kept, a ramp in between.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length before the extension.
        original_max_position_embeddings: usize,
    },
    /// YaRN (Peng et al. 2023, <https://arxiv.org/abs/2309.00071>).
    Yarn {
        /// How many times longer the context becomes.
        factor: f64,
        /// What cos and sin are multiplied with.
        attention_factor: f64,
        /// Rotations over the original context above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated.
        beta_slow: f64,
        /// Whether the ramp's ends are rounded outwards to whole dimensions.
        truncate: bool,
        /// Context length before the extension.
        original_max_position_embeddings: usize,
    },
}

/// The rotary embedding of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// The base of the geometric progression of wavelengths.
    pub theta: f64,
    /// How many of a head's dimensions are rotated, an even number.
    pub dims: usize,
    /// Context length; only [`RopeScaling::Dynamic`] depends on it.
    pub max_position_embeddings: usize,
    /// How the frequencies are scaled.
    pub scaling: RopeScaling,
}

impl RopeConfig {
    /// Whether a token's angles depend on the length of its document, so that two documents cannot share a token.
    pub fn depends_on_length(&self) -> bool {
        matches!(self.scaling, RopeScaling::Dynamic { .. })
    }
}

/// Frequencies computed once, and tables made from them for each input.
#[derive(Clone, Debug)]
pub struct Rope {
    config: RopeConfig,
    frequencies: Vec<f32>,
    attention_factor: f32,
}

impl Rope {
    /// Computes the frequencies of `config`.
    pub fn new(config: RopeConfig) -> Self {
        let attention_factor = match config.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        };
        let frequencies = frequencies(&config);
        Self { config, frequencies, attention_factor }
    }

    /// Half of the rotated dimensions: the length of one row of the tables.
    pub fn half(&self) -> usize {
        self.config.dims / 2
    }

    /// Inverse frequencies for a sequence of `length` tokens, `[dims / 2]`.
    pub fn inverse_frequencies(&self, length: usize) -> Cow<'_, [f32]> {
        match self.config.scaling {
            RopeScaling::Dynamic { factor } if length > self.config.max_position_embeddings => {
                Cow::Owned(dynamic(&self.config, factor, length))
            }
            _ => Cow::Borrowed(&self.frequencies),
        }
    }

    /// `(cos, sin)` of `position * frequency`, both `[positions.len(), dims / 2]` row-major and multiplied with the
    /// attention factor.
    ///
    /// `documents[i]` names the document of token `i`: with [`RopeScaling::Dynamic`] a document's own length decides
    /// about its frequencies, so that a document packed with others gets the numbers it would get alone.
    pub fn tables(&self, positions: &[u32], documents: impl Iterator<Item = (usize, u32)>) -> (Vec<f32>, Vec<f32>) {
        let half = self.half();
        let mut cos = Vec::with_capacity(positions.len() * half);
        let mut sin = Vec::with_capacity(positions.len() * half);
        // Positions repeat over rows and documents while sines are slow, so each angle is computed once.
        let mut known: HashMap<(u32, usize), usize> = HashMap::new();
        for (token, (&position, length)) in positions.iter().zip(self.lengths(positions, documents)).enumerate() {
            let first = *known.entry((position, length)).or_insert(token);
            if first < token {
                cos.extend_from_within(first * half..(first + 1) * half);
                sin.extend_from_within(first * half..(first + 1) * half);
                continue;
            }
            for &frequency in self.inverse_frequencies(length).iter() {
                let (s, c) = (position as f32 * frequency).sin_cos();
                cos.push(c * self.attention_factor);
                sin.push(s * self.attention_factor);
            }
        }
        (cos, sin)
    }

    /// For each token the length that decides about its frequencies: 0 where lengths change nothing.
    fn lengths(&self, positions: &[u32], documents: impl Iterator<Item = (usize, u32)>) -> Vec<usize> {
        if !self.config.depends_on_length() {
            return vec![0; positions.len()];
        }
        let documents: Vec<_> = documents.collect();
        let mut longest: HashMap<(usize, u32), usize> = HashMap::new();
        for (document, &position) in documents.iter().zip(positions) {
            let length = longest.entry(*document).or_default();
            *length = (*length).max(position as usize + 1);
        }
        // Every length up to the trained one has the same frequencies and so shares its table rows.
        documents.iter().map(|d| longest[d].max(self.config.max_position_embeddings)).collect()
    }
}

/// `theta^(2i/d)`: the power is taken in f64 and rounded once, which is what torch's f32 `pow` aims at.
fn wavelengths(theta: f64, dims: usize) -> impl Iterator<Item = f32> {
    (0..dims).step_by(2).map(move |i| theta.powf(f64::from(i as f32 / dims as f32)) as f32)
}

fn frequencies(config: &RopeConfig) -> Vec<f32> {
    let plain = wavelengths(config.theta, config.dims).map(|w| 1.0 / w);
    match config.scaling {
        RopeScaling::Default | RopeScaling::Dynamic { .. } => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|f| f / factor as f32).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let original = original_max_position_embeddings as f32;
            let (factor, low, high) = (factor as f32, low_freq_factor as f32, high_freq_factor as f32);
            plain
                .map(|frequency| {
                    let wavelength = 2.0 * PI as f32 / frequency;
                    if wavelength > original / low {
                        frequency / factor
                    } else if wavelength < original / high {
                        frequency
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        (1.0 - smooth) * frequency / factor + smooth * frequency
                    }
                })
                .collect()
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, truncate, original_max_position_embeddings, .. } => {
            let (dims, original) = (config.dims as f64, original_max_position_embeddings as f64);
            // The dimension that makes `rotations` full turns over the original context.
            let dimension =
                |rotations: f64| dims * (original / (rotations * 2.0 * PI)).ln() / (2.0 * config.theta.ln());
            let (mut low, mut high) = (dimension(beta_fast), dimension(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(dims - 1.0));
            if low == high {
                high += 0.001;
            }
            wavelengths(config.theta, config.dims)
                .enumerate()
                .map(|(i, wavelength)| {
                    let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                    let keep = 1.0 - ramp;
                    (1.0 / (factor as f32 * wavelength)) * (1.0 - keep) + (1.0 / wavelength) * keep
                })
                .collect()
        }
    }
}

fn dynamic(config: &RopeConfig, factor: f64, length: usize) -> Vec<f32> {
    let dims = config.dims as f64;
    let stretch = factor * length as f64 / config.max_position_embeddings as f64 - (factor - 1.0);
    let theta = config.theta * stretch.powf(dims / (dims - 2.0));
    wavelengths(theta, config.dims).map(|w| 1.0 / w).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope::new(RopeConfig { theta: 10_000.0, dims: 8, max_position_embeddings: 16, scaling })
    }

    fn assert_close(got: &[f32], want: &[f32]) {
        assert_eq!(got.len(), want.len());
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() <= 2e-7 * w.abs(), "{got:?} is not {want:?}");
        }
    }

    #[test]
    fn default_frequencies_are_a_geometric_progression() {
        assert_close(&rope(RopeScaling::Default).inverse_frequencies(9), &[1.0, 0.1, 0.01, 0.001]);
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        let scaled = rope(RopeScaling::Linear { factor: 4.0 });
        assert_close(&scaled.inverse_frequencies(9), &[0.25, 0.025, 0.0025, 0.00025]);
    }

    #[test]
    fn dynamic_scaling_starts_past_the_trained_length() {
        let scaled = rope(RopeScaling::Dynamic { factor: 2.0 });
        assert_close(&scaled.inverse_frequencies(16), &[1.0, 0.1, 0.01, 0.001]);
        // base · (2·32/16 − 1)^(8/6)
        let theta = 10_000f64 * 3f64.powf(8.0 / 6.0);
        let want: Vec<f32> = (0..4).map(|i| theta.powf(-f64::from(i) / 4.0) as f32).collect();
        assert_close(&scaled.inverse_frequencies(32), &want);
    }

    #[test]
    fn a_document_packed_behind_a_long_one_keeps_its_own_frequencies() {
        let scaled = rope(RopeScaling::Dynamic { factor: 2.0 });
        let positions: Vec<u32> = (0..32).chain(0..4).collect();
        let documents = (0..36).map(|i| (0, if i < 32 { 0 } else { 32 }));
        let (packed, _) = scaled.tables(&positions, documents);
        let (alone, _) = scaled.tables(&[0, 1, 2, 3], (0..4).map(|_| (0, 0)));
        assert_eq!(packed[32 * 4..], alone[..]);
    }

    #[test]
    fn tables_repeat_where_positions_repeat_and_carry_the_attention_factor() {
        let yarn = rope(RopeScaling::Yarn {
            factor: 4.0,
            attention_factor: 1.5,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            original_max_position_embeddings: 16,
        });
        let (cos, sin) = yarn.tables(&[0, 3, 0, 3], (0..4).map(|_| (0, 0)));
        assert_eq!(cos[..4], [1.5; 4]);
        assert_eq!(sin[..4], [0.0; 4]);
        assert_eq!((&cos[..8], &sin[..8]), (&cos[8..], &sin[8..]));
    }
}
