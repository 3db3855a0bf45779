//! Products with frozen weights, with and without low-rank adapters.
//!
//! ```text
//! y_i = residual + h W_iᵀ + bias_i + s_i (h̃_i A_iᵀ) B_iᵀ        h = x, norm(x) or act(gate) ⊙ up
//!
//! x [M, ·]   W_i [N_i, K] frozen   A_i [r_i, K]   B_i [N_i, r_i]   h̃_i = dropout(h)
//! ```
//!
//! LoRA: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021. A weight never gets a gradient, and it
//! may be stored in a narrower format than the activations have, packed ones among them. Up to three projections of one input are one operation,
//! whose outputs lie side by side; what leads to h and what is added to y are parts of it, so that h is never stored.

mod autodiff;
#[cfg(feature = "flex")]
mod flex;
pub mod generic;
mod int8;
mod ops;

use burn::backend::Dispatch;
use burn::tensor::Tensor;

pub use ops::{Group, LinearBodies, LinearGrads, LinearOps, LowRank, Optional, Projected, Prologue};

use crate::activation::Gate;
use crate::checkpoint::Values;
use crate::rng;
use crate::weight::FrozenWeight;

/// Which elements of the adapter's input are dropped: each with probability `p`, decided by the counter-based stream
/// `seed`, so that the same arguments give the same mask in forward, backward and recomputation.
#[derive(Clone, Copy, Debug, PartialEq, derive_new::new)]
pub struct Dropout {
    /// Probability of dropping an element, in [0, 1).
    pub p: f32,
    /// The stream of this layer at this step, see [`rng::mix`].
    pub seed: u64,
}

impl Dropout {
    /// The factor of element `index` (row-major): 0 where it is dropped, 1 / (1 − p) where it is kept.
    #[inline]
    pub fn factor(self, index: usize) -> f32 {
        if rng::uniform(self.seed, index as u64) < self.p { 0.0 } else { 1.0 / (1.0 - self.p) }
    }
}

/// What the adapter's path needs beside its tensors.
#[derive(Clone, Copy, Debug, PartialEq, derive_new::new)]
pub struct AdapterPath {
    /// s, the factor on B A.
    pub scale: f32,
    /// Dropout on the adapter's input; `None` in evaluation.
    pub dropout: Option<Dropout>,
}

/// One projection of [`project`].
#[derive(Clone, Debug)]
pub struct Projection {
    /// W, `[N, K]`, frozen.
    pub weight: FrozenWeight,
    /// The bias, `[N]` of the input's dtype, frozen.
    pub bias: Option<Tensor<1>>,
    /// The adapter.
    pub adapter: Option<ProjectionAdapter>,
}

/// The adapter of a [`Projection`].
#[derive(Clone, Debug)]
pub struct ProjectionAdapter {
    /// A, `[r, K]` of the input's dtype.
    pub a: Tensor<2>,
    /// B, `[N, r]` of the input's dtype.
    pub b: Tensor<2>,
    /// Scale and dropout.
    pub path: AdapterPath,
}

/// What a projection sees of its input.
#[allow(
    clippy::large_enum_variant,
    reason = "it is made for one call and moved into it; how large it is, the backends decide"
)]
#[derive(Clone, Debug)]
pub enum Input {
    /// x itself.
    Plain,
    /// The root-mean-square norm of x, see [`rms_norm`](crate::rms_norm).
    Normed {
        /// `[K]` of x's dtype, frozen.
        weight: Tensor<1>,
        /// Added to the mean square.
        eps: f32,
    },
    /// act(gate) ⊙ up, where x is gate and up side by side, `[…, 2K]`; see [`glu`](crate::glu()).
    Gated(Gate),
}

