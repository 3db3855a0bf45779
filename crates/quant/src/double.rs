//! Double quantisation: the scales of 4-bit blocks, themselves in 8 bits.
//!
//! The mean of all scales is taken off, and what is left is quantised in blocks of 256 with bitsandbytes' dynamic map
//! ([8-bit optimizers](https://arxiv.org/abs/2110.02861), section 1.3). A scale is then
//! `map[code] · absmax + offset`, in f32 and in this order.

use std::sync::{Arc, OnceLock};

use crate::dense::largest_magnitude;

/// Scales that share one absmax.
pub const NESTED_BLOCK: usize = 256;

/// The scales of a weight's blocks, in 8 bits each.
#[derive(Clone, Debug, PartialEq)]
pub struct DoubleScales {
    pub(crate) codes: Vec<u8>,
    pub(crate) absmax: Vec<f32>,
    pub(crate) offset: f32,
    pub(crate) map: Arc<[f32; 256]>,
}

impl DoubleScales {
    /// Quantises scales as bitsandbytes' CPU code does, bit for bit.
    pub(crate) fn quantise(scales: &[f32]) -> Self {
        let map = dynamic_map();
        let midpoints: Vec<f32> = map.windows(2).map(|pair| 0.5 * (pair[0] + pair[1])).collect();
        let offset = mean(scales);
        let mut codes = Vec::with_capacity(scales.len());
        let mut absmax = Vec::with_capacity(scales.len().div_ceil(NESTED_BLOCK));
        let mut rest = [0.0; NESTED_BLOCK];
        for block in scales.chunks(NESTED_BLOCK) {
            let rest = &mut rest[..block.len()];
            rest.iter_mut().zip(block).for_each(|(rest, scale)| *rest = scale - offset);
            let largest = largest_magnitude(rest);
            absmax.push(largest);
            if largest == 0.0 {
                codes.resize(codes.len() + rest.len(), 0);
            } else {
                let inverse = 1.0 / largest;
                codes.extend(rest.iter().map(|value| nearest(value * inverse, &midpoints)));
            }
        }
        Self { codes, absmax, offset, map }
    }

    /// The scale of a block.
    #[inline]
    pub fn scale(&self, block: usize) -> f32 {
        self.map[usize::from(self.codes[block])] * self.absmax[block / NESTED_BLOCK] + self.offset
    }

    /// One code per block.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// One scale per [`NESTED_BLOCK`] codes.
    pub fn absmax(&self) -> &[f32] {
        &self.absmax
    }

    /// What is added to every scale.
    pub fn offset(&self) -> f32 {
        self.offset
    }

    /// What the codes stand for. Weights that were packed with the [`dynamic_map`] share one copy of it.
    pub fn map(&self) -> &Arc<[f32; 256]> {
        &self.map
    }

    /// Bytes of codes, scales and offset; not of the map, which weights share.
    pub fn bytes(&self) -> usize {
        self.codes.len() + size_of_val(self.absmax.as_slice()) + size_of::<f32>()
    }
}

/// bitsandbytes sorts a value into one of 65536 bins and takes the code that is nearest to where its bin begins.
/// The map is finer than the bins around zero, so this is not always the nearest code.
fn nearest(value: f32, midpoints: &[f32]) -> u8 {
    let bin = ((value.clamp(-1.0, 1.0) + 1.0) * 0.5 * 65535.0 + 0.5) as u16;
    let value = -1.0 + (2.0 * f32::from(bin)) / 65535.0;
    midpoints.partition_point(|&midpoint| midpoint < value) as u8
}

/// bitsandbytes' signed dynamic map, `create_dynamic_map()`: 256 ascending values in [-1, 1].
///
/// The seven exponents of ten from 1e-6 to 1 are divided into 1, 2, 4, … 64 even parts, and every part is represented by
/// its middle, with both signs; 0 and 1 complete it.
pub fn dynamic_map() -> Arc<[f32; 256]> {
    static MAP: OnceLock<Arc<[f32; 256]>> = OnceLock::new();
    MAP.get_or_init(|| Arc::new(build_dynamic_map())).clone()
}

