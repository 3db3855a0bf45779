//! Self-attention on what one projection leaves: queries, keys and values side by side.
//!
//! ```text
//! Q, K = rope(norm?(q)), rope(norm?(k)),   O = attention(Q, K, v)        qkv = [q | k | v]
//! ```
//!
//! Normed and rotated heads are made where they are needed and again in the backward pass, and the gradients of q, k and
//! v are written where they belong in one matrix. What is saved: qkv, the output and one log-sum-exp per row.

mod autodiff;
#[cfg(feature = "flex")]
mod flex;
pub mod generic;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, ExtensionType, backend_extension};
use burn::tensor::{Int, Tensor};

use super::{AttentionKind, AttentionOps, AttentionOptions, attention};
use crate::body::plain_backends;
use crate::{NormOps, RopeOps, rms_norm, rope};

/// How the heads lie in a row of qkv.
#[derive(Clone, Copy, Debug, PartialEq, Eq, derive_new::new)]
pub struct HeadLayout {
    /// Query heads.
    pub heads: usize,
    /// Key heads, and as many value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub dim: usize,
}

impl HeadLayout {
    /// Elements of a row of qkv.
    pub fn width(self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }
}

/// The root-mean-square norms of queries and keys, see [`rms_norm`].
#[derive(Clone, Debug)]
pub struct HeadNorms {
    /// `[D]`, or `[heads · D]` for a norm over all heads of a token together; of qkv's dtype, frozen.
    pub q: Tensor<1>,
    /// `[D]` or `[kv_heads · D]`, likewise.
    pub k: Tensor<1>,
    /// Added to the mean square.
    pub eps: f32,
}

/// [`HeadNorms`] on one backend.
#[derive(Clone, Debug, ExtensionType)]
pub enum Norms<B: Backend> {
    /// There are none.
    Absent,
    /// There are both.
    Present {
        /// The weight of the queries' norm.
        q: FloatTensor<B>,
        /// The weight of the keys' norm.
        k: FloatTensor<B>,
        /// Added to the mean square.
        eps: f32,
    },
}

/// The tables of the rotary embedding.
#[derive(Clone, Debug, ExtensionType)]
pub struct RotaryTables<B: Backend> {
    /// `[B, S, R/2]`.
    pub cos: FloatTensor<B>,
    /// `[B, S, R/2]`.
    pub sin: FloatTensor<B>,
}

/// Self-attention on projected rows, differentiable.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Remote: cfg(feature = "remote")
)]
pub trait QkvOps: Backend {
    /// O `[B, S, H · D]`. `qkv` `[B, S, (H + 2 Hkv) · D]`, `spans` `[B, S, 2]`.
    fn qkv_attention(
        qkv: FloatTensor<Self>,
        #[extension_type] norms: Norms<Self>,
        #[extension_type] tables: RotaryTables<Self>,
        spans: IntTensor<Self>,
        layout: HeadLayout,
        options: AttentionOptions,
    ) -> FloatTensor<Self>;
}

/// What the operation needs beside qkv; none of it is differentiated.
#[derive(Clone, Debug)]
pub struct QkvContext<B: Backend> {
    /// Norms of the heads.
    pub norms: Norms<B>,
    /// Rotary tables.
    pub tables: RotaryTables<B>,
    /// `[B, S, 2]`, see [`attention`].
    pub spans: IntTensor<B>,
    /// How the heads lie.
    pub layout: HeadLayout,
    /// Scale and window.
    pub options: AttentionOptions,
}

/// The bodies on a backend without autodiff. The default ones run anywhere and are the reference for the others.
pub trait QkvBodies: AttentionOps + NormOps + RopeOps {
    /// O, and the log-sum-exp of every row of scores.
    fn qkv_forward(qkv: FloatTensor<Self>, context: &QkvContext<Self>) -> (FloatTensor<Self>, FloatTensor<Self>) {
        generic::forward::<Self>(qkv, context)
    }

    /// The gradient of qkv.
    fn qkv_backward(
        grad: FloatTensor<Self>,
        qkv: FloatTensor<Self>,
        out: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        context: &QkvContext<Self>,
    ) -> FloatTensor<Self> {
        generic::backward::<Self>(grad, qkv, out, lse, context)
    }
}

