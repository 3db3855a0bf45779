//! Bodies over any backend; the reference that the others are tested against. Scores are formed a block of batch and
//! key heads at a time by the backend's batched product; softmax statistics are f32.

use burn::backend::tensor::{BoolTensor, FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata, get_or_init_device_settings};
use burn::tensor::{DType, Shape};

use super::AttentionOptions;
use crate::body::cast;

/// The sizes of one call.
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

/// True where a key is out of a query's sight, expanded to `[B, H, Sq, Sk]`.
fn hidden<B: Backend>(starts: IntTensor<B>, sizes: Sizes, window: Option<usize>) -> BoolTensor<B> {
    let Sizes { batch, queries, keys, .. } = sizes;
    let (device, dtype) = (starts.device(), starts.dtype());
    let out = get_or_init_device_settings::<B>(&device).bool_dtype;
    let full = Shape::new([batch, queries, keys]);
    let expand = |t: IntTensor<B>, shape: [usize; 3]| B::int_expand(B::int_reshape(t, shape.into()), full.clone());

    let absolute = B::int_arange((keys - queries) as i64..keys as i64, &device, dtype.into());
    let absolute = expand(absolute, [1, queries, 1]);
    let key = expand(B::int_arange(0..keys as i64, &device, dtype.into()), [1, 1, keys]);
    let starts = expand(starts, [batch, queries, 1]);
    let mut hidden =
        B::bool_or(B::int_lower(key.clone(), starts, out), B::int_greater(key.clone(), absolute.clone(), out));
    if let Some(window) = window {
        let distance = B::int_sub(absolute, key);
        hidden = B::bool_or(hidden, B::int_greater_equal_elem(distance, (window as i64).into(), out));
    }
    B::bool_expand(B::bool_reshape(hidden, Shape::new([batch, 1, queries, keys])), sizes.by_head())
}

/// s · Q Kᵀ in f32 with −∞ where a key is hidden, `[B, H, Sq, Sk]`. `q` and `k` are folded.
fn scores<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    starts: IntTensor<B>,
    sizes: Sizes,
    options: AttentionOptions,
) -> FloatTensor<B> {
    let product = cast::<B>(B::float_matmul(q, B::float_transpose(k)), DType::F32);
    let scaled = B::float_reshape(B::float_mul_scalar(product, options.scale.into()), sizes.by_head());
    B::float_mask_fill(scaled, hidden::<B>(starts, sizes, options.window), f32::NEG_INFINITY.into())
}

/// (O, log-sum-exp `[B, H, Sq, 1]` in f32).
pub fn forward<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    starts: IntTensor<B>,
    options: AttentionOptions,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (sizes, dtype) = (Sizes::of::<B>(&q, &k), q.dtype());
    let scores = scores::<B>(sizes.fold_queries::<B>(q), sizes.fold_keys::<B>(k), starts, sizes, options);
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
    starts: IntTensor<B>,
    options: AttentionOptions,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let (sizes, dtype) = (Sizes::of::<B>(&q, &k), q.dtype());
    let (q, k, v) = (sizes.fold_queries::<B>(q), sizes.fold_keys::<B>(k), sizes.fold_keys::<B>(v));
    let (grad, out) = (sizes.fold_queries::<B>(grad), sizes.fold_queries::<B>(out));

    let scores = scores::<B>(q.clone(), k.clone(), starts, sizes, options);
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
