//! The CPU body: both halves of a head are turned where they are read.

use burn::backend::Flex;
use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;
use rayon::prelude::*;

use super::{RopeOps, generic};
use crate::flex::{Rows, f32_tensor_of};
use crate::simd::vectorised;

vectorised! {
    /// Turns a head by the angles of its position.
    pub(crate) fn rotate(x: &mut [f32], cos: &[f32], sin: &[f32]) {
        let half = cos.len();
        let (x1, rest) = x.split_at_mut(half);
        let (x2, sin) = (&mut rest[..half], &sin[..half]);
        for i in 0..half {
            (x1[i], x2[i]) = (x1[i] * cos[i] - x2[i] * sin[i], x2[i] * cos[i] + x1[i] * sin[i]);
        }
    }
}

vectorised! {
    /// Turns it by the opposite angles.
    pub(crate) fn rotate_back(x: &mut [f32], cos: &[f32], sin: &[f32]) {
        let half = cos.len();
        let (x1, rest) = x.split_at_mut(half);
        let (x2, sin) = (&mut rest[..half], &sin[..half]);
        for i in 0..half {
            (x1[i], x2[i]) = (x1[i] * cos[i] + x2[i] * sin[i], x2[i] * cos[i] - x1[i] * sin[i]);
        }
    }
}

impl RopeOps for Flex {
    fn rope(x: FlexTensor, cos: FlexTensor, sin: FlexTensor) -> FlexTensor {
        if [&x, &cos, &sin].iter().any(|t| t.dtype() != DType::F32) {
            return generic::rope::<Self>(x, cos, sin);
        }
        let shape = x.shape();
        let [_, _, heads, dim] = shape.dims();
        let (x, cos, sin) = (Rows::of(&x), Rows::of(&cos), Rows::of(&sin));
        let mut y = x.values().to_vec();
        y.par_chunks_mut(heads * dim)
            .zip(cos.par_iter().zip(sin.par_iter()))
            .with_min_len((1 << 14) / (heads * dim).max(1) + 1)
            .for_each(|(y, (cos, sin))| y.chunks_exact_mut(dim).for_each(|head| rotate(head, cos, sin)));
        f32_tensor_of(y, shape)
    }
}
