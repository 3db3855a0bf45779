use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, backend_extension};

use super::{AttentionOptions, generic};
use crate::body::plain_backends;

/// Attention on one backend. The default bodies run on any backend and are the reference for the others.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Remote: cfg(feature = "remote")
)]
pub trait AttentionOps: Backend {
    /// O. `q` `[B, Sq, H, D]`, `k` and `v` `[B, Sk, Hkv, D]`, `spans` `[B, Sk, 2]`.
    fn packed_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spans: IntTensor<Self>,
        options: AttentionOptions,
    ) -> FloatTensor<Self> {
        generic::forward::<Self>(q, k, v, spans, options).0
    }

    /// O and the log-sum-exp of every row of scores, `[B, H, Sq, 1]` in f32.
    fn packed_attention_with_lse(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        spans: IntTensor<Self>,
        options: AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        generic::forward::<Self>(q, k, v, spans, options)
    }

    /// (dQ, dK, dV).
    #[allow(clippy::too_many_arguments)]
    fn packed_attention_backward(
        grad: FloatTensor<Self>,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        out: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        spans: IntTensor<Self>,
        options: AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        generic::backward::<Self>(grad, q, k, v, out, lse, spans, options)
    }
}

plain_backends!(AttentionOps);
