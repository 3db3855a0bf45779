//! Bodies over any backend; the reference that the others are tested against. Scores are formed for a block of queries
//! at a time by the backend's batched product over batch and key heads; softmax statistics are f32.

use burn::backend::tensor::{BoolTensor, FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata, get_or_init_device_settings};
use burn::tensor::{DType, Shape, Slice};

use super::AttentionOptions;
use crate::body::cast;

/// Scores that exist at one time, unless a few queries alone have more.
const SCORES: usize = 1 << 22;

/// The fewest queries that are worth a product.
const FEWEST_QUERIES: usize = 16;

/// The sizes of one call, or of one block of its queries and the keys up to the last of them.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
}

impl Sizes {
    fn of<B: Backend>(q: &FloatTensor<B>, k: &FloatTensor<B>) -> Self {
        let [batch, queries, heads, dim] = q.shape().dims();
        let [_, keys, kv_heads, _] = k.shape().dims();
        Self { batch, queries, keys, heads, kv_heads, dim }
    }

    /// The blocks of queries, at least one, each as its first query and its sizes.
    fn blocks(self) -> impl DoubleEndedIterator<Item = (usize, Self)> {
        let most = (SCORES / (self.batch * self.heads * self.keys).max(1)).max(FEWEST_QUERIES);
        (0..self.queries.max(1)).step_by(most).map(move |first| {
            let queries = most.min(self.queries - first);
            let keys = self.keys - self.queries + first + queries;
            (first, Self { queries, keys, ..self })
        })
    }

    /// Rows that meet one key head: its group's query heads below one another.
    fn folded_rows(self) -> usize {
        self.heads / self.kv_heads * self.queries
    }

    /// `[B, Sq, H, D]` → `[B · Hkv, group · Sq, D]`.
    fn fold_queries<B: Backend>(self, t: FloatTensor<B>) -> FloatTensor<B> {
        let shape = Shape::new([self.batch * self.kv_heads, self.folded_rows(), self.dim]);
        B::float_reshape(B::float_swap_dims(t, 1, 2), shape)
    }

    fn unfold_queries<B: Backend>(self, t: FloatTensor<B>) -> FloatTensor<B> {
        let shape = Shape::new([self.batch, self.heads, self.queries, self.dim]);
        B::float_swap_dims(B::float_reshape(t, shape), 1, 2)
    }

    /// `[B, Sk, Hkv, D]` → `[B · Hkv, Sk, D]`.
    fn fold_keys<B: Backend>(self, t: FloatTensor<B>) -> FloatTensor<B> {
        let shape = Shape::new([self.batch * self.kv_heads, self.keys, self.dim]);
        B::float_reshape(B::float_swap_dims(t, 1, 2), shape)
    }

    fn unfold_keys<B: Backend>(self, t: FloatTensor<B>) -> FloatTensor<B> {
        let shape = Shape::new([self.batch, self.kv_heads, self.keys, self.dim]);
        B::float_swap_dims(B::float_reshape(t, shape), 1, 2)
    }

    /// A score matrix by query head, `[B, H, Sq, Sk]`, and by key head, `[B · Hkv, group · Sq, Sk]`.
    fn by_head(self) -> Shape {
        Shape::new([self.batch, self.heads, self.queries, self.keys])
    }

    fn by_group(self) -> Shape {
        Shape::new([self.batch * self.kv_heads, self.folded_rows(), self.keys])
    }
}

/// `count` rows of the second dimension of a tensor of four.
fn rows<B: Backend>(t: &FloatTensor<B>, first: usize, count: usize) -> FloatTensor<B> {
    if t.shape()[1] == count {
        return t.clone();
    }
    let mut slices = [Slice::full(); 4];
    slices[1] = Slice::from(first..first + count);
    B::float_slice(t.clone(), &slices)
}

