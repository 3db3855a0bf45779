//! The CPU body. A block of queries of one head meets exactly the range of keys that any of them can see, so packed
//! documents and windows cost what they contain; the largest buffer is one block of queries times that range.

use burn::backend::Flex;
use burn::backend::TensorMetadata;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;
use rayon::prelude::*;

use super::{AttentionOps, AttentionOptions, generic};
use crate::flex::{Mat, Rows, f32_tensor, gemm_serial, integers};
use crate::simd::{exp, lane_max, lane_sum, vectorised};

/// Queries that are multiplied at one time.
const BLOCK: usize = 64;

/// The tensors of one call as matrices of heads.
struct Call<'a> {
    q: &'a Rows,
    k: &'a Rows,
    v: &'a Rows,
    starts: Vec<usize>,
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    kv_heads: usize,
    dim: usize,
    options: AttentionOptions,
}

/// A block of queries of one head, and the keys that it meets.
#[derive(Clone, Copy)]
struct Block {
    batch: usize,
    head: usize,
    first: usize,
    count: usize,
    /// First key that any query of the block sees, and one past the last.
    keys: (usize, usize),
}

impl Block {
    fn width(self) -> usize {
        self.keys.1 - self.keys.0
    }
}

impl<'a> Call<'a> {
    fn new(
        q: &'a Rows,
        k: &'a Rows,
        v: &'a Rows,
        starts: &FlexTensor,
        [q_shape, k_shape]: [[usize; 4]; 2],
        options: AttentionOptions,
    ) -> Self {
        let ([batch, queries, heads, dim], [_, keys, kv_heads, _]) = (q_shape, k_shape);
        Self { q, k, v, starts: integers(starts), batch, queries, keys, heads, kv_heads, dim, options }
    }

    /// The first and one past the last key that a query sees.
    fn sight(&self, batch: usize, query: usize) -> (usize, usize) {
        let absolute = query + self.keys - self.queries;
        let start = self.starts[batch * self.queries + query];
        let start = self.options.window.map_or(start, |window| start.max((absolute + 1).saturating_sub(window)));
        (start, absolute + 1)
    }

    fn block(&self, batch: usize, head: usize, first: usize) -> Block {
        let count = BLOCK.min(self.queries - first);
        let sights = (first..first + count).map(|query| self.sight(batch, query));
        let keys = sights.fold((usize::MAX, 0), |(low, high), (start, end)| (low.min(start), high.max(end)));
        Block { batch, head, first, count, keys }
    }

    /// The block's rows of a tensor laid out like q.
    fn query_rows<'t>(&self, values: &'t [f32], block: Block) -> Mat<'t> {
        let offset = ((block.batch * self.queries + block.first) * self.heads + block.head) * self.dim;
        Mat::rows_of(&values[offset..], block.count, self.dim, self.heads * self.dim)
    }

    /// The block's keys of a tensor laid out like k.
    fn key_rows<'t>(&self, values: &'t [f32], block: Block) -> Mat<'t> {
        let kv = block.head / (self.heads / self.kv_heads);
        let offset = ((block.batch * self.keys + block.keys.0) * self.kv_heads + kv) * self.dim;
        Mat::rows_of(&values[offset..], block.width(), self.dim, self.kv_heads * self.dim)
    }

    /// s · Q Kᵀ of the block, row-major; what a query cannot see is left as it came out.
    fn scores(&self, block: Block, scores: &mut [f32]) {
        let (q, k) = (self.query_rows(self.q.values(), block), self.key_rows(self.k.values(), block));
        gemm_serial(scores, block.width(), false, self.options.scale, q, k.t());
    }

    /// The part of a row of scores that its query sees.
    fn seen(&self, block: Block, row: usize) -> std::ops::Range<usize> {
        let (start, end) = self.sight(block.batch, block.first + row);
        start - block.keys.0..end - block.keys.0
    }
}

