//! The forward pass: a running softmax over the tiles of a block.

use super::Call;
use super::heads::Results;
use super::plan::{Block, Tile};
use super::softmax::{exponentials, scale};
use super::tasks::each_task;
use crate::flex::{Mat, gemm_serial};

/// Columns of a tile: with [`ROWS`](super::ROWS) rows of f32, about 200 KiB of scores.
const WIDEST: usize = 512;

/// What one core keeps between its tasks.
#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    scores: Vec<f32>,
    out: Vec<f32>,
    /// Of each row, the largest score so far and the sum of the exponentials behind it.
    running: Vec<(f32, f32)>,
}

/// Writes O and the log-sum-exp of every row of scores.
pub fn forward(call: &Call, out: &Results, lse: &Results) {
    let blocks = call.blocks(WIDEST);
    // The last queries have the most keys: the largest tasks come first.
    let task = |scratch: &mut Scratch, number: usize| {
        let number = blocks.len() * call.kv_heads - 1 - number;
        let (block, kv_head) = (&blocks[number / call.kv_heads], number % call.kv_heads);
        forward_block(call, block, kv_head, scratch);
        let results = scratch.out.chunks_exact(call.dim).zip(&scratch.running);
        for ((query, head), (row, (max, sum))) in call.rows(block, kv_head).zip(results) {
            // SAFETY: a task alone has the heads of its group for the queries of its block.
            unsafe {
                out.write(block.batch, query, head, row);
                lse.write(block.batch, query, head, &[max + sum.ln()]);
            }
        }
    };
    each_task(blocks.len() * call.kv_heads, 2 * call.work(&blocks), Scratch::default, task);
}

fn forward_block(call: &Call, block: &Block, kv_head: usize, scratch: &mut Scratch) {
    let (dim, count) = (call.dim, block.count * call.group());
    scratch.q.resize(count * dim, 0.0);
    scratch.out.clear();
    scratch.out.resize(count * dim, 0.0);
    scratch.running.clear();
    scratch.running.resize(count, (f32::NEG_INFINITY, 0.0));
    call.gather(call.q, block, kv_head, &mut scratch.q);
    for tile in &block.tiles {
        scratch.scores.resize(count * tile.width, 0.0);
        let q = Mat::slice(&scratch.q, count, dim);
        for run in &tile.runs {
            let k = call.k.rows(block.batch, run.key, run.len, kv_head);
            gemm_serial(&mut scratch.scores[run.column..], tile.width, false, call.scale, q, k.t());
        }
        softmax_step(call, block, tile, scratch);
        for run in &tile.runs {
            let p = Mat::rows_of(&scratch.scores[run.column..], count, run.len, tile.width);
            let v = call.v.rows(block.batch, run.key, run.len, kv_head);
            gemm_serial(&mut scratch.out, dim, true, 1.0, p, v);
        }
    }
    for (out, (_, sum)) in scratch.out.chunks_exact_mut(dim).zip(&scratch.running) {
        scale(out, 1.0 / sum);
    }
}

/// Makes exponentials of a tile's scores, and brings what was summed before to the new maximum.
fn softmax_step(call: &Call, block: &Block, tile: &Tile, scratch: &mut Scratch) {
    let group = call.group();
    let rows = scratch.scores.chunks_exact_mut(tile.width).zip(scratch.out.chunks_exact_mut(call.dim));
    for (row, ((scores, out), (max, sum))) in rows.zip(&mut scratch.running).enumerate() {
        call.spans.hide(block, tile, row / group, scores);
        let (new_max, new_sum) = exponentials(scores, *max);
        if *sum > 0.0 && new_max > *max {
            let factor = (*max - new_max).exp();
            scale(out, factor);
            *sum *= factor;
        }
        *sum += new_sum;
        *max = new_max;
    }
}
