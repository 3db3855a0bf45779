use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, backend_extension};

use super::{AdapterPath, generic};
use crate::body::plain_backends;

/// Products with a frozen weight. The default bodies run on any backend and are the reference for the others.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda"))
)]
pub trait LinearOps: Backend {
    /// y = x Wᵀ. `x` `[M, K]`, `w` `[N, K]` in any float format.
    fn frozen_linear(x: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        generic::frozen::<Self>(x, w)
    }

    /// dx = dy W.
    fn frozen_linear_backward(grad: FloatTensor<Self>, w: FloatTensor<Self>) -> FloatTensor<Self> {
        generic::frozen_backward::<Self>(grad, w)
    }

    /// y = x Wᵀ + s · dropout(x) Aᵀ Bᵀ.
    fn lora_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        path: AdapterPath,
    ) -> FloatTensor<Self> {
        generic::lora::<Self>(x, w, a, b, path)
    }

    /// (dx where it is needed, dA, dB).
    #[allow(clippy::too_many_arguments)]
    fn lora_linear_backward(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        path: AdapterPath,
        need_dx: bool,
    ) -> (Option<FloatTensor<Self>>, FloatTensor<Self>, FloatTensor<Self>) {
        generic::lora_backward::<Self>(grad, x, w, a, b, path, need_dx)
    }
}

plain_backends!(LinearOps);
