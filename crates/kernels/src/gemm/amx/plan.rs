//! What is packed at one time, and what a task multiplies.

use std::ops::Range;

use super::kernel::SIDE;
use super::{Pieces, ROWS, STEP};
use crate::gemm::buffer::Tile;
use crate::gemm::pack::MAX_COLUMNS;
use crate::gemm::{Job, Term, ranges};

/// Right tiles that exist at one time: 8 MiB, so that all cores find them in the cache that they share.
const SHEETS_TILES: usize = (8 << 20) / size_of::<Tile>();

/// Bytes of right tiles of a strip, and of left ones of a task: about what a second-level cache of 2 MiB holds, since of the
/// left ones few rows are in use at a time.
const RIGHT_BYTES: usize = 1 << 20;
const LEFT_BYTES: usize = 1400 << 10;

/// Elements of the inner dimension that are multiplied before C is touched again.
const DEPTH: usize = 1024;

/// A block of one term's inner dimension.
pub(super) struct Stretch<'a> {
    pub term: &'a Term<'a>,
    pub inner: Range<usize>,
    pub steps: usize,
    pub pieces: Pieces,
    /// Where its right tiles `[columns / 16][steps][pieces]` begin.
    pub first: usize,
}

/// Columns of a job whose right tiles exist at one time.
pub(super) struct Sheet<'a> {
    pub job: &'a Job<'a>,
    /// Counted from the job's first.
    pub columns: Range<usize>,
    /// Stretches whose products are added up before C is touched; at least one round, perhaps without any.
    pub rounds: Vec<Vec<Stretch<'a>>>,
}

/// Sheets whose right tiles exist at one time.
#[derive(Default)]
pub(super) struct Group<'a> {
    pub sheets: Vec<Sheet<'a>>,
    /// How many right tiles they have.
    pub tiles: usize,
}

/// The columns of all jobs, in groups that are packed and multiplied one after the other.
pub(super) fn groups<'a>(jobs: &'a [Job<'a>]) -> Vec<Group<'a>> {
    let mut groups: Vec<Group> = Vec::new();
    for job in jobs {
        let of_a_panel = rounds(job, 1, 0).1;
        let most = (SHEETS_TILES / of_a_panel.max(1) * ROWS).clamp(MAX_COLUMNS, job.columns.max(MAX_COLUMNS));
        for columns in ranges(job.columns, most) {
            let panels = columns.len().div_ceil(ROWS);
            if groups.last().is_none_or(|group| group.tiles + panels * of_a_panel > SHEETS_TILES) {
                groups.push(Group::default());
            }
            let group = groups.last_mut().expect("one was pushed");
            let (rounds, tiles) = rounds(job, panels, group.tiles);
            group.tiles = tiles;
            group.sheets.push(Sheet { job, columns, rounds });
        }
    }
    groups
}

/// The rounds of a job over `panels` panels of 16 columns, whose right tiles begin at `first`, and where they end.
fn rounds<'a>(job: &'a Job<'a>, panels: usize, mut first: usize) -> (Vec<Vec<Stretch<'a>>>, usize) {
    let (mut rounds, mut depth) = (vec![Vec::new()], 0);
    for term in &job.terms {
        for inner in term.left.unit().blocks(term.left.inner()) {
            if depth > 0 && depth + inner.len() > DEPTH {
                rounds.push(Vec::new());
                depth = 0;
            }
            depth += inner.len();
            let (steps, pieces) = (inner.len().div_ceil(STEP), Pieces::of(&term.right));
            rounds.last_mut().expect("there is one").push(Stretch { term, inner, steps, pieces, first });
            first += panels * steps * pieces.right();
        }
    }
    (rounds, first)
}

/// Columns of a sheet whose right tiles of a round stay in the second-level cache.
pub(super) struct Strip<'a, 'b> {
    pub sheet: &'b Sheet<'a>,
    /// Counted from the job's first.
    pub columns: Range<usize>,
}

pub(super) fn strips<'a, 'b>(sheets: &'b [Sheet<'a>]) -> Vec<Strip<'a, 'b>> {
    let strips_of = |sheet: &'b Sheet<'a>| {
        let tiles =
            |round: &Vec<Stretch>| round.iter().map(|stretch| stretch.steps * stretch.pieces.right()).sum::<usize>();
        let bytes_of_a_column = sheet.rounds.iter().map(tiles).max().unwrap_or(0) * size_of::<Tile>() / ROWS;
        let most = (RIGHT_BYTES / bytes_of_a_column.max(1)).clamp(2 * SIDE, MAX_COLUMNS);
        let columns = sheet.columns.len();
        let width = columns.div_ceil(columns.div_ceil(most)).next_multiple_of(SIDE).min(MAX_COLUMNS);
        let first = sheet.columns.start;
        ranges(columns, width).map(move |part| Strip { sheet, columns: first + part.start..first + part.end })
    };
    sheets.iter().filter(|sheet| !sheet.columns.is_empty()).flat_map(strips_of).collect()
}

/// Rows and strips that a task multiplies: it packs its rows for itself, so rows are cut rather than strips as long as each
/// core has enough of them for the right tiles to be worth fetching.
pub(super) fn tasks<'a, 'b, 's>(
    strips: &'s [Strip<'a, 'b>],
    rows: usize,
    threads: usize,
) -> Vec<(Range<usize>, &'s [Strip<'a, 'b>])> {
    const ENOUGH_ROWS: usize = 96;
    let rounds = strips.iter().flat_map(|strip| &strip.sheet.rounds);
    let tiles = |round: &Vec<Stretch>| round.iter().map(|stretch| stretch.steps * stretch.pieces.left()).sum::<usize>();
    let bytes_of_a_row = rounds.map(tiles).max().unwrap_or(0) * size_of::<Tile>() / ROWS;
    let most = (LEFT_BYTES / bytes_of_a_row.max(1) / SIDE * SIDE).max(SIDE);
    let fewest = rows.div_ceil(most);
    let (blocks, parts) = match fewest < threads && rows < threads * ENOUGH_ROWS {
        true => (fewest, threads.div_ceil(fewest).min(strips.len()).max(1)),
        false => (fewest.next_multiple_of(threads), 1),
    };
    let blocks = blocks.max(threads.div_ceil(parts));
    let height = rows.div_ceil(blocks).next_multiple_of(SIDE);
    let parts = strips.chunks(strips.len().div_ceil(parts).max(1));
    parts.flat_map(|strips| ranges(rows, height).map(move |rows| (rows, strips))).collect()
}
