//! Gradients of a whole module: their norm, and what clips it.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::Tensor;
use emberlora_kernels::sum_squares;

/// The sum of squares of every gradient, one element per tensor, in f32 on the device: shape `[tensors]`.
///
/// Nothing is read back, so that a step waits for the device once, not once per tensor. `None` when there is no
/// gradient at all.
pub(crate) fn squared_norms<M: Module>(module: &M, grads: &GradientsParams) -> Option<Tensor<1>> {
    let mut squares = Squares { grads, parts: Vec::with_capacity(grads.len()) };
    module.visit(&mut squares);
    (!squares.parts.is_empty()).then(|| Tensor::cat(squares.parts, 0))
}

/// What every gradient is multiplied by so that their global norm is at most `max`: `min(1, max / (norm + 1e-6))` where
/// the norm is above it, as PyTorch's `clip_grad_norm_` has it, else 1.
pub(crate) fn clip_factor(norm: f64, max: Option<f64>) -> f64 {
    match max {
        Some(max) if norm > max => (max / (norm + 1e-6)).min(1.0),
        _ => 1.0,
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
