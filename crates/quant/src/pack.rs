//! Packing: from a stream of dense bytes to a packed weight, without a dense copy in between.

use half::f16;
use rayon::prelude::*;

use crate::dense::{largest_magnitude, widen};
use crate::int8::{row_codes, through_f16};
use crate::{Codebook, DoubleScales, FloatDtype, FourBit, Int8, PackedWeight, QuantError, Scales, Scheme};

/// Elements that one worker packs at a time, at least: large enough to hide the scheduling.
const CHUNK: usize = 1 << 15;

/// Below this, bitsandbytes takes no reciprocal.
const SMALLEST_SCALE: f32 = 1e-38;

/// Packs a weight that is in memory, or mapped, as a whole. See [`Packer`].
///
/// # Errors
/// Those of [`Packer`].
pub fn pack(
    tensor: &str,
    shape: [usize; 2],
    dtype: FloatDtype,
    bytes: &[u8],
    scheme: Scheme,
) -> Result<PackedWeight, QuantError> {
    let mut packer = Packer::new(tensor, shape, dtype, scheme)?;
    packer.push(bytes)?;
    packer.finish()
}

/// Packs a weight whose little-endian bytes arrive piece by piece, in any pieces, on all cores.
///
/// Beside the packed weight it holds one block (one row for INT8) that is not complete yet, and with double
/// quantisation one f32 per block.
#[derive(Debug)]
pub struct Packer {
    weight: Weight,
    scheme: Scheme,
    /// Elements that are packed together: a block or a row.
    unit: usize,
    codes: Vec<u8>,
    scales: Vec<f32>,
    /// Bytes of the unit that is not complete yet.
    pending: Vec<u8>,
    /// Units that are packed.
    done: usize,
    received: usize,
}

/// What is packed, for arithmetic and for errors.
#[derive(Debug)]
struct Weight {
    tensor: String,
    shape: [usize; 2],
    dtype: FloatDtype,
}

