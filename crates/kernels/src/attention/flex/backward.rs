//! The backward pass: every tile's probabilities are formed again and become the gradient of its scores.

use std::ops::Range;
use std::sync::OnceLock;

use super::Call;
use super::heads::{Heads, Results};
use super::plan::{Block, Run, Tile};
use super::softmax::{add, dot, gradients, scale};
use super::tasks::each_task;
use crate::flex::{Mat, gemm_serial};

/// Columns of a tile: two buffers of [`ROWS`](super::ROWS) rows of f32, about 100 KiB each.
const WIDEST: usize = 256;

/// Tasks that a call is cut into. It depends on nothing but the call, and so do the results to the last bit.
const TASKS: usize = 16;

/// Columns that starting a product costs about as much as.
const OVERHEAD: usize = 32;

/// Keys whose gradients are added up at one time.
const KEYS: usize = 64;

/// What the forward pass left, and the gradient of its result.
pub struct Saved<'a> {
    pub grad: &'a Heads,
    pub out: &'a Heads,
    pub lse: &'a Heads,
}

/// Neighbouring blocks of one row of the batch; with one key head it is a task. Its keys are the runs of keys that any
/// of its blocks meets, moved together.
struct Part<'a> {
    blocks: &'a [Block],
    keys: Vec<Run>,
}

impl<'a> Part<'a> {
    fn new(blocks: &'a [Block]) -> Self {
        let runs = blocks.iter().flat_map(|block| &block.tiles).flat_map(|tile| &tile.runs);
        let mut ranges: Vec<Range<usize>> = runs.map(|run| run.key..run.key + run.len).collect();
        ranges.sort_unstable_by_key(|range| range.start);
        let mut keys: Vec<Run> = Vec::new();
        for range in ranges {
            match keys.last_mut() {
                Some(last) if range.start <= last.key + last.len => last.len = last.len.max(range.end - last.key),
                last => {
                    let column = last.map_or(0, |last| last.column + last.len);
                    keys.push(Run { column, key: range.start, len: range.len() });
                }
            }
        }
        Self { blocks, keys }
    }

    fn width(&self) -> usize {
        self.keys.last().map_or(0, |last| last.column + last.len)
    }

    /// The column of a key that one of the blocks meets.
    fn column(&self, key: usize) -> usize {
        let run = self.keys[self.keys.partition_point(|run| run.key <= key) - 1];
        run.column + key - run.key
    }
}

/// Cuts the blocks into parts of about equal work, each within one row of the batch.
fn parts<'a>(blocks: &'a [Block], call: &Call) -> Vec<Part<'a>> {
    let per_row = TASKS.div_ceil((call.batch * call.kv_heads).max(1));
    let mut parts = Vec::new();
    for row in blocks.chunk_by(|a, b| a.batch == b.batch) {
        let cost = |block: &Block| block.count * (block.width() + OVERHEAD);
        let total: usize = row.iter().map(cost).sum();
        let mut done = 0;
        // The middle of a block decides which part it belongs to.
        let part_of = row.iter().map(|block| {
            let middle = done + cost(block) / 2;
            done += cost(block);
            middle * per_row / total
        });
        let part_of: Vec<usize> = part_of.collect();
        let mut rest = row;
        for part in part_of.chunk_by(|a, b| a == b) {
            let (blocks, others) = rest.split_at(part.len());
            parts.push(Part::new(blocks));
            rest = others;
        }
    }
    parts
}

/// What one core keeps between its tasks.
#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    grad: Vec<f32>,
    dq: Vec<f32>,
    p: Vec<f32>,
    ds: Vec<f32>,
    /// Of each row, the log-sum-exp of its scores and δ.
    rows: Vec<(f32, f32)>,
}