fn build_dynamic_map() -> [f32; 256] {
    let mut map = [0.0; 256];
    let mut at = 0;
    for (exponent, scale) in [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1f32].into_iter().enumerate() {
        let bounds = linspace(0.1, 1.0, (1 << exponent) + 1);
        for pair in bounds.windows(2) {
            let middle = scale * ((pair[0] + pair[1]) / 2.0);
            (map[at], map[at + 1]) = (middle, -middle);
            at += 2;
        }
    }
    map[at + 1] = 1.0; // 254 values so far; the other one that is left stays 0
    map.sort_unstable_by(f32::total_cmp);
    map
}

/// As `torch.linspace` computes it on a CPU: from both ends to the middle, each value rounded once.
fn linspace(start: f32, end: f32, count: usize) -> Vec<f32> {
    let step = (end - start) / (count - 1) as f32;
    let from_start = |i: usize| step.mul_add(i as f32, start);
    let from_end = |i: usize| (-step).mul_add((count - 1 - i) as f32, end);
    (0..count).map(|i| if i < count / 2 { from_start(i) } else { from_end(i) }).collect()
}

/// The mean as `torch.mean` adds it up on a CPU with vectors of eight: the order decides the last bits of the offset,
/// and through it the codes.
fn mean(values: &[f32]) -> f32 {
    const LANES: usize = 8;
    const ACCUMULATORS: usize = 4;
    let (vectors, tail) = values.as_chunks::<LANES>();
    let (groups, odd) = vectors.as_chunks::<ACCUMULATORS>();
    let mut sums = cascade(groups);
    for vector in odd {
        add(&mut sums[0], vector);
    }
    let [mut sum, others @ ..] = sums;
    others.iter().for_each(|other| add(&mut sum, other));
    let tail = tail.iter().fold(0.0, |total, value| total + value);
    let total = sum.iter().fold(tail, |total, lane| total + lane);
    total / values.len() as f32
}

/// PyTorch's cascade sum (`aten/src/ATen/native/cpu/SumKernel.cpp`): partial sums climb four levels, each of which
/// collects a power of two of those below, so that the rounding error grows with the logarithm of the length.
fn cascade<const L: usize, const A: usize>(groups: &[[[f32; L]; A]]) -> [[f32; L]; A] {
    const LEVELS: usize = 4;
    let ceil_log2 = groups.len().next_power_of_two().trailing_zeros() as usize;
    let power = (ceil_log2 / LEVELS).max(4);
    let step = 1 << power;
    let mut levels = [[[0.0; L]; A]; LEVELS];
    let whole = groups.len() / step * step;
    for (index, groups) in groups[..whole].chunks_exact(step).enumerate() {
        for group in groups {
            levels[0].iter_mut().zip(group).for_each(|(sum, vector)| add(sum, vector));
        }
        let done = (index + 1) * step;
        for level in 1..LEVELS {
            let below = std::mem::replace(&mut levels[level - 1], [[0.0; L]; A]);
            levels[level].iter_mut().zip(&below).for_each(|(sum, vector)| add(sum, vector));
            if done & ((step - 1) << (level * power)) != 0 {
                break;
            }
        }
    }
    let [mut sums, above @ ..] = levels;
    for group in &groups[whole..] {
        sums.iter_mut().zip(group).for_each(|(sum, vector)| add(sum, vector));
    }
    for level in &above {
        sums.iter_mut().zip(level).for_each(|(sum, vector)| add(sum, vector));
    }
    sums
}

fn add<const L: usize>(sum: &mut [f32; L], vector: &[f32; L]) {
    sum.iter_mut().zip(vector).for_each(|(sum, value)| *sum += value);
}
