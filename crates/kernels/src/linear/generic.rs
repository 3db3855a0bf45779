//! Bodies over any backend; the reference that the others are tested against.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::TensorData;

use super::{AdapterPath, Dropout};
use crate::body::cast;

/// y = x Wᵀ.
pub fn frozen<B: Backend>(x: FloatTensor<B>, w: FloatTensor<B>) -> FloatTensor<B> {
    // Burn promotes nothing: a weight stored in another format is cast for the product.
    let w = cast::<B>(w, x.dtype());
    B::float_matmul(x, B::float_transpose(w))
}

/// dx = dy W.
pub fn frozen_backward<B: Backend>(grad: FloatTensor<B>, w: FloatTensor<B>) -> FloatTensor<B> {
    let w = cast::<B>(w, grad.dtype());
    B::float_matmul(grad, w)
}

/// The mask of `dropout` as a tensor of `x`'s shape, dtype and device.
fn mask<B: Backend>(dropout: Dropout, x: &FloatTensor<B>) -> FloatTensor<B> {
    let shape = x.shape();
    let factors: Vec<f32> = (0..shape.num_elements()).map(|i| dropout.factor(i)).collect();
    B::float_from_data(TensorData::new(factors, shape).convert_dtype(x.dtype()), &x.device())
}

/// y = x Wᵀ + s · dropout(x) Aᵀ Bᵀ.
pub fn lora<B: Backend>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    path: AdapterPath,
) -> FloatTensor<B> {
    let dropped = match path.dropout {
        Some(dropout) => B::float_mul(x.clone(), mask::<B>(dropout, &x)),
        None => x.clone(),
    };
    let xa = B::float_mul_scalar(B::float_matmul(dropped, B::float_transpose(a)), path.scale.into());
    B::float_add(frozen::<B>(x, w), B::float_matmul(xa, B::float_transpose(b)))
}

/// With g = dy, x̃ = m ⊙ x and u = s (g B):
/// dx = g W + m ⊙ (u A),  dA = uᵀ x̃,  dB = s gᵀ (x̃ Aᵀ). The products of rank r are recomputed, not saved.
pub fn lora_backward<B: Backend>(
    grad: FloatTensor<B>,
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    a: FloatTensor<B>,
    b: FloatTensor<B>,
    path: AdapterPath,
    need_dx: bool,
) -> (Option<FloatTensor<B>>, FloatTensor<B>, FloatTensor<B>) {
    let mask = path.dropout.map(|dropout| mask::<B>(dropout, &x));
    let dropped = match &mask {
        Some(mask) => B::float_mul(x, mask.clone()),
        None => x,
    };
    let u = B::float_mul_scalar(B::float_matmul(grad.clone(), b), path.scale.into());
    let xa = B::float_mul_scalar(B::float_matmul(dropped.clone(), B::float_transpose(a.clone())), path.scale.into());
    let da = B::float_matmul(B::float_transpose(u.clone()), dropped);
    let db = B::float_matmul(B::float_transpose(grad.clone()), xa);
    let dx = need_dx.then(|| {
        let through_adapter = B::float_matmul(u, a);
        let through_adapter = match mask {
            Some(mask) => B::float_mul(through_adapter, mask),
            None => through_adapter,
        };
        B::float_add(frozen_backward::<B>(grad, w), through_adapter)
    });
    (dx, da, db)
}
