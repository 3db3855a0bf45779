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
    fn rotate(x: &[f32], cos: &[f32], sin: &[f32], y: &mut [f32]) {
        let half = cos.len();
        let (x1, rest) = x.split_at(half);
        let (x2, rest) = rest.split_at(half);
        let (y1, tail) = y.split_at_mut(half);
        let (y2, tail) = tail.split_at_mut(half);
        let sin = &sin[..half];
        for i in 0..half {
            y1[i] = x1[i] * cos[i] - x2[i] * sin[i];
            y2[i] = x2[i] * cos[i] + x1[i] * sin[i];
        }
        tail.copy_from_slice(rest);
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
        let mut y = vec![0f32; x.len()];
        y.par_chunks_mut(heads * dim)
            .zip(x.values().par_chunks(heads * dim))
            .zip(cos.par_iter().zip(sin.par_iter()))
            .with_min_len((1 << 14) / (heads * dim).max(1) + 1)
            .for_each(|((y, x), (cos, sin))| {
                for (y, x) in y.chunks_exact_mut(dim).zip(x.chunks_exact(dim)) {
                    rotate(x, cos, sin, y);
                }
            });
        f32_tensor_of(y, shape)
    }
}