macro_rules! plain_qkv_ops {
    ($backend:ty) => {
        impl QkvOps for $backend {
            fn qkv_attention(
                qkv: FloatTensor<Self>,
                norms: Norms<Self>,
                tables: RotaryTables<Self>,
                spans: IntTensor<Self>,
                layout: HeadLayout,
                options: AttentionOptions,
            ) -> FloatTensor<Self> {
                Self::qkv_forward(qkv, &QkvContext { norms, tables, spans, layout, options }).0
            }
        }
    };
}
#[cfg(feature = "flex")]
plain_qkv_ops!(burn::backend::Flex);
#[cfg(feature = "ndarray")]
plain_qkv_ops!(burn_ndarray::NdArray);
#[cfg(any(feature = "wgpu", feature = "cuda"))]
plain_qkv_ops!(burn::backend::Cube);
#[cfg(feature = "remote")]
plain_qkv_ops!(burn::backend::Remote);

plain_backends!(QkvBodies);

/// Attention of every token to itself and its ancestors, from queries, keys and values side by side.
///
/// # Shapes
/// * `qkv`: `[batch, seq, (heads + 2 kv_heads) · D]`
/// * `cos`, `sin`: `[batch, seq, R/2]`, see [`rope`]
/// * `spans`: `[batch, seq, 2]`, see [`attention`]
/// * result: `[batch, seq, heads · D]`
///
/// The gradient flows to `qkv` only.
///
/// # Panics
/// When the shapes do not fit, or when a norm's weight is tracked by autodiff.
pub fn qkv_attention(
    qkv: Tensor<3>,
    norms: Option<&HeadNorms>,
    (cos, sin): (Tensor<3>, Tensor<3>),
    spans: Tensor<3, Int>,
    layout: HeadLayout,
    options: AttentionOptions,
) -> Tensor<3> {
    let [batch, seq, width] = qkv.dims();
    assert!(
        width == layout.width()
            && layout.heads.is_multiple_of(layout.kv_heads)
            && spans.dims() == [batch, seq, 2]
            && cos.dims() == sin.dims()
            && cos.dims()[..2] == [batch, seq]
            && 2 * cos.dims()[2] <= layout.dim,
        "qkv_attention: qkv {:?}, {layout:?}, spans {:?}, tables {:?}",
        qkv.dims(),
        spans.dims(),
        cos.dims(),
    );
    match options.kind {
        AttentionKind::Fused => {
            let norms = match norms {
                None => Norms::Absent,
                Some(HeadNorms { q, k, eps }) => {
                    Norms::Present { q: q.clone().into_dispatch(), k: k.clone().into_dispatch(), eps: *eps }
                }
            };
            Tensor::from_dispatch(<Dispatch as QkvOps>::qkv_attention(
                qkv.into_dispatch(),
                norms,
                RotaryTables { cos: cos.into_dispatch(), sin: sin.into_dispatch() },
                spans.into_dispatch(),
                layout,
                options,
            ))
        }
        AttentionKind::Eager => {
            let (q, k, v) = qkv_heads(qkv, norms, (cos, sin), layout);
            attention(q, k, v, spans, options).reshape([batch, seq, layout.heads * layout.dim])
        }
    }
}

/// The heads that attention takes, normed and rotated: q `[batch, seq, heads, D]`, k and v `[batch, seq, kv_heads, D]`.
/// For callers that keep keys and values; the shapes are those of [`qkv_attention`].
pub fn qkv_heads(
    qkv: Tensor<3>,
    norms: Option<&HeadNorms>,
    (cos, sin): (Tensor<3>, Tensor<3>),
    layout: HeadLayout,
) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
    let HeadLayout { heads, kv_heads, dim } = layout;
    let [batch, seq, _] = qkv.dims();
    let part = |first: usize, count: usize| qkv.clone().narrow(2, first * dim, count * dim);
    let prepared = |x: Tensor<3>, count: usize, weight: Option<&Tensor<1>>| {
        let split = |x: Tensor<3>| x.reshape([batch, seq, count, dim]);
        let eps = norms.map_or(0.0, |norms| norms.eps);
        let x = match weight {
            None => split(x),
            Some(weight) if weight.dims() == [dim] => rms_norm(split(x), weight.clone(), eps),
            Some(weight) => split(rms_norm(x, weight.clone(), eps)),
        };
        rope(x, cos.clone(), sin.clone())
    };
    (
        prepared(part(0, heads), heads, norms.map(|norms| &norms.q)),
        prepared(part(heads, kv_heads), kv_heads, norms.map(|norms| &norms.k)),
        part(heads + kv_heads, kv_heads).reshape([batch, seq, kv_heads, dim]),
    )
}