/// The part of dK and dV that comes from one task, `[width, dim]` over the columns of its [`Part`].
#[derive(Default)]
struct KeyGradients {
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// Writes dQ, dK and dV.
pub fn backward(call: &Call, saved: &Saved, dq: &Results, dk: &Results, dv: &Results) {
    let blocks = call.blocks(WIDEST);
    let parts = parts(&blocks, call);
    let work = 5 * call.work(&blocks);
    let slots: Vec<OnceLock<KeyGradients>> = (0..parts.len() * call.kv_heads).map(|_| OnceLock::new()).collect();
    each_task(slots.len(), work, Scratch::default, |scratch, number| {
        let (part, kv_head) = (&parts[number / call.kv_heads], number % call.kv_heads);
        let mut sums = KeyGradients { dk: vec![0.0; part.width() * call.dim], dv: vec![0.0; part.width() * call.dim] };
        for block in part.blocks {
            backward_block(call, saved, part, block, kv_head, scratch, &mut sums);
            for ((query, head), row) in call.rows(block, kv_head).zip(scratch.dq.chunks_exact(call.dim)) {
                // SAFETY: a task alone has the heads of its group for the queries of its blocks.
                unsafe { dq.write(block.batch, query, head, row) };
            }
        }
        slots[number].set(sums).unwrap_or_else(|_| unreachable!("a task runs once"));
    });
    add_up(call, &parts, &slots, dk, dv, work);
}

fn backward_block(
    call: &Call,
    saved: &Saved,
    part: &Part,
    block: &Block,
    kv_head: usize,
    scratch: &mut Scratch,
    sums: &mut KeyGradients,
) {
    let (dim, count) = (call.dim, block.count * call.group());
    for buffer in [&mut scratch.q, &mut scratch.grad, &mut scratch.dq] {
        buffer.resize(count * dim, 0.0);
    }
    scratch.dq.fill(0.0);
    call.gather(call.q, block, kv_head, &mut scratch.q);
    call.gather(saved.grad, block, kv_head, &mut scratch.grad);
    // With the scale in Q it is in the scores and in dK; dQ gets it at the end.
    scale(&mut scratch.q, call.scale);
    let rows = call.rows(block, kv_head).zip(scratch.grad.chunks_exact(dim)).map(|((query, head), grad)| {
        let delta = dot(grad, saved.out.head(block.batch, query, head));
        (saved.lse.head(block.batch, head, query)[0], delta)
    });
    scratch.rows.clear();
    scratch.rows.extend(rows);
    for tile in &block.tiles {
        backward_tile(call, part, block, tile, kv_head, scratch, sums);
    }
    scale(&mut scratch.dq, call.scale);
}

fn backward_tile(
    call: &Call,
    part: &Part,
    block: &Block,
    tile: &Tile,
    kv_head: usize,
    scratch: &mut Scratch,
    sums: &mut KeyGradients,
) {
    let (dim, count, width) = (call.dim, block.count * call.group(), tile.width);
    let Scratch { q, grad, dq, p, ds, rows } = scratch;
    let (q, grad) = (Mat::slice(q, count, dim), Mat::slice(grad, count, dim));
    p.resize(count * width, 0.0);
    ds.resize(count * width, 0.0);
    for run in &tile.runs {
        let [k, v] = [call.k, call.v].map(|t| t.rows(block.batch, run.key, run.len, kv_head));
        gemm_serial(&mut p[run.column..], width, false, 1.0, q, k.t());
        gemm_serial(&mut ds[run.column..], width, false, 1.0, grad, v.t());
    }
    let tile_rows = p.chunks_exact_mut(width).zip(ds.chunks_exact_mut(width));
    for (row, ((p, ds), &(lse, delta))) in tile_rows.zip(rows.iter()).enumerate() {
        call.spans.hide(block, tile, row / call.group(), p);
        gradients(p, ds, lse, delta);
    }
    for run in &tile.runs {
        let [p, ds] = [&*p, &*ds].map(|t| Mat::rows_of(&t[run.column..], count, run.len, width));
        let keys = part.column(run.key) * dim..;
        gemm_serial(&mut sums.dv[keys.clone()], dim, true, 1.0, p.t(), grad);
        gemm_serial(&mut sums.dk[keys], dim, true, 1.0, ds.t(), q);
        let k = call.k.rows(block.batch, run.key, run.len, kv_head);
        gemm_serial(dq, dim, true, 1.0, ds, k);
    }
}

/// Adds up what the tasks found, always in the order of the queries, and writes dK and dV.
fn add_up(call: &Call, parts: &[Part], sums: &[OnceLock<KeyGradients>], dk: &Results, dv: &Results, work: usize) {
    let (dim, per_row) = (call.dim, call.keys.div_ceil(KEYS));
    let buffers = || [(); 2].map(|()| vec![0f32; KEYS * dim]);
    each_task(call.batch * per_row * call.kv_heads, work, buffers, |[dk_sum, dv_sum], number| {
        let (chunk, kv_head) = (number / call.kv_heads, number % call.kv_heads);
        let (batch, first) = (chunk / per_row, chunk % per_row * KEYS);
        let end = call.keys.min(first + KEYS);
        dk_sum.fill(0.0);
        dv_sum.fill(0.0);
        for (index, part) in parts.iter().enumerate().filter(|(_, part)| part.blocks[0].batch == batch) {
            let sums = sums[index * call.kv_heads + kv_head].get().expect("all tasks have run");
            for run in &part.keys {
                let (from, to) = (first.max(run.key), end.min(run.key + run.len));
                if from < to {
                    let columns = (run.column + from - run.key) * dim..(run.column + to - run.key) * dim;
                    add(&mut dk_sum[(from - first) * dim..(to - first) * dim], &sums.dk[columns.clone()]);
                    add(&mut dv_sum[(from - first) * dim..(to - first) * dim], &sums.dv[columns]);
                }
            }
        }
        for (key, (dk_row, dv_row)) in (first..end).zip(dk_sum.chunks_exact(dim).zip(dv_sum.chunks_exact(dim))) {
            // SAFETY: a task alone has this key head for the keys of its chunk.
            unsafe {
                dk.write(batch, key, kv_head, dk_row);
                dv.write(batch, key, kv_head, dv_row);
            }
        }
    });
}
