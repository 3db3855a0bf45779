//! The CPU body. A block of queries, with all the heads that share a key head as further rows, meets the keys that any
//! of the queries sees, moved together into tiles that fit into the cache. Trees, packed documents and windows cost
//! what they contain, and no buffer grows with the square of the length.
//!
//! * [`plan`] finds what each block meets, once for all heads;
//! * [`forward`](mod@forward) and [`backward`](mod@backward) are the passes;
//! * [`heads`] is where heads are read and written, possibly inside the rows of a wider tensor.

mod backward;
mod forward;
mod heads;
mod plan;
mod softmax;
mod tasks;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;

use super::{AttentionOps, AttentionOptions, generic};
use crate::flex::{f32_tensor, integers};
pub(super) use heads::{Heads, Results};
use plan::{Block, Spans};

/// Rows of a product that one block of queries aims at.
const ROWS: usize = 96;

/// The queries and keys of one call.
struct Call<'a> {
    q: &'a Heads,
    k: &'a Heads,
    v: &'a Heads,
    spans: Spans,
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    scale: f32,
}

impl<'a> Call<'a> {
    fn new([q, k, v]: [&'a Heads; 3], spans: &FlexTensor, options: AttentionOptions) -> Self {
        let ([batch, queries, heads, dim], [_, keys, kv_heads, _]) = (q.dims(), k.dims());
        let spans = Spans::new(&integers(spans), keys, queries, options.window);
        Self { q, k, v, spans, batch, queries, keys, heads, kv_heads, dim, scale: options.scale }
    }

    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn blocks(&self, widest: usize) -> Vec<Block> {
        self.spans.blocks((ROWS / self.group()).clamp(16, 64), widest)
    }

    /// Multiply-adds of one product over all blocks and heads.
    fn work(&self, blocks: &[Block]) -> usize {
        blocks.iter().map(|block| block.count * block.width()).sum::<usize>() * self.heads * self.dim
    }

    /// The rows of a block under one key head: for each query the heads of the group.
    fn rows(&self, block: &Block, kv_head: usize) -> impl Iterator<Item = (usize, usize)> {
        let (group, first) = (self.group(), block.first);
        (0..block.count * group).map(move |row| (first + row / group, kv_head * group + row % group))
    }

    /// Copies a block's rows out of a tensor laid out like q.
    fn gather(&self, tensor: &Heads, block: &Block, kv_head: usize, rows: &mut [f32]) {
        for ((query, head), row) in self.rows(block, kv_head).zip(rows.chunks_exact_mut(self.dim)) {
            row.copy_from_slice(tensor.head(block.batch, query, head));
        }
    }
}

/// Elements from one batch, row and head to the next of a contiguous tensor.
fn contiguous_strides(rows: usize, heads: usize, dim: usize) -> [usize; 3] {
    [rows * heads * dim, heads * dim, dim]
}

/// O `[B, Sq, H, D]` and the log-sum-exp of every row of scores `[B, H, Sq]`.
pub(super) fn forward(heads: [&Heads; 3], spans: &FlexTensor, options: AttentionOptions) -> (Vec<f32>, Vec<f32>) {
    let call = Call::new(heads, spans, options);
    let Call { batch, queries, heads, dim, .. } = call;
    let mut out = vec![0f32; batch * queries * heads * dim];
    let mut lse = vec![0f32; batch * heads * queries];
    forward::forward(
        &call,
        &Results::new(&mut out, contiguous_strides(queries, heads, dim)),
        &Results::new(&mut lse, [heads * queries, 1, queries]),
    );
    (out, lse)
}

/// Writes dQ, dK and dV. `saved` are the gradient of O, O and the log-sum-exp `[B, H, Sq, 1]`.
pub(super) fn backward(
    heads: [&Heads; 3],
    [grad, out, lse]: [&Heads; 3],
    spans: &FlexTensor,
    options: AttentionOptions,
    [dq, dk, dv]: [&Results; 3],
) {
    let call = Call::new(heads, spans, options);
    backward::backward(&call, &backward::Saved { grad, out, lse }, dq, dk, dv);
}

fn unsupported(tensors: &[&FlexTensor]) -> bool {
    tensors.iter().any(|t| t.dtype() != DType::F32)
}

impl AttentionOps for Flex {
    fn packed_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        spans: FlexTensor,
        options: AttentionOptions,
    ) -> FlexTensor {
        Self::packed_attention_with_lse(q, k, v, spans, options).0
    }

    fn packed_attention_with_lse(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        spans: FlexTensor,
        options: AttentionOptions,
    ) -> (FlexTensor, FlexTensor) {
        if unsupported(&[&q, &k, &v]) {
            return generic::forward::<Self>(q, k, v, spans, options);
        }
        let [q, k, v] = [q, k, v].map(|t| Heads::of(&t));
        let [batch, queries, heads, dim] = q.dims();
        let (out, lse) = forward([&q, &k, &v], &spans, options);
        (f32_tensor(out, [batch, queries, heads, dim]), f32_tensor(lse, [batch, heads, queries, 1]))
    }

    fn packed_attention_backward(
        grad: FlexTensor,
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        out: FlexTensor,
        lse: FlexTensor,
        spans: FlexTensor,
        options: AttentionOptions,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        if unsupported(&[&grad, &q, &k, &v, &out]) {
            return generic::backward::<Self>(grad, q, k, v, out, lse, spans, options);
        }
        let [q, k, v, grad, out, lse] = [q, k, v, grad, out, lse].map(|t| Heads::of(&t));
        let ([batch, queries, heads, dim], [_, keys, kv_heads, _]) = (q.dims(), k.dims());
        let mut dq = vec![0f32; batch * queries * heads * dim];
        let [mut dk, mut dv] = [(); 2].map(|()| vec![0f32; batch * keys * kv_heads * dim]);
        let strides = contiguous_strides(keys, kv_heads, dim);
        let results = [
            &Results::new(&mut dq, contiguous_strides(queries, heads, dim)),
            &Results::new(&mut dk, strides),
            &Results::new(&mut dv, strides),
        ];
        backward([&q, &k, &v], [&grad, &out, &lse], &spans, options, results);
        (
            f32_tensor(dq, [batch, queries, heads, dim]),
            f32_tensor(dk, [batch, keys, kv_heads, dim]),
            f32_tensor(dv, [batch, keys, kv_heads, dim]),
        )
    }
}
