//! Causal attention over trees of tokens (Vaswani et al.: *Attention Is All You Need*, 2017).
//!
//! ```text
//! P = softmax(s · Q Kᵀ + mask),   O = P V
//! ```
//!
//! A row of tokens is a forest in depth-first preorder: a token is followed by everything that continues it, so its
//! descendants are the columns from its own up to an end. A query sees itself and its ancestors, that is the key at
//! column j if and only if `j ≤ i < end[j]` for its own column i (the interval labelling of trees: Dietz, *Maintaining
//! order in a linked list*, 1982), and with a sliding window only where `position[i] − position[j] < window`. Documents
//! that were packed into one row are paths of this forest: each of their tokens ends where the document does.
//!
//! Several query heads share one key head (Ainslie et al.: *GQA*, 2023); the shared heads are never repeated in memory.
//! Every query must see itself: `end[i] > i`.

mod autodiff;
#[cfg(feature = "flex")]
mod flex;
pub mod generic;
mod ops;
pub(crate) mod qkv;

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
    /// How many positions back from itself a query sees, its own included; `None` sees all of its ancestors.
    pub window: Option<usize>,
    /// How it is computed.
    pub kind: AttentionKind,
}

/// Attention of every token to itself and its ancestors.
///
/// # Shapes
/// * `q`: `[batch, Sq, heads, D]`; the queries are the last Sq of the Sk columns
/// * `k`, `v`: `[batch, Sk, kv_heads, D]`, Sk ≥ Sq, heads a multiple of kv_heads
/// * `spans`: `[batch, Sk, 2]`, for each column one past the last column that sees it, and its position, which counts
///   along the path from the root
/// * result: as `q`
///
/// # Panics
/// When the shapes do not fit.
pub fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    spans: Tensor<3, Int>,
    options: AttentionOptions,
) -> Tensor<4> {
    let ([batch, queries, heads, dim], [_, keys, kv_heads, _]) = (q.dims(), k.dims());
    assert!(
        k.dims() == [batch, keys, kv_heads, dim]
            && v.dims() == k.dims()
            && spans.dims() == [batch, keys, 2]
            && keys >= queries
            && heads.is_multiple_of(kv_heads),
        "attention: q {:?}, k {:?}, v {:?}, spans {:?}",
        q.dims(),
        k.dims(),
        v.dims(),
        spans.dims(),
    );
    match options.kind {
        AttentionKind::Fused => Tensor::from_dispatch(<Dispatch as AttentionOps>::packed_attention(
            q.into_dispatch(),
            k.into_dispatch(),
            v.into_dispatch(),
            spans.into_dispatch(),
            options,
        )),
        AttentionKind::Eager => eager(q, k, v, spans, options),
    }
}

fn eager(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, spans: Tensor<3, Int>, options: AttentionOptions) -> Tensor<4> {
    let ([batch, queries, heads, dim], [_, keys, kv_heads, _]) = (q.dims(), k.dims());
    let device = spans.device();
    let full = [batch, queries, keys];
    let by_key = |t: Tensor<3, Int>| t.swap_dims(1, 2).expand(full);
    let query: Tensor<3, Int> =
        Tensor::<1, Int>::arange((keys - queries) as i64..keys as i64, &device).reshape([1, queries, 1]).expand(full);
    let key: Tensor<3, Int> = Tensor::<1, Int>::arange(0..keys as i64, &device).reshape([1, 1, keys]).expand(full);
    let mut hidden = key.greater(query.clone()).bool_or(by_key(spans.clone().narrow(2, 0, 1)).lower_equal(query));
    if let Some(window) = options.window {
        let positions = spans.narrow(2, 1, 1);
        let distance = positions.clone().narrow(1, keys - queries, queries).expand(full) - by_key(positions);
        hidden = hidden.bool_or(distance.greater_equal_elem(window as i64));
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
