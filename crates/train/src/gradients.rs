//! Gradients of a whole module: their norm, and what clips it.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use emberlora_kernels::sum_squares;

/// The sum of squares of all gradients: f32 on the device, `[1]`. `None` when there is no gradient at all.
pub(crate) fn squared_norm<M: Module>(module: &M, grads: &GradientsParams) -> Option<Tensor<1>> {
    let mut squares = Squares { grads, parts: Vec::with_capacity(grads.len()) };
    module.visit(&mut squares);
    (!squares.parts.is_empty()).then(|| Tensor::cat(squares.parts, 0).sum())
}

/// What every gradient is multiplied by so that their global norm is at most `max`: `min(1, max / (norm + 1e-6))`, as
/// PyTorch's `clip_grad_norm_` has it. f32 on the device, `[1]`, and nothing is waited for.
///
/// Negative, which [`adamw`](emberlora_kernels::adamw) reads as "leave everything as it is", where a loss or the norm is
/// not finite, and ever after.
pub(crate) fn factor(
    losses: &Tensor<1>,
    squared_norm: &Tensor<1>,
    max: Option<f64>,
    before: Option<&Tensor<1>>,
) -> Tensor<1> {
    let factor = match max {
        Some(max) => ((squared_norm.clone().sqrt() + 1e-6).recip() * max).clamp_max(1.0),
        None => squared_norm.ones_like(),
    };
    // Neither what is infinite nor what is not a number is at most the largest number.
    let finite = (losses.clone().abs().sum() + squared_norm.clone()).lower_equal_elem(f32::MAX);
    let factor = factor.mask_fill(finite.bool_not(), -1.0);
    match before {
        Some(before) => factor.mask_fill(before.clone().lower_elem(0.0), -1.0),
        None => factor,
    }
}

/// How many numbers of `module` are trained.
pub(crate) fn trainable_parameters<M: Module>(module: &M) -> usize {
    let mut count = Count(0);
    module.visit(&mut count);
    count.0
}

struct Squares<'a> {
    grads: &'a GradientsParams,
    parts: Vec<Tensor<1>>,
}

impl ModuleVisitor for Squares<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.grads.get::<D>(param.id) {
            self.parts.push(sum_squares(grad));
        }
    }
}

struct Count(usize);

impl ModuleVisitor for Count {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if param.is_require_grad() {
            self.0 += param.lazy_shape().num_elements();
        }
    }
}
