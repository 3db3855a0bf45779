//! Products with a frozen weight, with and without a low-rank adapter.
//!
//! ```text
//! y  = x Wᵀ + s (x̃ Aᵀ) Bᵀ        x [M, K]   W [N, K] frozen   A [r, K]   B [N, r]   x̃ = dropout(x)
//! ```
//!
//! LoRA: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021. The weight never gets a gradient, and
//! it may be stored in a narrower format than the activations have.

mod autodiff;
#[cfg(feature = "flex")]
mod flex;
pub mod generic;
mod ops;

use burn::backend::Dispatch;
use burn::tensor::Tensor;

pub use ops::LinearOps;

use crate::rng;

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

/// `x Wᵀ` with a frozen weight.
///
/// # Shapes
/// * `x`: `[…, K]`, `weight`: `[N, K]`, result: `[…, N]`
///
/// The result has the dtype of `x`; `weight` may be stored as f32, bf16 or f16 whatever `x` is. The gradient flows to
/// `x` only.
///
/// # Panics
/// When the shapes do not fit, or when `weight` is tracked by autodiff.
pub fn frozen_linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>) -> Tensor<D> {
    let (x, dims) = rows(x);
    let out = dims_out(dims, &weight);
    let y = <Dispatch as LinearOps>::frozen_linear(x.into_dispatch(), weight.into_dispatch());
    Tensor::<2>::from_dispatch(y).reshape(out)
}

/// `x Wᵀ + s · dropout(x) Aᵀ Bᵀ`: a frozen weight with a trainable low-rank adapter.
///
/// # Shapes
/// * `x`: `[…, K]`, `weight`: `[N, K]`, `a`: `[r, K]`, `b`: `[N, r]`, result: `[…, N]`
///
/// `a` and `b` have the dtype of `x`, `weight` may be stored in another one. Gradients flow to `x`, `a` and `b`.
///
/// # Panics
/// When the shapes do not fit, or when `weight` is tracked by autodiff.
pub fn lora_linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f32,
    dropout: Option<Dropout>,
) -> Tensor<D> {
    let (x, dims) = rows(x);
    let out = dims_out(dims, &weight);
    let y = <Dispatch as LinearOps>::lora_linear(
        x.into_dispatch(),
        weight.into_dispatch(),
        a.into_dispatch(),
        b.into_dispatch(),
        AdapterPath::new(scale, dropout.filter(|d| d.p > 0.0)),
    );
    Tensor::<2>::from_dispatch(y).reshape(out)
}

/// `[…, K]` as `[M, K]`, and the dims it had.
fn rows<const D: usize>(x: Tensor<D>) -> (Tensor<2>, [usize; D]) {
    let dims = x.dims();
    let rows = dims[..D - 1].iter().product::<usize>();
    (x.reshape([rows, dims[D - 1]]), dims)
}

fn dims_out<const D: usize>(mut dims: [usize; D], weight: &Tensor<2>) -> [usize; D] {
    let [out, inner] = weight.dims();
    assert_eq!(dims[D - 1], inner, "linear: x has {} columns, the weight [{out}, {inner}]", dims[D - 1]);
    dims[D - 1] = out;
    dims
}
