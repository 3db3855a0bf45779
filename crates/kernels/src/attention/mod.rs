//! Causal attention over packed documents (Vaswani et al.: *Attention Is All You Need*, 2017).
//!
//! ```text
//! P = softmax(s · Q Kᵀ + mask),   O = P V
//! ```
//!
//! Query i, at the absolute index a = i + (Sk − Sq), sees key j if and only if `starts[i] ≤ j ≤ a` and, with a sliding
//! window, `a − j < window`. Several query heads share one key head (Ainslie et al.: *GQA*, 2023); the shared heads are
//! never repeated in memory. Every query must see at least one key; `starts[i] ≤ a` makes it see itself.

mod autodiff;
#[cfg(feature = "flex")]
mod flex;
pub mod generic;
mod ops;

use burn::backend::Dispatch;
use burn::tensor::{Int, Tensor, activation};

pub use ops::AttentionOps;

/// How the attention is computed; the numbers agree to rounding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttentionKind {
    /// One operation with a hand-written gradient that saves one log-sum-exp per row instead of the probabilities.
    #[default]
    Fused,
    /// Composed of Burn's tensor operations and differentiated by its autodiff: the reference, which keeps the whole
    /// score matrix.
    Eager,
}

/// What attention needs beside its tensors.
#[derive(Clone, Copy, Debug, PartialEq, derive_new::new)]
pub struct AttentionOptions {
    /// Factor on the scores, usually 1 / √D.
    pub scale: f32,
    /// How many keys back from itself a query sees, itself included; `None` sees its whole document.
    pub window: Option<usize>,
    /// How it is computed.
    pub kind: AttentionKind,
}

/// Causal attention within documents.
///
/// # Shapes
/// * `q`: `[batch, Sq, heads, D]`
/// * `k`, `v`: `[batch, Sk, kv_heads, D]`, Sk ≥ Sq, heads a multiple of kv_heads
/// * `starts`: `[batch, Sq]`, for each query the first key it may see
/// * result: as `q`
///
/// # Panics
/// When the shapes do not fit.
pub fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    starts: Tensor<2, Int>,
    options: AttentionOptions,
) -> Tensor<4> {
    let ([batch, queries, heads, dim], [_, keys, kv_heads, _]) = (q.dims(), k.dims());
    assert!(
        k.dims() == [batch, keys, kv_heads, dim]
            && v.dims() == k.dims()
            && starts.dims() == [batch, queries]
            && keys >= queries
            && heads.is_multiple_of(kv_heads),
        "attention: q {:?}, k {:?}, v {:?}, starts {:?}",
        q.dims(),
        k.dims(),
        v.dims(),
        starts.dims(),
    );
    match options.kind {
        AttentionKind::Fused => Tensor::from_dispatch(<Dispatch as AttentionOps>::packed_attention(
            q.into_dispatch(),
            k.into_dispatch(),
            v.into_dispatch(),
            starts.into_dispatch(),
            options,
        )),
        AttentionKind::Eager => eager(q, k, v, starts, options),
    }
}

fn eager(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, starts: Tensor<2, Int>, options: AttentionOptions) -> Tensor<4> {
    let ([batch, queries, heads, dim], [_, keys, kv_heads, _]) = (q.dims(), k.dims());
    let device = starts.device();
    let absolute: Tensor<3, Int> =
        Tensor::<1, Int>::arange((keys - queries) as i64..keys as i64, &device).reshape([1, queries, 1]);
    let key: Tensor<3, Int> = Tensor::<1, Int>::arange(0..keys as i64, &device).reshape([1, 1, keys]);
    let (absolute, key) = (absolute.expand([batch, queries, keys]), key.expand([batch, queries, keys]));
    let starts = starts.reshape([batch, queries, 1]).expand([batch, queries, keys]);
    let mut hidden = key.clone().lower(starts).bool_or(key.clone().greater(absolute.clone()));
    if let Some(window) = options.window {
        hidden = hidden.bool_or((absolute - key).greater_equal_elem(window as i64));
    }
    // Query heads of one group become further rows against their shared key head.
    let group = heads / kv_heads;
    let fold = |t: Tensor<4>| t.swap_dims(1, 2);
    let q = fold(q).reshape([batch, kv_heads, group * queries, dim]);
    let scores = q.matmul(fold(k).transpose()).mul_scalar(options.scale).reshape([batch, heads, queries, keys]);
    let hidden = hidden.reshape([batch, 1, queries, keys]).expand([batch, heads, queries, keys]);
    let p = activation::softmax(scores.mask_fill(hidden, f32::NEG_INFINITY), 3);
    let out = p.reshape([batch, kv_heads, group * queries, keys]).matmul(fold(v));
    fold(out.reshape([batch, heads, queries, dim]))
}