impl Packer {
    /// A packer for the weight `[out_features, in_features]` that errors call `tensor`.
    ///
    /// # Errors
    /// [`QuantError::Shape`] for a weight without elements, or with more than can be addressed.
    pub fn new(tensor: &str, shape: [usize; 2], dtype: FloatDtype, scheme: Scheme) -> Result<Self, QuantError> {
        let tensor = tensor.to_owned();
        let elements = shape[0].checked_mul(shape[1]).filter(|&count| count > 0);
        let Some(elements) = elements.filter(|count| count.checked_mul(dtype.size()).is_some()) else {
            return Err(QuantError::Shape { tensor, shape });
        };
        let (unit, codes) = match scheme {
            Scheme::FourBit { block_size, .. } => (block_size.get(), elements.div_ceil(2)),
            Scheme::Int8 => (shape[1], elements),
        };
        Ok(Self {
            weight: Weight { tensor, shape, dtype },
            scheme,
            unit,
            codes: vec![0; codes],
            scales: vec![0.0; elements.div_ceil(unit)],
            pending: Vec::new(),
            done: 0,
            received: 0,
        })
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// [`QuantError::NotFinite`] and [`QuantError::BeyondF16`] for the first element that cannot be packed,
    /// [`QuantError::Length`] when there are more bytes than the shape has.
    pub fn push(&mut self, mut bytes: &[u8]) -> Result<(), QuantError> {
        self.received = self.received.saturating_add(bytes.len());
        if self.received > self.weight.bytes() {
            return Err(self.weight.wrong_length(self.received));
        }
        let unit = self.unit * self.weight.dtype.size();
        if !self.pending.is_empty() {
            let missing = (unit - self.pending.len()).min(bytes.len());
            self.pending.extend_from_slice(&bytes[..missing]);
            bytes = &bytes[missing..];
            if self.pending.len() < unit {
                return Ok(());
            }
            let pending = std::mem::take(&mut self.pending);
            self.pack_units(&pending)?;
        }
        let (whole, rest) = bytes.split_at(bytes.len() / unit * unit);
        self.pack_units(whole)?;
        self.pending.extend_from_slice(rest);
        Ok(())
    }

    /// The packed weight.
    ///
    /// # Errors
    /// [`QuantError::Length`] when bytes are missing, [`QuantError::ScaleOverflow`] when a scale has no 8-bit form, and
    /// those of [`push`](Self::push) for a last, shorter block.
    pub fn finish(mut self) -> Result<PackedWeight, QuantError> {
        if self.received != self.weight.bytes() {
            return Err(self.weight.wrong_length(self.received));
        }
        let Weight { shape, dtype, .. } = self.weight;
        Ok(match self.scheme {
            Scheme::FourBit { codebook, block_size, double_quant } => {
                if !self.pending.is_empty() {
                    self.pack_tail(codebook)?;
                }
                let scales = if double_quant { self.double_scales()? } else { Scales::Plain(self.scales) };
                PackedWeight::FourBit(FourBit { codebook, block_size, shape, dtype, codes: self.codes, scales })
            }
            Scheme::Int8 => {
                let codes = self.codes.into_iter().map(u8::cast_signed).collect();
                PackedWeight::Int8(Int8 { shape, codes, scales: self.scales })
            }
        })
    }

    fn double_scales(&self) -> Result<Scales, QuantError> {
        let double = DoubleScales::quantise(&self.scales);
        let blocks = 0..self.scales.len();
        if blocks.clone().all(|block| double.scale(block).is_finite()) {
            return Ok(Scales::Double(double));
        }
        // Their sum may have overflowed, and then all of them are affected: the largest is to blame.
        let block = blocks.max_by(|&a, &b| self.scales[a].total_cmp(&self.scales[b])).unwrap_or_default();
        let (tensor, columns, first) = (self.weight.tensor.clone(), self.weight.shape[1], block * self.unit);
        let (row, column) = (first / columns, first % columns);
        Err(QuantError::ScaleOverflow { tensor, row, column, block_size: self.unit, largest: self.scales[block] })
    }

    /// Packs whole blocks or rows.
    fn pack_units(&mut self, bytes: &[u8]) -> Result<(), QuantError> {
        let (unit, dtype, scheme) = (self.unit, self.weight.dtype, self.scheme);
        let unit_bytes = unit * dtype.size();
        let unit_codes = match scheme {
            Scheme::FourBit { .. } => unit / 2,
            Scheme::Int8 => unit,
        };
        let done = self.done..self.done + bytes.len() / unit_bytes;
        let codes = &mut self.codes[done.start * unit_codes..done.end * unit_codes];
        let units = bytes
            .par_chunks_exact(unit_bytes)
            .zip(codes.par_chunks_exact_mut(unit_codes))
            .zip(&mut self.scales[done.clone()])
            .enumerate()
            .with_min_len(CHUNK.div_ceil(unit));
        let refused = units.map_init(Scratch::default, |scratch, (index, ((bytes, codes), scale))| {
            scratch.widen(bytes, dtype);
            let packed = match scheme {
                Scheme::FourBit { codebook, .. } => scratch.pack_block(codebook, codes),
                Scheme::Int8 => scratch.pack_row(codes),
            };
            match packed {
                Ok(found) => *scale = found,
                Err(refused) => return Some(refused.after((done.start + index) * unit)),
            }
            None
        });
        if let Some(refused) = refused.find_map_first(|refused| refused) {
            return Err(self.weight.refuse(refused));
        }
        self.done = done.end;
        Ok(())
    }

    /// Packs the last block, which is shorter than the others. For it bitsandbytes divides by the scale, which it keeps
    /// from being 0.
    fn pack_tail(&mut self, codebook: Codebook) -> Result<(), QuantError> {
        let mut scratch = Scratch::default();
        scratch.widen(&self.pending, self.weight.dtype);
        let start = self.done * self.unit;
        let scale = checked_scale(&scratch.values).map_err(|refused| self.weight.refuse(refused.after(start)))?;
        let scale = scale.max(SMALLEST_SCALE);
        scratch.values.iter_mut().for_each(|value| *value /= scale);
        if scratch.values.len() % 2 == 1 {
            scratch.values.push(0.0);
        }
        scratch.write_nearest(codebook, &mut self.codes[start / 2..]);
        self.scales[self.done] = scale;
        Ok(())
    }
}

impl Weight {
    /// Bytes that shape and dtype take.
    fn bytes(&self) -> usize {
        self.shape[0] * self.shape[1] * self.dtype.size()
    }

