//! What to pack into, and the packed weight whatever it is.

use std::fmt;
use std::str::FromStr;

use crate::{BlockSize, Codebook, FourBit, Int8, Scales, UnknownKind};

/// A quantised format, as a recipe names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QuantKind {
    /// 4-bit NormalFloat.
    Nf4,
    /// 4-bit floating point.
    Fp4,
    /// 8-bit integers.
    Int8,
}

impl QuantKind {
    /// `nf4`, `fp4` or `int8`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf4 => Codebook::Nf4.name(),
            Self::Fp4 => Codebook::Fp4.name(),
            Self::Int8 => "int8",
        }
    }

    /// What the codes mean, for the 4-bit kinds.
    pub const fn codebook(self) -> Option<Codebook> {
        match self {
            Self::Nf4 => Some(Codebook::Nf4),
            Self::Fp4 => Some(Codebook::Fp4),
            Self::Int8 => None,
        }
    }
}

impl From<Codebook> for QuantKind {
    fn from(codebook: Codebook) -> Self {
        match codebook {
            Codebook::Nf4 => Self::Nf4,
            Codebook::Fp4 => Self::Fp4,
        }
    }
}

impl fmt::Display for QuantKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for QuantKind {
    type Err = UnknownKind;

    fn from_str(text: &str) -> Result<Self, UnknownKind> {
        let kinds = [Self::Nf4, Self::Fp4, Self::Int8];
        kinds.into_iter().find(|kind| kind.name() == text).ok_or_else(|| UnknownKind(text.to_owned()))
    }
}

/// Everything that decides a packed weight's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// 4 bits per element and a scale for every block.
    FourBit {
        /// What the codes mean.
        codebook: Codebook,
        /// Elements that share a scale.
        block_size: BlockSize,
        /// Whether the scales are themselves in 8 bits.
        double_quant: bool,
    },
    /// 8 bits per element and a scale for every row.
    Int8,
}

impl Scheme {
    /// The scheme of a kind; INT8 has neither blocks nor a second quantisation and ignores both.
    pub const fn new(kind: QuantKind, block_size: BlockSize, double_quant: bool) -> Self {
        match kind.codebook() {
            Some(codebook) => Self::FourBit { codebook, block_size, double_quant },
            None => Self::Int8,
        }
    }

    /// The format's name.
    pub fn kind(self) -> QuantKind {
        match self {
            Self::FourBit { codebook, .. } => codebook.into(),
            Self::Int8 => QuantKind::Int8,
        }
    }
}

impl fmt::Display for Scheme {
    /// For reports: `nf4 in blocks of 64, double quantised`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FourBit { codebook, block_size, double_quant } => {
                let double = if *double_quant { ", double quantised" } else { "" };
                write!(f, "{codebook} in blocks of {block_size}{double}")
            }
            Self::Int8 => f.write_str(QuantKind::Int8.name()),
        }
    }
}

/// A weight in a quantised format.
#[derive(Clone, Debug, PartialEq)]
pub enum PackedWeight {
    /// NF4 or FP4.
    FourBit(FourBit),
    /// INT8.
    Int8(Int8),
}

impl PackedWeight {
    /// `[out_features, in_features]`.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::FourBit(weight) => weight.shape(),
            Self::Int8(weight) => weight.shape(),
        }
    }

    /// The format's name.
    pub fn kind(&self) -> QuantKind {
        self.scheme().kind()
    }

    /// How the weight is packed. A checkpoint agrees with a recipe when their schemes are equal.
    pub fn scheme(&self) -> Scheme {
        match self {
            Self::FourBit(weight) => Scheme::FourBit {
                codebook: weight.codebook(),
                block_size: weight.block_size(),
                double_quant: matches!(weight.scales(), Scales::Double(_)),
            },
            Self::Int8(_) => Scheme::Int8,
        }
    }

    /// Bytes that codes and scales take.
    pub fn bytes(&self) -> usize {
        match self {
            Self::FourBit(weight) => weight.bytes(),
            Self::Int8(weight) => weight.bytes(),
        }
    }

    /// Writes the elements from `start` on, in row-major order, into `out`: as many as it holds.
    ///
    /// # Panics
    /// When the weight ends before `out` does.
    pub fn dequantise(&self, start: usize, out: &mut [f32]) {
        match self {
            Self::FourBit(weight) => weight.dequantise(start, out),
            Self::Int8(weight) => weight.dequantise(start, out),
        }
    }
}
