//! Bodies over any backend; the reference that the others are tested against.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{DType, Shape, Slice, TensorData};

use super::{AdapterPath, Dropout, LinearGrads, LowRank, Projected, Prologue, int8};
use crate::body::cast;
use crate::weight::{Weight, WeightOps};
use crate::{activation, norm};

/// y = x Wᵀ; for an INT8 weight with a threshold the product of LLM.int8().
pub fn frozen<B: WeightOps>(x: FloatTensor<B>, weight: Weight<B>) -> FloatTensor<B> {
    match weight {
        Weight::Int8 { codes, scales, format } if format.threshold > 0.0 => {
            int8::product::<B>(x, codes, scales, format)
        }
        _ => {
            let w = dense::<B>(weight, x.dtype());
            B::float_matmul(x, B::float_transpose(w))
        }
    }
}

/// dx = dy W.
pub fn frozen_backward<B: WeightOps>(grad: FloatTensor<B>, weight: Weight<B>) -> FloatTensor<B> {
    let w = dense::<B>(weight, grad.dtype());
    B::float_matmul(grad, w)
}

/// The weight in `dtype`. Burn promotes nothing: a weight stored in another format is cast for the product.
pub(crate) fn dense<B: WeightOps>(weight: Weight<B>, dtype: DType) -> FloatTensor<B> {
    match weight {
        Weight::Dense(weight) => cast::<B>(weight, dtype),
        packed => B::dequantise(packed, dtype),
    }
}

/// See [`LinearBodies::project_forward`](super::LinearBodies::project_forward).
pub fn forward<B: WeightOps>(
    x: FloatTensor<B>,
    prologue: Prologue<B>,
    projections: Vec<Projected<B>>,
    residual: Option<FloatTensor<B>>,
) -> FloatTensor<B> {
    let h = input::<B>(x, &prologue);
    let mut outputs: Vec<FloatTensor<B>> = projections.into_iter().map(|p| one_forward::<B>(h.clone(), p)).collect();
    let y = if outputs.len() == 1 { outputs.remove(0) } else { B::float_cat(outputs, 1) };
    match residual {
        Some(residual) => B::float_add(residual, y),
        None => y,
    }
}

/// h W ᵀ + bias + s · dropout(h) Aᵀ Bᵀ.
fn one_forward<B: WeightOps>(h: FloatTensor<B>, projection: Projected<B>) -> FloatTensor<B> {
    let Projected { weight, bias, adapter, path } = projection;
    let mut y = frozen::<B>(h.clone(), weight);
    if let Some(bias) = bias.into_option() {
        let [n] = bias.shape().dims();
        y = B::float_add(y, B::float_reshape(bias, Shape::new([1, n])));
    }
    if let LowRank::Present { a, b } = adapter {
        let ha = adapter_hidden::<B>(dropped::<B>(h, path), a, path);
        y = B::float_add(y, B::float_matmul(ha, B::float_transpose(b)));
    }
    y
}

/// See [`LinearBodies::project_backward`](super::LinearBodies::project_backward).
pub fn backward<B: WeightOps>(
    grad: FloatTensor<B>,
    x: FloatTensor<B>,
    prologue: Prologue<B>,
    projections: Vec<Projected<B>>,
    need_dx: bool,
) -> LinearGrads<B> {
    let h = input::<B>(x.clone(), &prologue);
    let (mut dh, mut adapters, mut first) = (None, Vec::new(), 0);
    for projection in projections {
        let [n, _] = projection.weight.dims();
        let grad = columns::<B>(grad.clone(), first, n);
        first += n;
        let (part, adapter) = one_backward::<B>(grad, h.clone(), projection, need_dx);
        adapters.push(adapter);
        dh = match (dh, part) {
            (Some(sum), Some(part)) => Some(B::float_add(sum, part)),
            (sum, part) => sum.or(part),
        };
    }
    LinearGrads { dx: dh.map(|dh| input_backward::<B>(dh, x, prologue)), adapters }
}

type FactorGrads<B> = (FloatTensor<B>, FloatTensor<B>);

