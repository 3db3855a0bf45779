//! What each block of queries has to meet, found once per call and shared by all heads.

use std::ops::Range;

/// Keys between two runs that are multiplied along, because a product of its own costs more.
const GAP: usize = 8;

/// The forest of a call: for each key one past the last column that sees it, and its position.
pub struct Spans {
    /// `batch * keys` values each.
    ends: Vec<i32>,
    positions: Vec<i32>,
    keys: usize,
    /// Columns in front of the first query.
    past: usize,
    window: Option<i32>,
}

/// Neighbouring columns of a tile and the key that the first of them is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub column: usize,
    pub key: usize,
    pub len: usize,
}

impl Run {
    pub fn columns(self) -> Range<usize> {
        self.column..self.column + self.len
    }
}

/// Keys that a block meets at one time, moved together into neighbouring columns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tile {
    pub width: usize,
    /// All its columns, as runs of neighbouring keys: one product each.
    pub runs: Vec<Run>,
    /// The columns that some query of the block sees and some other does not.
    pub partial: Vec<Run>,
}

/// A block of queries of one row of the batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    pub batch: usize,
    pub first: usize,
    pub count: usize,
    pub tiles: Vec<Tile>,
}

impl Block {
    /// Columns of all its tiles.
    pub fn width(&self) -> usize {
        self.tiles.iter().map(|tile| tile.width).sum()
    }
}

/// How much of a key a block sees.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sight {
    Nothing,
    Part,
    All,
}

impl Spans {
    /// `spans` is `[batch, keys, 2]`, row-major.
    pub fn new(spans: &[usize], keys: usize, queries: usize, window: Option<usize>) -> Self {
        let clamped = |value: usize| i32::try_from(value).unwrap_or(i32::MAX);
        let (pairs, _) = spans.as_chunks::<2>();
        Self {
            ends: pairs.iter().map(|pair| clamped(pair[0])).collect(),
            positions: pairs.iter().map(|pair| clamped(pair[1])).collect(),
            keys,
            past: keys - queries,
            window: window.map(clamped),
        }
    }

    /// The blocks of `most` queries each in the order of the queries, with tiles of at most `widest` columns.
    pub fn blocks(&self, most: usize, widest: usize) -> Vec<Block> {
        let (batch, queries) = (self.ends.len() / self.keys.max(1), self.keys - self.past);
        let firsts = (0..batch).flat_map(|batch| (0..queries).step_by(most).map(move |first| (batch, first)));
        let mut sights = Vec::new();
        firsts
            .map(|(batch, first)| {
                let count = most.min(queries - first);
                self.sights(batch, first, count, &mut sights);
                fill_gaps(&mut sights);
                Block { batch, first, count, tiles: tiles(&sights, widest) }
            })
            .collect()
    }

    fn sights(&self, batch: usize, first: usize, count: usize, sights: &mut Vec<Sight>) {
        let (ends, positions) = (self.row(&self.ends, batch), self.row(&self.positions, batch));
        let queries = self.past + first..self.past + first + count;
        let (first, last) = (queries.start as i32, queries.end as i32 - 1);
        let at = &positions[queries.clone()];
        let (nearest, furthest) = (at.iter().min().copied().unwrap_or(0), at.iter().max().copied().unwrap_or(0));
        let window = self.window.unwrap_or(i32::MAX);
        let keys = ends.iter().zip(positions).take(queries.end).enumerate();
        sights.clear();
        sights.extend(keys.map(|(key, (&end, &position))| {
            let hidden = end <= first || nearest.saturating_sub(position) >= window;
            let whole = key as i32 <= first && end > last && furthest.saturating_sub(position) < window;
            match (hidden, whole) {
                (true, _) => Sight::Nothing,
                (false, true) => Sight::All,
                (false, false) => Sight::Part,
            }
        }));
    }

    /// Marks with −∞ what a query cannot see of a row of scores over `tile`.
    pub fn hide(&self, block: &Block, tile: &Tile, query: usize, scores: &mut [f32]) {
        let (ends, positions) = (self.row(&self.ends, block.batch), self.row(&self.positions, block.batch));
        let column = self.past + block.first + query;
        for run in &tile.partial {
            let (scores, keys) = (&mut scores[run.columns()], run.key..run.key + run.len);
            hide_strangers(scores, run.key as i32, &ends[keys.clone()], column as i32);
            if let Some(window) = self.window {
                hide_distant(scores, &positions[keys], positions[column].saturating_sub(window));
            }
        }
    }

    fn row<'a>(&self, values: &'a [i32], batch: usize) -> &'a [i32] {
        &values[batch * self.keys..][..self.keys]
    }
}

crate::simd::vectorised! {
    /// Keys behind the query, and keys whose subtree ended before it.
    fn hide_strangers(scores: &mut [f32], first: i32, ends: &[i32], query: i32) {
        let ends = &ends[..scores.len()];
        for i in 0..scores.len() {
            let hidden = (first + i as i32 > query) | (ends[i] <= query);
            scores[i] = if hidden { f32::NEG_INFINITY } else { scores[i] };
        }
    }
}