vectorised! {
    /// softmax in place; returns the log-sum-exp.
    fn softmax(row: &mut [f32]) -> f32 {
        let max = lane_max(row);
        for value in row.iter_mut() {
            *value = exp(*value - max);
        }
        let sum = lane_sum(row.len(), |i| row[i]);
        let factor = 1.0 / sum;
        for value in row.iter_mut() {
            *value *= factor;
        }
        max + sum.ln()
    }
}

vectorised! {
    /// P = exp(scores − lse) in place.
    fn probabilities(row: &mut [f32], lse: f32) {
        for value in row.iter_mut() {
            *value = exp(*value - lse);
        }
    }
}

vectorised! {
    /// dS = s P ⊙ (dP − δ), over dP.
    fn score_gradient(dp: &mut [f32], p: &[f32], delta: f32, scale: f32) {
        let p = &p[..dp.len()];
        for i in 0..dp.len() {
            dp[i] = scale * p[i] * (dp[i] - delta);
        }
    }
}

vectorised! {
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        let b = &b[..a.len()];
        lane_sum(a.len(), |i| a[i] * b[i])
    }
}

/// Clears what lies outside `seen`, and applies `f` to what lies inside.
fn within(row: &mut [f32], seen: std::ops::Range<usize>, f: impl FnOnce(&mut [f32])) {
    row[..seen.start].fill(0.0);
    row[seen.end..].fill(0.0);
    f(&mut row[seen]);
}

fn unsupported(tensors: &[&FlexTensor]) -> bool {
    tensors.iter().any(|t| t.dtype() != DType::F32)
}