/// With g = dy, h̃ = m ⊙ h and u = s (g B):
/// dh = g W + m ⊙ (u A),  dA = uᵀ h̃,  dB = s gᵀ (h̃ Aᵀ). The products of rank r are recomputed, not saved.
fn one_backward<B: WeightOps>(
    grad: FloatTensor<B>,
    h: FloatTensor<B>,
    projection: Projected<B>,
    need_dx: bool,
) -> (Option<FloatTensor<B>>, Option<FactorGrads<B>>) {
    let Projected { weight, bias: _, adapter, path } = projection;
    let base = need_dx.then(|| frozen_backward::<B>(grad.clone(), weight));
    let LowRank::Present { a, b } = adapter else { return (base, None) };
    let dropped = dropped::<B>(h, path);
    let u = B::float_mul_scalar(B::float_matmul(grad.clone(), b), path.scale.into());
    let ha = adapter_hidden::<B>(dropped.clone(), a.clone(), path);
    let da = B::float_matmul(B::float_transpose(u.clone()), dropped);
    let db = B::float_matmul(B::float_transpose(grad), ha);
    let dh = base.map(|base| B::float_add(base, self::dropped::<B>(B::float_matmul(u, a), path)));
    (dh, Some((da, db)))
}

/// s · h̃ Aᵀ.
fn adapter_hidden<B: Backend>(dropped: FloatTensor<B>, a: FloatTensor<B>, path: AdapterPath) -> FloatTensor<B> {
    B::float_mul_scalar(B::float_matmul(dropped, B::float_transpose(a)), path.scale.into())
}

/// m ⊙ h, or h without dropout.
fn dropped<B: Backend>(h: FloatTensor<B>, path: AdapterPath) -> FloatTensor<B> {
    match path.dropout {
        Some(dropout) => B::float_mul(h.clone(), mask::<B>(dropout, &h)),
        None => h,
    }
}

/// The mask of `dropout` as a tensor of `x`'s shape, dtype and device.
fn mask<B: Backend>(dropout: Dropout, x: &FloatTensor<B>) -> FloatTensor<B> {
    let shape = x.shape();
    let factors: Vec<f32> = (0..shape.num_elements()).map(|i| dropout.factor(i)).collect();
    B::float_from_data(TensorData::new(factors, shape).convert_dtype(x.dtype()), &x.device())
}

/// h.
fn input<B: Backend>(x: FloatTensor<B>, prologue: &Prologue<B>) -> FloatTensor<B> {
    match prologue {
        Prologue::Plain => x,
        Prologue::Normed { weight, eps } => norm::generic::forward::<B>(x, weight.clone(), *eps).0,
        Prologue::Gated(gate) => {
            let (g, up) = halves::<B>(x);
            activation::generic::forward::<B>(g, up, *gate)
        }
    }
}

/// dx from dh.
fn input_backward<B: Backend>(dh: FloatTensor<B>, x: FloatTensor<B>, prologue: Prologue<B>) -> FloatTensor<B> {
    match prologue {
        Prologue::Plain => dh,
        Prologue::Normed { weight, eps } => {
            let (_, factor) = norm::generic::forward::<B>(x.clone(), weight.clone(), eps);
            norm::generic::backward::<B>(dh, x, weight, factor)
        }
        Prologue::Gated(gate) => {
            let (g, up) = halves::<B>(x);
            let (dgate, dup) = activation::generic::backward::<B>(dh, g, up, gate);
            B::float_cat(vec![dgate, dup], 1)
        }
    }
}

fn halves<B: Backend>(x: FloatTensor<B>) -> (FloatTensor<B>, FloatTensor<B>) {
    let [_, width] = x.shape().dims();
    (columns::<B>(x.clone(), 0, width / 2), columns::<B>(x, width / 2, width / 2))
}

fn columns<B: Backend>(x: FloatTensor<B>, first: usize, count: usize) -> FloatTensor<B> {
    let [_, width] = x.shape().dims();
    if count == width { x } else { B::float_slice(x, &[Slice::full(), Slice::from(first..first + count)]) }
}
