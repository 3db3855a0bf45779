//! Gradients of a whole module: their norm, and clipping by it.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Tensor};

/// The sum of squares of every gradient, one element per tensor, in f32 on the device: shape `[tensors]`.
///
/// Nothing is read back, so that a step waits for the device once, not once per tensor. `None` when there is no
/// gradient at all.
pub(crate) fn squared_norms<M: Module>(module: &M, grads: &GradientsParams) -> Option<Tensor<1>> {
    let mut squares = Squares { grads, parts: Vec::with_capacity(grads.len()) };
    module.visit(&mut squares);
    (!squares.parts.is_empty()).then(|| Tensor::cat(squares.parts, 0))
}

/// Multiplies every gradient by `factor`.
pub(crate) fn scale<M: Module>(module: &M, grads: GradientsParams, factor: f64) -> GradientsParams {
    let mut scaled = Scaled { from: grads, to: GradientsParams::new(), factor };
    module.visit(&mut scaled);
    scaled.to
}

/// What every gradient is multiplied by so that their global norm is at most `max`:
/// `min(1, max / (norm + 1e-6))`, as PyTorch's `clip_grad_norm_` has it.
pub(crate) fn clip_factor(norm: f64, max: f64) -> f64 {
    (max / (norm + 1e-6)).min(1.0)
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
            self.parts.push(grad.cast(DType::F32).square().sum());
        }
    }
}

struct Scaled {
    from: GradientsParams,
    to: GradientsParams,
    factor: f64,
}

impl ModuleVisitor for Scaled {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(grad) = self.from.remove::<D>(param.id) {
            self.to.register(param.id, grad.mul_scalar(self.factor));
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
