//! Tiles of both operands. A left tile has a lane per row; a right one has a lane per 32-bit column and a pair of
//! neighbouring elements of the inner dimension per row, as the instruction multiplies them.

use std::ops::Range;

use super::{Pieces, ROWS, STEP};
use crate::gemm::buffer::Tile;
use crate::gemm::pack::{Lanes, MAX_COLUMNS, Operand, Source};
use crate::simd::{Avx2, interleave};

/// Elements of a row that are read at one time.
const CHUNK: usize = 4 * STEP;

/// Chunks, and rows where lanes are columns, that are asked for before they are read: a panel jumps from row to row, which
/// the processor does not foresee, and a weight comes from memory.
const CHUNKS_AHEAD: usize = 2;
const ROWS_AHEAD: usize = 16;

/// The pieces of x. Three make up x: each takes the upper half of what is left of the bits. Two are the nearest ones.
#[inline(always)]
fn split<const N: usize>(x: f32) -> [u16; N] {
    let mut rest = x;
    [(); N].map(|()| {
        let bits = rest.to_bits();
        let piece = match N {
            // Half of the last place is added; what is no number would become one.
            2 if !rest.is_nan() => bits.wrapping_add(0x8000),
            2 => bits | 0x0040_0000,
            _ => bits,
        } & 0xffff_0000;
        rest -= f32::from_bits(piece);
        (piece >> 16) as u16
    })
}

/// [`split`] of as many numbers as `pieces` take.
#[inline(always)]
fn split_all<const N: usize>(values: &[f32], pieces: [&mut [u16]; N]) {
    let pieces = pieces.map(|piece| &mut piece[..values.len()]);
    for i in 0..values.len() {
        let split = split::<N>(values[i]);
        for n in 0..N {
            pieces[n][i] = split[n];
        }
    }
}

/// [`split_all`] into the first `count` pieces.
#[inline(always)]
fn split_into(values: &[f32], count: usize, [first, second, third]: [&mut [u16]; Pieces::MOST]) {
    match count {
        2 => split_all(values, [first, second]),
        _ => split_all(values, [first, second, third]),
    }
}

/// The tiles `[lanes / 16][steps][pieces]` of some lanes and elements of a left operand.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub(super) fn left(operand: &Operand, lanes: Range<usize>, inner: Range<usize>, pieces: usize, tiles: &mut [Tile]) {
    let panel = inner.len().div_ceil(STEP) * pieces;
    for (tiles, first) in tiles.chunks_exact_mut(panel).zip(lanes.clone().step_by(ROWS)) {
        let lanes = first..lanes.end.min(first + ROWS);
        match pieces {
            2 => left_panel::<2>(operand, lanes, inner.clone(), tiles),
            _ => left_panel::<3>(operand, lanes, inner.clone(), tiles),
        }
    }
}

/// The tiles `[steps][pieces]` of up to 16 lanes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn left_panel<const N: usize>(operand: &Operand, lanes: Range<usize>, inner: Range<usize>, tiles: &mut [Tile]) {
    let (tiles, _) = tiles.as_chunks_mut::<N>();
    match operand.lanes {
        Lanes::Rows => {
            let mut buffer = [0f32; CHUNK];
            for row in 0..ROWS {
                for (tiles, start) in tiles.chunks_mut(CHUNK / STEP).zip(inner.clone().step_by(CHUNK)) {
                    let len = if row < lanes.len() { CHUNK.min(inner.end - start) } else { 0 };
                    let values = match len {
                        0 => &[],
                        _ => operand.source.part(lanes.start + row, start, len, &mut buffer),
                    };
                    let (whole, rest) = values.as_chunks::<STEP>();
                    for (i, tiles) in tiles.iter_mut().enumerate() {
                        let pieces = tiles.each_mut().map(|tile| &mut tile.0[row]);
                        match whole.get(i) {
                            Some(values) => split_all(values, pieces.map(|piece| &mut piece[..])),
                            None => {
                                let mut values = [0f32; STEP];
                                if i == whole.len() {
                                    values[..rest.len()].copy_from_slice(rest);
                                }
                                split_all(&values, pieces.map(|piece| &mut piece[..]));
                            }
                        }
                    }
                }
            }
        }
        Lanes::Columns => {
            let mut values = [[0f32; ROWS]; STEP];
            for (tiles, start) in tiles.iter_mut().zip(inner.clone().step_by(STEP)) {
                let len = STEP.min(inner.end - start);
                for (k, values) in values[..len].iter_mut().enumerate() {
                    operand.source.read(start + k, lanes.start, &mut values[..lanes.len()]);
                }
                values[len..].fill([0.0; ROWS]);
                for row in 0..ROWS {
                    let lane = values.map(|values| values[row]);
                    split_all(&lane, tiles.each_mut().map(|tile| &mut tile.0[row][..]));
                }
            }
        }
    }
}