    fn wrong_length(&self, found: usize) -> QuantError {
        let Self { ref tensor, shape, dtype } = *self;
        QuantError::Length { tensor: tensor.clone(), shape, dtype, expected: self.bytes(), found }
    }

    fn refuse(&self, refused: Refused) -> QuantError {
        let tensor = self.tensor.clone();
        let (row, column) = (refused.index / self.shape[1], refused.index % self.shape[1]);
        let value = refused.value;
        match value.is_finite() {
            true => QuantError::BeyondF16 { tensor, row, column, value },
            false => QuantError::NotFinite { tensor, row, column, value },
        }
    }
}

/// An element that cannot be packed.
struct Refused {
    index: usize,
    value: f32,
}

impl Refused {
    /// The first of `values` that is refused.
    fn first(values: &[f32], refuse: impl Fn(f32) -> bool) -> Option<Self> {
        let index = values.iter().position(|&value| refuse(value))?;
        Some(Self { index, value: values[index] })
    }

    /// The same element, counted from `elements` before the values.
    fn after(self, elements: usize) -> Self {
        Self { index: self.index + elements, ..self }
    }
}

/// What one worker computes in.
#[derive(Default)]
struct Scratch {
    values: Vec<f32>,
    half: Vec<f16>,
    codes: Vec<u8>,
}

impl Scratch {
    /// Reads the elements in `bytes` as f32.
    fn widen(&mut self, bytes: &[u8], dtype: FloatDtype) {
        self.values.resize(bytes.len() / dtype.size(), 0.0);
        widen(bytes, dtype, &mut self.values);
    }

    /// Packs the values as a whole block; returns its scale.
    fn pack_block(&mut self, codebook: Codebook, codes: &mut [u8]) -> Result<f32, Refused> {
        let scale = checked_scale(&self.values)?;
        let inverse = 1.0 / scale.max(SMALLEST_SCALE);
        self.values.iter_mut().for_each(|value| *value *= inverse);
        self.write_nearest(codebook, codes);
        Ok(scale)
    }

    /// Writes the codes of the values, which are even in number, in pairs, the first of each into the high half.
    fn write_nearest(&mut self, codebook: Codebook, codes: &mut [u8]) {
        self.codes.resize(self.values.len(), 0);
        codebook.nearest(&self.values, &mut self.codes);
        let (pairs, _) = self.codes.as_chunks();
        codes.iter_mut().zip(pairs).for_each(|(byte, [high, low])| *byte = high << 4 | low);
    }

    /// Packs the values as a whole row in INT8; returns its scale.
    fn pack_row(&mut self, codes: &mut [u8]) -> Result<f32, Refused> {
        let beyond = |value| f16::from_f32(value).is_infinite();
        if beyond(checked_scale(&self.values)?)
            && let Some(refused) = Refused::first(&self.values, beyond)
        {
            return Err(refused);
        }
        through_f16(&mut self.values, &mut self.half);
        let scale = largest_magnitude(&self.values);
        codes.iter_mut().zip(row_codes(&self.values, scale)).for_each(|(slot, code)| *slot = code.cast_unsigned());
        Ok(scale)
    }
}

/// The largest magnitude, unless an element is not finite.
fn checked_scale(values: &[f32]) -> Result<f32, Refused> {
    let scale = largest_magnitude(values);
    let refused = if scale.is_finite() { None } else { Refused::first(values, |value| !value.is_finite()) };
    refused.map_or(Ok(scale), Err)
}
