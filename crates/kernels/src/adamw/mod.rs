//! The update of AdamW (Loshchilov, Hutter: *Decoupled Weight Decay Regularization*, 2017) and the sums of squares that
//! a gradient's norm is made of.
//!
//! Not differentiable: both are for tensors outside of autodiff.

#[cfg(feature = "flex")]
mod flex;
pub mod generic;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, backend_extension};
use burn::tensor::Tensor;

use crate::body::plain_backends;

/// One update: what changes from step to step, and the constants of the optimizer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// η, the learning rate.
    pub learning_rate: f64,
    /// β₁ and β₂, the decay of the first and the second moment.
    pub betas: [f64; 2],
    /// ε, added to the bias-corrected root.
    pub eps: f64,
    /// λ, the decoupled weight decay.
    pub weight_decay: f64,
    /// t, the number of this update of the parameter, counted from 1.
    pub update: i32,
}

/// [`AdamWStep`] as the bodies use it: computed in f64 and rounded once.
#[derive(Clone, Copy, Debug)]
pub struct Factors {
    /// β₁ and 1 − β₁.
    pub first: [f32; 2],
    /// β₂ and 1 − β₂.
    pub second: [f32; 2],
    /// 1 − ηλ.
    pub decay: f32,
    /// η / (1 − β₁ᵗ).
    pub rate: f32,
    /// 1 / √(1 − β₂ᵗ).
    pub root: f32,
    /// ε.
    pub eps: f32,
}

impl AdamWStep {
    /// The numbers that the update needs.
    pub fn factors(&self) -> Factors {
        let [first, second] = self.betas;
        Factors {
            first: [first as f32, (1.0 - first) as f32],
            second: [second as f32, (1.0 - second) as f32],
            decay: (1.0 - self.learning_rate * self.weight_decay) as f32,
            rate: (self.learning_rate / (1.0 - first.powi(self.update))) as f32,
            root: (1.0 / (1.0 - second.powi(self.update)).sqrt()) as f32,
            eps: self.eps as f32,
        }
    }
}

/// The optimizer's operations on one backend.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Remote: cfg(feature = "remote")
)]
pub trait AdamWOps: Backend {
    /// (p, m, v) after the update; see [`adamw`].
    fn adamw(
        param: FloatTensor<Self>,
        grad: FloatTensor<Self>,
        first: FloatTensor<Self>,
        second: FloatTensor<Self>,
        factor: FloatTensor<Self>,
        step: AdamWStep,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        generic::adamw::<Self>(param, grad, first, second, factor, step)
    }

    /// Σ x², f32, `[1]`.
    fn sum_squares(x: FloatTensor<Self>) -> FloatTensor<Self> {
        generic::sum_squares::<Self>(x)
    }
}

plain_backends!(AdamWOps);

/// One update of a parameter p with gradient g and the moments m and v, as PyTorch's `AdamW` computes it:
///
/// m ← β₁ m + (1 − β₁) c g, v ← β₂ v + (1 − β₂) (c g)², p ← (1 − ηλ) p − η / (1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + ε)
///
/// c, what the gradient is multiplied by, is read where it lies, so that it may still be being computed. Where it is
/// negative nothing changes: that is how a step which must not happen is taken back before anybody has seen it.
///
/// On the CPU all three are changed where they lie, in one pass, when nobody else has a handle on them.
///
/// # Shapes
/// * `gradient_factor`: `[1]`
/// * the others: one and the same
///
/// All are f32, outside of autodiff.
pub fn adamw<const D: usize>(
    param: Tensor<D>,
    grad: Tensor<D>,
    [first, second]: [Tensor<D>; 2],
    gradient_factor: Tensor<1>,
    step: AdamWStep,
) -> (Tensor<D>, [Tensor<D>; 2]) {
    let shape = param.dims();
    for (name, found) in [("gradient", grad.dims()), ("first moment", first.dims()), ("second moment", second.dims())] {
        assert_eq!(found, shape, "adamw: parameter and {name} differ in shape");
    }
    assert_eq!(gradient_factor.dims(), [1], "adamw: there is one factor for the whole gradient");
    let (param, first, second) = <Dispatch as AdamWOps>::adamw(
        param.into_dispatch(),
        grad.into_dispatch(),
        first.into_dispatch(),
        second.into_dispatch(),
        gradient_factor.into_dispatch(),
        step,
    );
    (Tensor::from_dispatch(param), [first, second].map(Tensor::from_dispatch))
}

/// The parameter as it was before [`adamw`] made of it `param` and left these moments, up to rounding: it differs by at
/// most about one unit in the last place of the larger of the parameter and its change.
///
/// # Shapes
/// * all: one and the same; f32, outside of autodiff
pub fn undo_adamw<const D: usize>(param: Tensor<D>, [first, second]: [Tensor<D>; 2], step: AdamWStep) -> Tensor<D> {
    let Factors { decay, rate, root, eps, .. } = step.factors();
    (param + first / (second.sqrt() * root + eps) * rate) / decay
}

/// Σ x², in f32.
///
/// # Shapes
/// * `x`: any, outside of autodiff; result: `[1]`
pub fn sum_squares<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    Tensor::from_dispatch(<Dispatch as AdamWOps>::sum_squares(x.into_dispatch()))
}