/// Applies up to three projections to one input; their outputs lie side by side.
///
/// # Shapes
/// * `x`: `[…, K]`, or `[…, 2K]` for [`Input::Gated`]
/// * `projections`: weights `[N_i, K]`
/// * `residual`: `[…, Σ N_i]`, added to the result
/// * result: `[…, Σ N_i]`; zeros where nobody reads `values`
///
/// The result has the dtype of `x`. Gradients flow to `x`, the adapters and the residual. For the backward pass x is
/// saved and nothing else.
///
/// # Panics
/// When the shapes do not fit, when there are no projections or more than three, or when a frozen tensor is tracked by
/// autodiff.
pub fn project<const D: usize>(
    x: Tensor<D>,
    input: Input,
    projections: &[Projection],
    residual: Option<Tensor<D>>,
    values: Values,
) -> Tensor<D> {
    let dims = x.dims();
    let (rows, columns) = (dims[..D - 1].iter().product::<usize>(), dims[D - 1]);
    let inner = if let Input::Gated(_) = input { columns / 2 } else { columns };
    let mut out = dims;
    out[D - 1] = 0;
    for Projection { weight, .. } in projections {
        let [n, k] = weight.dims();
        assert_eq!(k, inner, "project: the input has {inner} columns, the weight [{n}, {k}]");
        out[D - 1] += n;
    }
    if let Some(residual) = &residual {
        assert_eq!(residual.dims(), out, "project: the residual is added to a result of another shape");
    }
    let width = out[D - 1];
    let prologue = match input {
        Input::Plain => Prologue::Plain,
        Input::Normed { weight, eps } => Prologue::Normed { weight: weight.into_dispatch(), eps },
        Input::Gated(gate) => Prologue::Gated(gate),
    };
    let y = <Dispatch as LinearOps>::project(
        x.reshape([rows, columns]).into_dispatch(),
        prologue,
        Group::of(projections.iter().map(Projected::<Dispatch>::from)),
        residual.map_or(Optional::Absent, |r| Optional::Present(r.reshape([rows, width]).into_dispatch())),
        values,
    );
    Tensor::<2>::from_dispatch(y).reshape(out)
}

impl From<&Projection> for Projected<Dispatch> {
    fn from(Projection { weight, bias, adapter }: &Projection) -> Self {
        let mut path = AdapterPath::new(1.0, None);
        let adapter = match adapter {
            Some(adapter) => {
                path = AdapterPath { dropout: adapter.path.dropout.filter(|d| d.p > 0.0), ..adapter.path };
                LowRank::Present { a: adapter.a.clone().into_dispatch(), b: adapter.b.clone().into_dispatch() }
            }
            None => LowRank::Absent,
        };
        Self {
            weight: weight.to_dispatch(),
            bias: bias.as_ref().map_or(Optional::Absent, |bias| Optional::Present(bias.clone().into_dispatch())),
            adapter,
            path,
        }
    }
}

/// `x Wᵀ` with a frozen weight.
///
/// # Shapes
/// * `x`: `[…, K]`, `weight`: `[N, K]`, result: `[…, N]`
///
/// The result has the dtype of `x`, in whatever format `weight` is stored. The gradient flows to `x` only.
///
/// # Panics
/// When the shapes do not fit, or when `weight` is tracked by autodiff.
pub fn frozen_linear<const D: usize>(x: Tensor<D>, weight: impl Into<FrozenWeight>) -> Tensor<D> {
    project(x, Input::Plain, &[Projection { weight: weight.into(), bias: None, adapter: None }], None, Values::Read)
}

/// `x Wᵀ + s · dropout(x) Aᵀ Bᵀ`: a frozen weight with a trainable low-rank adapter.
///
/// # Shapes
/// * `x`: `[…, K]`, `weight`: `[N, K]`, `a`: `[r, K]`, `b`: `[N, r]`, result: `[…, N]`
///
/// `a` and `b` have the dtype of `x`, `weight` may be stored in any format. Gradients flow to `x`, `a` and `b`.
///
/// # Panics
/// When the shapes do not fit, or when `weight` is tracked by autodiff.
pub fn lora_linear<const D: usize>(
    x: Tensor<D>,
    weight: impl Into<FrozenWeight>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f32,
    dropout: Option<Dropout>,
) -> Tensor<D> {
    let adapter = Some(ProjectionAdapter { a, b, path: AdapterPath::new(scale, dropout) });
    project(x, Input::Plain, &[Projection { weight: weight.into(), bias: None, adapter }], None, Values::Read)
}