/// True where a key is out of a query's sight, expanded to `[B, H, Sq, Sk]`.
fn hidden<B: Backend>(spans: IntTensor<B>, sizes: Sizes, window: Option<usize>) -> BoolTensor<B> {
    let Sizes { batch, queries, keys, .. } = sizes;
    let (device, dtype) = (spans.device(), spans.dtype());
    let out = get_or_init_device_settings::<B>(&device).bool_dtype;
    let full = Shape::new([batch, queries, keys]);
    let expand = |t: IntTensor<B>, shape: [usize; 3]| B::int_expand(B::int_reshape(t, shape.into()), full.clone());
    let part = |from: usize, to: usize, which: usize| {
        B::int_slice(spans.clone(), &[Slice::full(), Slice::from(from..to), Slice::from(which..which + 1)])
    };

    let query = B::int_arange((keys - queries) as i64..keys as i64, &device, dtype.into());
    let query = expand(query, [1, queries, 1]);
    let key = expand(B::int_arange(0..keys as i64, &device, dtype.into()), [1, 1, keys]);
    let end = expand(part(0, keys, 0), [batch, 1, keys]);
    let mut hidden = B::bool_or(B::int_greater(key, query.clone(), out), B::int_lower_equal(end, query, out));
    if let Some(window) = window {
        let position = |from: usize, shape: [usize; 3]| expand(part(from, keys, 1), shape);
        let distance = B::int_sub(position(keys - queries, [batch, queries, 1]), position(0, [batch, 1, keys]));
        hidden = B::bool_or(hidden, B::int_greater_equal_elem(distance, (window as i64).into(), out));
    }
    B::bool_expand(B::bool_reshape(hidden, Shape::new([batch, 1, queries, keys])), sizes.by_head())
}

/// s · Q Kᵀ in f32 with −∞ where a key is hidden, `[B, H, Sq, Sk]`. `q` and `k` are folded.
fn scores<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    spans: IntTensor<B>,
    sizes: Sizes,
    options: AttentionOptions,
) -> FloatTensor<B> {
    let product = cast::<B>(B::float_matmul(q, B::float_transpose(k)), DType::F32);
    let scaled = B::float_reshape(B::float_mul_scalar(product, options.scale.into()), sizes.by_head());
    B::float_mask_fill(scaled, hidden::<B>(spans, sizes, options.window), f32::NEG_INFINITY.into())
}

/// (O, log-sum-exp `[B, H, Sq, 1]` in f32).
pub fn forward<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    spans: IntTensor<B>,
    options: AttentionOptions,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (mut outs, mut lses) = (Vec::new(), Vec::new());
    for (first, sizes) in Sizes::of::<B>(&q, &k).blocks() {
        let q = rows::<B>(&q, first, sizes.queries);
        let (k, v) = (rows::<B>(&k, 0, sizes.keys), rows::<B>(&v, 0, sizes.keys));
        let (out, lse) = forward_block::<B>(q, k, v, spans.clone(), sizes, options);
        outs.push(out);
        lses.push(lse);
    }
    (joined::<B>(outs, 1), joined::<B>(lses, 2))
}

fn joined<B: Backend>(mut parts: Vec<FloatTensor<B>>, dim: usize) -> FloatTensor<B> {
    if parts.len() == 1 { parts.remove(0) } else { B::float_cat(parts, dim) }
}

fn forward_block<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    spans: IntTensor<B>,
    sizes: Sizes,
    options: AttentionOptions,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dtype = q.dtype();
    let scores = scores::<B>(sizes.fold_queries::<B>(q), sizes.fold_keys::<B>(k), spans, sizes, options);
    let max = B::float_max_dim(scores.clone(), 3);
    let p = B::float_exp(B::float_sub(scores, max.clone()));
    let sum = B::float_sum_dim(p.clone(), 3);
    let p = cast::<B>(B::float_div(p, sum.clone()), dtype);
    let out = B::float_matmul(B::float_reshape(p, sizes.by_group()), sizes.fold_keys::<B>(v));
    (sizes.unfold_queries::<B>(out), B::float_add(max, B::float_log(sum)))
}

