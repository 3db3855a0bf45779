//! Documents that share prefixes to rows, from the longest prefixes to the shortest.

use super::best_fit_shared::{Bundle, pack_bundles};
use super::tree::{PrefixTree, common_prefix};
use crate::Document;

/// A prefix keeps documents together where it is at least one in so many of the tokens that each of them adds to it.
///
/// Apart, documents cost the prefix once for every row they come to lie in; together they are one large item, for which a
/// row with enough space is harder to find, and a row of documents that resemble each other. The first word of a question
/// is not worth that, a prompt with several answers is.
const WORTH: usize = 8;

/// Distributes documents over rows whose trees have at most `capacity` tokens, and returns, for each row, the indices
/// into `members` it holds. A longer document gets a row for itself.
///
/// One walk over the prefixes of the documents, from the longest to the shortest. Where a prefix is worth it (see
/// [`WORTH`]), the documents that begin with it are packed among themselves, so that it is in as few rows as possible, and
/// what then lies in a row stays together. The empty prefix comes last.
///
/// For n documents and rows of c tokens this takes about O(n·log n·log c): [`pack_bundles`] takes O(n·log n), and no
/// document is packed more often than log c times. What begins with a prefix either fits into one row and is one item
/// from then on, or fills most of its rows by half and more. The next shorter prefix that is worth packing them again then
/// leaves at least a sixteenth more of a row than this one.
///
/// A document that is in `members` more than once is in as many rows: an epoch that trains it twice is meant to see it
/// at two different times.
pub(crate) fn pack_shared(
    documents: &[Document],
    tree: &PrefixTree,
    members: &[usize],
    capacity: usize,
) -> Vec<Vec<usize>> {
    let rows = repetitions(documents.len(), members).into_iter().flat_map(|mut places| {
        places.sort_unstable_by_key(|&place| tree.rank(members[place]));
        Walk { documents, tree, members, capacity, open: vec![Open::default()], bundles: Vec::new() }.pack(&places)
    });
    rows.map(|row| row.places).collect()
}

/// Indices into `members`, in order: first those of the first occurrence of each document, then of the second, …
fn repetitions(documents: usize, members: &[usize]) -> Vec<Vec<usize>> {
    let mut seen = vec![0; documents];
    let mut repetitions: Vec<Vec<usize>> = Vec::new();
    for (place, &document) in members.iter().enumerate() {
        if seen[document] == repetitions.len() {
            repetitions.push(Vec::new());
        }
        repetitions[seen[document]].push(place);
        seen[document] += 1;
    }
    repetitions
}

/// A prefix that the walk is in.
#[derive(Default)]
struct Open {
    /// Its tokens.
    depth: usize,
    /// The bundles that begin with it begin here.
    first: usize,
    /// Tokens after it in the tree of its documents.
    below: usize,
}

struct Walk<'a> {
    documents: &'a [Document],
    tree: &'a PrefixTree,
    members: &'a [usize],
    capacity: usize,
    /// From the empty prefix to the longest.
    open: Vec<Open>,
    bundles: Vec<Bundle>,
}

impl Walk<'_> {
    /// Takes the documents in the order of their tokens.
    fn pack(mut self, places: &[usize]) -> Vec<Bundle> {
        let mut before: &[u32] = &[];
        for &place in places {
            let ids = &self.documents[self.members[place]].ids;
            self.leave(common_prefix(before, ids));
            if self.open.last().is_none_or(|top| top.depth < ids.len()) {
                self.open.push(Open { depth: ids.len(), first: self.bundles.len(), below: 0 });
            }
            self.bundles.push(Bundle { places: vec![place], size: ids.len(), shared: ids.len() });
            before = ids;
        }
        self.leave(0);
        pack_bundles(self.bundles, 0, self.tree, self.members, self.capacity)
    }

    /// Leaves every prefix that is longer than `depth`.
    fn leave(&mut self, depth: usize) {
        while let Some(left) = self.open.pop_if(|top| top.depth > depth) {
            let above = self.open.last().map_or(0, |top| top.depth).max(depth);
            let edge = left.depth - above;
            self.join(&left, edge);
            let below = left.below + edge;
            match self.open.last_mut() {
                Some(top) if top.depth == above => top.below += below,
                _ => self.open.push(Open { depth: above, first: left.first, below }),
            }
        }
    }

    /// Packs what begins with `prefix`, of which `edge` tokens are shared with no other documents.
    fn join(&mut self, prefix: &Open, edge: usize) {
        let Open { depth: shared, first, below } = *prefix;
        let count = self.bundles.len() - first;
        if count < 2 || (edge * count).saturating_mul(WORTH) < below {
            return;
        }
        let parts: Vec<Bundle> = self.bundles.drain(first..).collect();
        if shared + below <= self.capacity {
            let places = parts.into_iter().flat_map(|part| part.places).collect();
            self.bundles.push(Bundle { places, size: shared + below, shared });
        } else {
            self.bundles.extend(pack_bundles(parts, shared, self.tree, self.members, self.capacity));
        }
    }
}
