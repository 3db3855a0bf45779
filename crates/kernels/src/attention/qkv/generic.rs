//! Bodies over any backend; the reference that the others are tested against.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{Shape, Slice};

use super::{HeadLayout, Norms, QkvBodies, QkvContext};

/// See [`QkvBodies::qkv_forward`].
pub fn forward<B: QkvBodies>(qkv: FloatTensor<B>, context: &QkvContext<B>) -> (FloatTensor<B>, FloatTensor<B>) {
    let [batch, seq, _] = qkv.shape().dims();
    let HeadLayout { heads, dim, .. } = context.layout;
    let [q, k, v] = parts::<B>(qkv, context.layout);
    let (q, k) = (prepare::<B>(q, context, true), prepare::<B>(k, context, false));
    let (out, lse) = B::packed_attention_with_lse(q, k, v, context.spans.clone(), context.options);
    (B::float_reshape(out, Shape::new([batch, seq, heads * dim])), lse)
}

/// See [`QkvBodies::qkv_backward`].
pub fn backward<B: QkvBodies>(
    grad: FloatTensor<B>,
    qkv: FloatTensor<B>,
    out: FloatTensor<B>,
    lse: FloatTensor<B>,
    context: &QkvContext<B>,
) -> FloatTensor<B> {
    let [batch, seq, width] = qkv.shape().dims();
    let HeadLayout { heads, dim, .. } = context.layout;
    let by_head = |t: FloatTensor<B>| B::float_reshape(t, Shape::new([batch, seq, heads, dim]));
    let [q, k, v] = parts::<B>(qkv, context.layout);
    let (rotated_q, rotated_k) = (prepare::<B>(q.clone(), context, true), prepare::<B>(k.clone(), context, false));
    let (dq, dk, dv) = B::packed_attention_backward(
        by_head(grad),
        rotated_q,
        rotated_k,
        v,
        by_head(out),
        lse,
        context.spans.clone(),
        context.options,
    );
    let (dq, dk) = (prepare_backward::<B>(dq, q, context, true), prepare_backward::<B>(dk, k, context, false));
    B::float_reshape(B::float_cat(vec![dq, dk, dv], 2), Shape::new([batch, seq, width]))
}

/// q, k and v as `[B, S, heads, D]`.
fn parts<B: Backend>(qkv: FloatTensor<B>, layout: HeadLayout) -> [FloatTensor<B>; 3] {
    let HeadLayout { heads, kv_heads, dim } = layout;
    let [batch, seq, _] = qkv.shape().dims();
    let all = B::float_reshape(qkv, Shape::new([batch, seq, heads + 2 * kv_heads, dim]));
    let part = |first: usize, count: usize| {
        B::float_slice(all.clone(), &[Slice::full(), Slice::full(), Slice::from(first..first + count), Slice::full()])
    };
    [part(0, heads), part(heads, kv_heads), part(heads + kv_heads, kv_heads)]
}

/// The norm's weight for queries or keys.
fn norm<B: Backend>(context: &QkvContext<B>, queries: bool) -> Option<(FloatTensor<B>, f32)> {
    match &context.norms {
        Norms::Absent => None,
        Norms::Present { q, k, eps } => Some((if queries { q.clone() } else { k.clone() }, *eps)),
    }
}

/// `x` `[B, S, heads, D]` as rows of the width of a norm's weight.
fn rows<B: Backend>(x: FloatTensor<B>, weight: &FloatTensor<B>) -> FloatTensor<B> {
    let (count, [width]) = (x.shape().num_elements(), weight.shape().dims());
    B::float_reshape(x, Shape::new([count / width, width]))
}

/// norm, then rotation.
fn prepare<B: QkvBodies>(x: FloatTensor<B>, context: &QkvContext<B>, queries: bool) -> FloatTensor<B> {
    let shape = x.shape();
    let x = match norm::<B>(context, queries) {
        None => x,
        Some((weight, eps)) => B::float_reshape(B::rms_norm(rows::<B>(x, &weight), weight, eps), shape),
    };
    B::rope(x, context.tables.cos.clone(), context.tables.sin.clone())
}

/// The gradient of `x` from that of what [`prepare`] made of it.
fn prepare_backward<B: QkvBodies>(
    grad: FloatTensor<B>,
    x: FloatTensor<B>,
    context: &QkvContext<B>,
    queries: bool,
) -> FloatTensor<B> {
    let shape = x.shape();
    let grad = B::rope(grad, context.tables.cos.clone(), B::float_neg(context.tables.sin.clone()));
    let Some((weight, eps)) = norm::<B>(context, queries) else { return grad };
    let (x, grad) = (rows::<B>(x, &weight), rows::<B>(grad, &weight));
    let (_, factor) = B::rms_norm_with_factor(x.clone(), weight.clone(), eps);
    B::float_reshape(B::rms_norm_backward(grad, x, weight, factor), shape)
}