/// The tiles `[lanes / 16][steps][pieces]` of some lanes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub(super) fn right(operand: &Operand, lanes: Range<usize>, inner: Range<usize>, pieces: usize, tiles: &mut [Tile]) {
    let steps = inner.len().div_ceil(STEP);
    assert!(tiles.len() == lanes.len().div_ceil(ROWS) * steps * pieces && lanes.len() <= MAX_COLUMNS);
    match operand.lanes {
        Lanes::Rows => right_of_rows(operand.source, lanes, inner, pieces, tiles),
        Lanes::Columns => right_of_columns(operand.source, lanes, inner, pieces, tiles),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn right_of_rows(source: &dyn Source, lanes: Range<usize>, inner: Range<usize>, pieces: usize, tiles: &mut [Tile]) {
    let panel_tiles = inner.len().div_ceil(STEP) * pieces;
    // Rows of a panel and elements of a chunk, in the order in which they are read.
    let chunks = inner.len().div_ceil(CHUNK);
    let chunk = |number: usize| {
        let (panel, start) = (number / chunks, inner.start + number % chunks * CHUNK);
        let first = lanes.start + panel * ROWS;
        (first..lanes.end.min(first + ROWS), start..inner.end.min(start + CHUNK))
    };
    let prefetch = |number: usize| {
        let (rows, part) = chunk(number);
        rows.for_each(|row| source.prefetch(row, part.start, part.len()));
    };
    (0..CHUNKS_AHEAD).for_each(prefetch);
    let avx2 = Avx2::detect();
    let mut rows = [[[0u16; CHUNK]; ROWS]; Pieces::MOST];
    let mut values = [0f32; CHUNK];
    let parts = tiles.chunks_exact_mut(panel_tiles).flat_map(|panel| panel.chunks_mut(CHUNK / STEP * pieces));
    for (number, tiles) in parts.enumerate() {
        prefetch(number + CHUNKS_AHEAD);
        let (lanes, part) = chunk(number);
        let len = part.len();
        for lane in 0..ROWS {
            let [whole, second, third] = rows.each_mut().map(|rows| &mut rows[lane]);
            if lane >= lanes.len() {
                [whole, second, third].into_iter().for_each(|row| row.fill(0));
            } else if let Some(values) = source.bf16(lanes.start + lane, part.start, len) {
                whole[..len].copy_from_slice(bytemuck::cast_slice(values));
                whole[len..].fill(0);
            } else {
                let values = source.part(lanes.start + lane, part.start, len, &mut values);
                [&mut *whole, &mut *second, &mut *third].into_iter().for_each(|row| row[len..].fill(0));
                split_into(values, pieces, [whole, second, third]);
            }
        }
        for (step, tiles) in tiles.chunks_exact_mut(pieces).enumerate() {
            for (rows, tile) in rows.iter().zip(tiles) {
                // Pairs of elements move as one 32-bit number.
                let rows: [[f32; STEP / 2]; ROWS] =
                    std::array::from_fn(|lane| bytemuck::cast(rows[lane].as_chunks::<STEP>().0[step]));
                interleave(avx2, &rows, bytemuck::cast_mut::<_, [[f32; ROWS]; STEP / 2]>(&mut tile.0));
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn right_of_columns(source: &dyn Source, lanes: Range<usize>, inner: Range<usize>, pieces: usize, tiles: &mut [Tile]) {
    let steps = inner.len().div_ceil(STEP);
    let width = lanes.len();
    for row in inner.clone().take(ROWS_AHEAD) {
        source.prefetch(row, lanes.start, width);
    }
    // The two rows of a pair, in pieces; behind the last row and lane there are zeros.
    let mut pair = [[[0u16; MAX_COLUMNS]; Pieces::MOST]; 2];
    let mut values = [0f32; MAX_COLUMNS];
    for number in 0..steps * (STEP / 2) {
        for (row, split) in (inner.start + 2 * number..).zip(&mut pair) {
            if row + ROWS_AHEAD < inner.end {
                source.prefetch(row + ROWS_AHEAD, lanes.start, width);
            }
            let [whole, second, third] = split;
            if row >= inner.end {
                [whole, second, third].into_iter().for_each(|row| row.fill(0));
            } else if let Some(values) = source.bf16(row, lanes.start, width) {
                whole[..width].copy_from_slice(bytemuck::cast_slice(values));
            } else {
                let values = source.part(row, lanes.start, width, &mut values);
                split_into(values, pieces, [whole, second, third]);
            }
        }
        let (step, at) = (number / (STEP / 2), number % (STEP / 2));
        for (panel, tiles) in tiles.chunks_exact_mut(steps * pieces).enumerate() {
            for (piece, tile) in tiles[step * pieces..][..pieces].iter_mut().enumerate() {
                let [low, high] = pair.each_ref().map(|rows| &rows[piece].as_chunks::<ROWS>().0[panel]);
                let pairs: [u32; ROWS] = std::array::from_fn(|i| u32::from(low[i]) | u32::from(high[i]) << 16);
                tile.0[at] = bytemuck::cast(pairs);
            }
        }
    }
}