impl AttentionOps for Flex {
    fn packed_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        starts: FlexTensor,
        options: AttentionOptions,
    ) -> FlexTensor {
        Self::packed_attention_with_lse(q, k, v, starts, options).0
    }

    fn packed_attention_with_lse(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        starts: FlexTensor,
        options: AttentionOptions,
    ) -> (FlexTensor, FlexTensor) {
        if unsupported(&[&q, &k, &v]) {
            return generic::forward::<Self>(q, k, v, starts, options);
        }
        let shapes = [q.shape().dims(), k.shape().dims()];
        let (q, k, v) = (Rows::of(&q), Rows::of(&k), Rows::of(&v));
        let call = Call::new(&q, &k, &v, &starts, shapes, options);
        let Call { batch, queries, heads, dim, .. } = call;
        let (mut out, mut lse) = (vec![0f32; q.len()], vec![0f32; batch * heads * queries]);
        // A task is a block of queries with all its heads: their outputs are neighbours in memory.
        let blocks: Vec<Task> = split_blocks(&mut out, &call);
        let results: Vec<(usize, usize, Vec<f32>)> = blocks
            .into_par_iter()
            .map(|task| {
                let mut scratch = Vec::new();
                let mut lse = Vec::with_capacity(heads * task.count);
                for head in 0..heads {
                    let block = call.block(task.batch, head, task.first);
                    scratch.resize(block.count * block.width(), 0.0);
                    call.scores(block, &mut scratch);
                    for (i, row) in scratch.chunks_exact_mut(block.width()).enumerate() {
                        within(row, call.seen(block, i), |seen| lse.push(softmax(seen)));
                    }
                    let p = Mat::slice(&scratch, block.count, block.width());
                    let v = call.key_rows(call.v.values(), block);
                    gemm_serial(&mut task.rows[head * dim..], heads * dim, false, 1.0, p, v);
                }
                (task.batch, task.first, lse)
            })
            .collect();
        for (b, first, values) in results {
            let count = values.len() / heads;
            for (head, values) in values.chunks_exact(count).enumerate() {
                lse[(b * heads + head) * queries + first..][..count].copy_from_slice(values);
            }
        }
        (f32_tensor(out, [batch, queries, heads, dim]), f32_tensor(lse, [batch, heads, queries, 1]))
    }

    fn packed_attention_backward(
        grad: FlexTensor,
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        out: FlexTensor,
        lse: FlexTensor,
        starts: FlexTensor,
        options: AttentionOptions,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        if unsupported(&[&grad, &q, &k, &v, &out]) {
            return generic::backward::<Self>(grad, q, k, v, out, lse, starts, options);
        }
        let shapes = [q.shape().dims(), k.shape().dims()];
        let (q, k, v) = (Rows::of(&q), Rows::of(&k), Rows::of(&v));
        let (grad, out, lse) = (Rows::of(&grad), Rows::of(&out), Rows::of(&lse));
        let call = Call::new(&q, &k, &v, &starts, shapes, options);
        let Call { batch, queries, keys, heads, kv_heads, dim, .. } = call;
        let group = heads / kv_heads;

        // A task is one key head of one row with all query heads that share it, so that dK and dV have one writer.
        let results: Vec<[Vec<f32>; 3]> = (0..batch * kv_heads)
            .into_par_iter()
            .map(|task| {
                let (b, kv) = (task / kv_heads, task % kv_heads);
                let mut dq = vec![0f32; queries * group * dim];
                let (mut dk, mut dv) = (vec![0f32; keys * dim], vec![0f32; keys * dim]);
                let (mut p, mut ds) = (Vec::new(), Vec::new());
                for (head_in_group, first) in
                    (0..group).flat_map(|head| (0..queries).step_by(BLOCK).map(move |first| (head, first)))
                {
                    let block = call.block(b, kv * group + head_in_group, first);
                    let (count, width) = (block.count, block.width());
                    p.resize(count * width, 0.0);
                    ds.resize(count * width, 0.0);
                    call.scores(block, &mut p);
                    let (g, o) = (call.query_rows(grad.values(), block), call.query_rows(out.values(), block));
                    gemm_serial(&mut ds, width, false, 1.0, g, call.key_rows(call.v.values(), block).t());
                    let lse = &lse.values()[(b * heads + block.head) * queries + first..][..count];
                    for (i, (p, ds)) in p.chunks_exact_mut(width).zip(ds.chunks_exact_mut(width)).enumerate() {
                        let seen = call.seen(block, i);
                        within(p, seen.clone(), |p| probabilities(p, lse[i]));
                        let delta = dot(g.row(i), o.row(i));
                        within(ds, seen.clone(), |ds| score_gradient(ds, &p[seen], delta, options.scale));
                    }
                    let (p, ds) = (Mat::slice(&p, count, width), Mat::slice(&ds, count, width));
                    let range = block.keys.0 * dim..block.keys.1 * dim;
                    gemm_serial(&mut dv[range.clone()], dim, true, 1.0, p.t(), g);
                    gemm_serial(&mut dk[range], dim, true, 1.0, ds.t(), call.query_rows(call.q.values(), block));
                    let dq = &mut dq[(first * group + head_in_group) * dim..];
                    gemm_serial(dq, group * dim, false, 1.0, ds, call.key_rows(call.k.values(), block));
                }
                [dq, dk, dv]
            })
            .collect();

        let gather = |part: usize, rows: usize, heads: usize| {
            let (mut all, width) = (vec![0f32; batch * rows * heads * dim], heads / kv_heads * dim);
            all.par_chunks_mut(heads * dim).enumerate().for_each(|(row, all)| {
                for (kv, all) in all.chunks_exact_mut(width).enumerate() {
                    let values = &results[row / rows * kv_heads + kv][part];
                    all.copy_from_slice(&values[row % rows * width..][..width]);
                }
            });
            f32_tensor(all, [batch, rows, heads, dim])
        };
        (gather(0, queries, heads), gather(1, keys, kv_heads), gather(2, keys, kv_heads))
    }
}

/// A block of queries and its rows of the output.
struct Task<'a> {
    batch: usize,
    first: usize,
    count: usize,
    rows: &'a mut [f32],
}

fn split_blocks<'a>(out: &'a mut [f32], call: &Call) -> Vec<Task<'a>> {
    let width = call.heads * call.dim;
    let mut tasks = Vec::new();
    for (batch, rows) in out.chunks_mut((call.queries * width).max(1)).enumerate() {
        for (i, rows) in rows.chunks_mut(BLOCK * width).enumerate() {
            tasks.push(Task { batch, first: i * BLOCK, count: rows.len() / width, rows });
        }
    }
    tasks
}
