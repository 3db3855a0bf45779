//! A weight in 4 bits per element, with a scale for every block.

use std::fmt;
use std::ops::Range;

use crate::dense::assert_within;
use crate::{Codebook, DoubleScales, FloatDtype, UnknownBlockSize};

/// Elements that share a scale: a power of two from 32 to 4096.
///
/// Blocks are counted over the flattened weight, row by row, so one may straddle rows; the last may be shorter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockSize(u16);

impl BlockSize {
    /// The number of elements.
    pub const fn get(self) -> usize {
        self.0 as usize
    }
}

impl Default for BlockSize {
    /// 64, as in bitsandbytes.
    fn default() -> Self {
        Self(64)
    }
}

impl TryFrom<usize> for BlockSize {
    type Error = UnknownBlockSize;

    fn try_from(size: usize) -> Result<Self, UnknownBlockSize> {
        match u16::try_from(size) {
            Ok(short @ 32..=4096) if size.is_power_of_two() => Ok(Self(short)),
            _ => Err(UnknownBlockSize(size)),
        }
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The scale of every block.
#[derive(Clone, Debug, PartialEq)]
pub enum Scales {
    /// The largest magnitude of each block, in f32.
    Plain(Vec<f32>),
    /// The same in 8 bits.
    Double(DoubleScales),
}

impl Scales {
    /// The scale of a block.
    ///
    /// # Panics
    /// When there are fewer blocks.
    #[inline]
    pub fn get(&self, block: usize) -> f32 {
        match self {
            Self::Plain(absmax) => absmax[block],
            Self::Double(double) => double.scale(block),
        }
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        match self {
            Self::Plain(absmax) => absmax.len(),
            Self::Double(double) => double.codes.len(),
        }
    }

    /// Bytes that the scales take.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Plain(absmax) => size_of_val(absmax.as_slice()),
            Self::Double(double) => double.bytes(),
        }
    }
}

/// A weight in NF4 or FP4: codes, two to a byte, and scales.
///
/// All parts agree with each other: it is made by packing or by reading a checkpoint, and both check.
#[derive(Clone, Debug, PartialEq)]
pub struct FourBit {
    pub(crate) codebook: Codebook,
    pub(crate) block_size: BlockSize,
    pub(crate) shape: [usize; 2],
    pub(crate) dtype: FloatDtype,
    pub(crate) codes: Vec<u8>,
    pub(crate) scales: Scales,
}

impl FourBit {
    /// What the codes mean.
    pub fn codebook(&self) -> Codebook {
        self.codebook
    }

    /// Elements that share a scale.
    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// `[out_features, in_features]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The format that the weight had before it was packed.
    pub fn dtype(&self) -> FloatDtype {
        self.dtype
    }

    /// The codes of the flattened weight, the element with the even index in the high half of a byte.
    /// After an odd number of elements the last half is padding.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// The scales of the blocks of the flattened weight.
    pub fn scales(&self) -> &Scales {
        &self.scales
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// Whether there are no elements; packing refuses such weights.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that codes and scales take.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.scales.bytes()
    }

    /// Writes the elements from `start` on, in row-major order, into `out`: as many as it holds.
    ///
    /// An element is the value of its code times the scale of its block, rounded once to f32.
    ///
    /// # Panics
    /// When the weight ends before `out` does.
    pub fn dequantise(&self, start: usize, out: &mut [f32]) {
        for (block, range) in self.runs(start, out.len()) {
            let scale = self.scales.get(block);
            let scaled = self.codebook.values().map(|value| value * scale);
            look_up(&scaled, &self.codes, range.start, &mut out[range.start - start..range.end - start]);
        }
    }

    /// The blocks that cover `len` elements from `start` on, and which of these elements lie in each.
    ///
    /// # Panics
    /// When the weight ends before.
    pub fn runs(&self, start: usize, len: usize) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let size = self.block_size.get();
        assert_within(start, len, self.len());
        let end = start + len;
        let blocks = if len == 0 { 0..0 } else { start / size..(end - 1) / size + 1 };
        blocks.map(move |block| (block, start.max(block * size)..end.min((block + 1) * size)))
    }
}

/// Reads the codes of elements from `at` on through a table of values that already hold the block's scale.
#[inline]
fn look_up(scaled: &[f32; 16], codes: &[u8], at: usize, out: &mut [f32]) {
    let (first, out) = out.split_at_mut((at % 2).min(out.len()));
    if let [first] = first {
        *first = scaled[usize::from(codes[at / 2] & 15)];
    }
    let codes = &codes[at.div_ceil(2)..];
    let (pairs, last) = out.as_chunks_mut();
    for ([high, low], byte) in pairs.iter_mut().zip(codes) {
        *high = scaled[usize::from(byte >> 4)];
        *low = scaled[usize::from(byte & 15)];
    }
    if let [last] = last {
        *last = scaled[usize::from(codes[pairs.len()] >> 4)];
    }
}