/// With P = exp(scores − lse) formed again and δ = rowsum(dO ⊙ O) (Dao et al.: *FlashAttention*, 2022, appendix B):
/// dV = Pᵀ dO,  dS = P ⊙ (dO Vᵀ − δ),  dQ = s dS K,  dK = s dSᵀ Q.
///
/// Folding the group's heads into rows makes dK and dV sums over the heads that share them.
#[allow(clippy::too_many_arguments)]
pub fn backward<B: Backend>(
    grad: FloatTensor<B>,
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    out: FloatTensor<B>,
    lse: FloatTensor<B>,
    spans: IntTensor<B>,
    options: AttentionOptions,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let mut dqs = Vec::new();
    let mut sums: Option<(FloatTensor<B>, FloatTensor<B>)> = None;
    // From the last block, whose keys are all keys, to the first.
    for (first, sizes) in Sizes::of::<B>(&q, &k).blocks().rev() {
        let queries = |t: &FloatTensor<B>| rows::<B>(t, first, sizes.queries);
        let keys = |t: &FloatTensor<B>| rows::<B>(t, 0, sizes.keys);
        let lse = B::float_swap_dims(queries(&B::float_swap_dims(lse.clone(), 1, 2)), 1, 2);
        let tensors = [queries(&grad), queries(&q), keys(&k), keys(&v), queries(&out), lse];
        let (dq, dk, dv) = backward_block::<B>(tensors, spans.clone(), sizes, options);
        dqs.push(dq);
        sums = Some(match sums {
            None => (dk, dv),
            Some((dk_sum, dv_sum)) => (add_rows::<B>(dk_sum, dk), add_rows::<B>(dv_sum, dv)),
        });
    }
    dqs.reverse();
    let (dk, dv) = sums.expect("there is at least one block");
    (joined::<B>(dqs, 1), dk, dv)
}

/// Adds `part` to the first of the rows of `sum`.
fn add_rows<B: Backend>(sum: FloatTensor<B>, part: FloatTensor<B>) -> FloatTensor<B> {
    let count = part.shape()[1];
    let mut slices = [Slice::full(); 4];
    slices[1] = Slice::from(0..count);
    let added = B::float_add(B::float_slice(sum.clone(), &slices), part);
    B::float_slice_assign(sum, &slices, added)
}

fn backward_block<B: Backend>(
    [grad, q, k, v, out, lse]: [FloatTensor<B>; 6],
    spans: IntTensor<B>,
    sizes: Sizes,
    options: AttentionOptions,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let dtype = q.dtype();
    let (q, k, v) = (sizes.fold_queries::<B>(q), sizes.fold_keys::<B>(k), sizes.fold_keys::<B>(v));
    let (grad, out) = (sizes.fold_queries::<B>(grad), sizes.fold_queries::<B>(out));

    let scores = scores::<B>(q.clone(), k.clone(), spans, sizes, options);
    let p = B::float_reshape(B::float_exp(B::float_sub(scores, lse)), sizes.by_group());

    let dv = B::float_matmul(B::float_transpose(cast::<B>(p.clone(), dtype)), grad.clone());
    let delta = B::float_mul(cast::<B>(grad.clone(), DType::F32), cast::<B>(out, DType::F32));
    let delta = B::float_sum_dim(delta, 2);
    let dp = cast::<B>(B::float_matmul(grad, B::float_transpose(v)), DType::F32);
    let ds = B::float_mul(p, B::float_sub(dp, delta));
    let ds = cast::<B>(B::float_mul_scalar(ds, options.scale.into()), dtype);
    let dk = B::float_matmul(B::float_transpose(ds.clone()), q);
    let dq = B::float_matmul(ds, k);
    (sizes.unfold_queries::<B>(dq), sizes.unfold_keys::<B>(dk), sizes.unfold_keys::<B>(dv))
}