crate::simd::vectorised! {
    /// Keys whose position is `last_hidden` or less.
    fn hide_distant(scores: &mut [f32], positions: &[i32], last_hidden: i32) {
        let positions = &positions[..scores.len()];
        for i in 0..scores.len() {
            scores[i] = if positions[i] <= last_hidden { f32::NEG_INFINITY } else { scores[i] };
        }
    }
}

/// Makes short stretches of unseen keys between seen ones a part of what is computed and hidden.
fn fill_gaps(sights: &mut [Sight]) {
    let mut seen = None;
    for key in 0..sights.len() {
        if sights[key] == Sight::Nothing {
            continue;
        }
        if let Some(before) = seen
            && key - before <= GAP
        {
            sights[before + 1..key].fill(Sight::Part);
        }
        seen = Some(key);
    }
}

fn tiles(sights: &[Sight], widest: usize) -> Vec<Tile> {
    let mut tiles: Vec<Tile> = Vec::new();
    let mut key = 0;
    for stretch in sights.chunk_by(|a, b| a == b) {
        let (mut first, end) = (key, key + stretch.len());
        key = end;
        while stretch[0] != Sight::Nothing && first < end {
            if tiles.last().is_none_or(|tile| tile.width == widest) {
                tiles.push(Tile::default());
            }
            let tile = tiles.last_mut().expect("one was pushed where there was none");
            let run = Run { column: tile.width, key: first, len: (end - first).min(widest - tile.width) };
            push(&mut tile.runs, run);
            if stretch[0] == Sight::Part {
                tile.partial.push(run);
            }
            tile.width += run.len;
            first += run.len;
        }
    }
    tiles
}

/// Appends `run` to the last run where it continues it.
fn push(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last) if last.key + last.len == run.key => last.len += run.len,
        _ => runs.push(run),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(column: usize, key: usize, len: usize) -> Run {
        Run { column, key, len }
    }

    /// Two branches of 60 tokens behind a trunk of 20.
    fn fork() -> Vec<usize> {
        let trunk = (0..20).flat_map(|i| [140, i]);
        let branches = [80, 140].into_iter().flat_map(|end| (20..80).flat_map(move |position| [end, position]));
        trunk.chain(branches).collect()
    }

    #[test]
    fn a_block_meets_its_ancestors_and_itself() {
        let blocks = Spans::new(&fork(), 140, 140, None).blocks(32, 512);
        // Queries 96..128 lie in the second branch: the trunk is seen by all, the branch up to the block too.
        let tiles = &blocks[3].tiles;
        assert_eq!(tiles.len(), 1);
        assert_eq!(tiles[0].runs, [run(0, 0, 20), run(20, 80, 48)]);
        assert_eq!(tiles[0].partial, [run(37, 97, 31)]);
        assert_eq!(tiles[0].width, 68);
    }

    #[test]
    fn a_block_over_a_border_hides_one_branch_from_the_other() {
        let blocks = Spans::new(&fork(), 140, 140, None).blocks(32, 512);
        // Queries 64..96 lie in both branches.
        assert_eq!(blocks[2].tiles[0].runs, [run(0, 0, 96)]);
        assert_eq!(blocks[2].tiles[0].partial, [run(20, 20, 76)]);
    }

    #[test]
    fn a_window_drops_what_lies_further_back_on_the_path() {
        let blocks = Spans::new(&fork(), 140, 140, Some(24)).blocks(8, 512);
        // Queries 80..88 begin the second branch at position 20; the trunk's last positions are in their window.
        assert_eq!(blocks[10].tiles[0].runs, [run(0, 0, 20), run(20, 80, 8)]);
        assert_eq!(blocks[10].tiles[0].partial, [run(0, 0, 4), run(21, 81, 7)]);
        // Queries 104..112 at positions 44..52 see back to position 21.
        assert_eq!(blocks[13].tiles[0].runs, [run(0, 81, 31)]);
    }

    #[test]
    fn tiles_have_a_greatest_width() {
        let spans: Vec<usize> = (0..100).flat_map(|i| [100, i]).collect();
        let blocks = Spans::new(&spans, 100, 10, None).blocks(10, 40);
        let widths: Vec<usize> = blocks[0].tiles.iter().map(|tile| tile.width).collect();
        assert_eq!(widths, [40, 40, 20]);
        assert_eq!(blocks[0].tiles[2].runs, [run(0, 80, 20)]);
        assert_eq!(blocks[0].tiles[2].partial, [run(11, 91, 9)]);
    }

    #[test]
    fn short_gaps_are_multiplied_along() {
        let mut sights = [Sight::All; 30];
        sights[3..3 + GAP - 1].fill(Sight::Nothing);
        sights[15..15 + GAP].fill(Sight::Nothing);
        fill_gaps(&mut sights);
        let tiles = tiles(&sights, 512);
        assert_eq!(tiles[0].runs, [run(0, 0, 15), run(15, 15 + GAP, 15 - GAP)]);
        assert_eq!(tiles[0].partial, [run(3, 3, GAP - 1)]);
    }
}
