//! Bodies over any backend; the reference that the others are tested against.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::DType;

use crate::body::cast;

/// (w ⊙ x · f, f `[M, 1]` in f32).
pub fn forward<B: Backend>(x: FloatTensor<B>, w: FloatTensor<B>, eps: f32) -> (FloatTensor<B>, FloatTensor<B>) {
    let dtype = x.dtype();
    let x = cast::<B>(x, DType::F32);
    let mean = B::float_mean_dim(B::float_mul(x.clone(), x.clone()), 1);
    let factor = B::float_recip(B::float_sqrt(B::float_add_scalar(mean, eps.into())));
    let h = cast::<B>(B::float_mul(x, factor.clone()), dtype);
    (B::float_mul(h, row::<B>(w)), factor)
}

/// With h = x f and u = w ⊙ dy: dx = f (u − h · mean(u ⊙ h)).
///
/// From ∂y_j / ∂x_i = w_j (f δ_ij − x_i x_j f³ / K).
pub fn backward<B: Backend>(
    grad: FloatTensor<B>,
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    factor: FloatTensor<B>,
) -> FloatTensor<B> {
    let dtype = x.dtype();
    let h = B::float_mul(cast::<B>(x, DType::F32), factor.clone());
    let u = cast::<B>(B::float_mul(grad, row::<B>(w)), DType::F32);
    let mean = B::float_mean_dim(B::float_mul(u.clone(), h.clone()), 1);
    let dx = B::float_mul(B::float_sub(u, B::float_mul(h, mean)), factor);
    cast::<B>(dx, dtype)
}

/// `[K]` as `[1, K]`.
fn row<B: Backend>(w: FloatTensor<B>) -> FloatTensor<B> {
    let [k] = w.shape().dims();
    B::float_reshape(w, [1, k].into())
}
