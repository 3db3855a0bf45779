//! The sixteen values of a 4-bit format, and which of them is nearest.

use std::fmt;

/// A 4-bit format: what its sixteen codes mean, relative to the largest magnitude of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codebook {
    /// NormalFloat: quantiles of a normal distribution ([QLoRA](https://arxiv.org/abs/2305.14314), appendix E).
    Nf4,
    /// One sign bit, two of exponent, one of mantissa, divided by the largest value, 12.
    Fp4,
}

/// What bitsandbytes' `get_4bit_type("nf4")` holds.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// What bitsandbytes' `get_4bit_type("fp4")` holds, by bit pattern. Code 8 is the negative zero, stored as 0.
const FP4: [f32; 16] = {
    let twelfths = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0];
    let mut values = [0.0; 16];
    let mut code = 0;
    while code < 8 {
        values[code] = twelfths[code] / 12.0;
        values[code + 8] = if code == 0 { 0.0 } else { -twelfths[code] / 12.0 };
        code += 1;
    }
    values
};

/// FP4's codes by ascending value. The positive zero stands below the negative one, as PyTorch's `argsort` leaves them.
const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

const NF4_ORDER: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// Halfway between neighbours, as f32 rounds it.
const fn midpoints(values: &[f32; 16], order: &[u8; 16]) -> [f32; 15] {
    let mut bounds = [0.0; 15];
    let mut rank = 0;
    while rank < 15 {
        bounds[rank] = (values[order[rank] as usize] + values[order[rank + 1] as usize]) / 2.0;
        rank += 1;
    }
    bounds
}

const NF4_MIDPOINTS: [f32; 15] = midpoints(&NF4, &NF4_ORDER);
const FP4_MIDPOINTS: [f32; 15] = midpoints(&FP4, &FP4_ORDER);

impl Codebook {
    /// The name that recipes and bitsandbytes use: `nf4` or `fp4`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }

    /// What each code stands for. A weight is the value of its code times the scale of its block, in f32.
    pub const fn values(self) -> &'static [f32; 16] {
        match self {
            Self::Nf4 => &NF4,
            Self::Fp4 => &FP4,
        }
    }

    /// Replaces every value, which lies in [-1, 1], by the code that is nearest; halfway, by that of the lower value.
    ///
    /// A count of the midpoints below a value is its rank, and counting has no branches.
    pub(crate) fn nearest(self, values: &[f32], codes: &mut [u8]) {
        let (midpoints, order) = match self {
            Self::Nf4 => (&NF4_MIDPOINTS, &NF4_ORDER),
            Self::Fp4 => (&FP4_MIDPOINTS, &FP4_ORDER),
        };
        for (code, &value) in codes.iter_mut().zip(values) {
            let rank: u32 = midpoints.iter().map(|&midpoint| u32::from(value > midpoint)).sum();
            *code = rank as u8;
        }
        if self == Self::Fp4 {
            codes.iter_mut().for_each(|code| *code = order[usize::from(*code)]);
        }
    }
}

impl fmt::Display for Codebook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nearest(codebook: Codebook, value: f32) -> u8 {
        let mut code = [0];
        codebook.nearest(&[value], &mut code);
        code[0]
    }

    #[test]
    fn the_order_of_fp4_ascends() {
        assert!(FP4_ORDER.windows(2).all(|pair| FP4[usize::from(pair[0])] <= FP4[usize::from(pair[1])]));
    }

    #[test]
    fn every_value_is_nearest_to_itself() {
        for codebook in [Codebook::Nf4, Codebook::Fp4] {
            for &value in codebook.values() {
                assert_eq!(codebook.values()[usize::from(nearest(codebook, value))], value, "{codebook} {value}");
            }
        }
    }

    #[test]
    fn halfway_belongs_to_the_lower_value() {
        for rank in 0..15 {
            let midpoint = NF4_MIDPOINTS[rank];
            assert_eq!(usize::from(nearest(Codebook::Nf4, midpoint)), rank);
            assert_eq!(usize::from(nearest(Codebook::Nf4, midpoint.next_up())), rank + 1);
            let midpoint = FP4_MIDPOINTS[rank];
            assert_eq!(nearest(Codebook::Fp4, midpoint), FP4_ORDER[rank]);
            assert_eq!(nearest(Codebook::Fp4, midpoint.next_up()), FP4_ORDER[rank + 1]);
        }
    }
}
