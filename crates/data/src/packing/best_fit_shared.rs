//! Best-fit decreasing on what documents add to the tree of a row.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};

use super::tree::{Node, PrefixTree};

/// Rows that are looked at for a prefix before the next shorter one has its turn.
const LOOKS: usize = 16;

/// Documents that lie in one row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Bundle {
    /// Indices into the members of the epoch.
    pub places: Vec<usize>,
    /// Tokens of their tree. More than that, by what documents have in common beyond `shared`, only where bundles were
    /// packed that have as much in common.
    pub size: usize,
    /// Tokens that all of them begin with, at least.
    pub shared: usize,
}

/// Packs bundles, all of which begin with the same `base` tokens, into as few bundles of at most `capacity` tokens as it
/// can. `members` are the documents of the epoch.
///
/// Bundles are placed from the largest to the smallest, each into the row whose tree holds the longest prefix of it and
/// has space for the rest, and among these into the fullest; ties keep the order of the members.
///
/// Every prefix knows the rows that hold it by how much space they had when it was last asked. Placing a document asks
/// the prefixes on its path, each about at most [`LOOKS`] rows whose space has changed since, and adds the row to those
/// that it did not hold yet: O(p·log n) for p prefixes, whatever the number of rows.
pub(super) fn pack_bundles(
    mut bundles: Vec<Bundle>,
    base: usize,
    tree: &PrefixTree,
    members: &[usize],
    capacity: usize,
) -> Vec<Bundle> {
    bundles.sort_by_key(|bundle| (Reverse(bundle.size), bundle.places.iter().min().copied()));
    let mut packer = Packer { tree, members, base, capacity, rows: Vec::new(), holders: HashMap::new() };
    for bundle in bundles {
        packer.place(bundle);
    }
    packer.rows
}

struct Packer<'a> {
    tree: &'a PrefixTree,
    members: &'a [usize],
    base: usize,
    capacity: usize,
    rows: Vec<Bundle>,
    /// For each prefix that other documents go on from, the rows that hold it, by the space they had when last looked at:
    /// at least what they have now.
    holders: HashMap<Node, BTreeSet<(usize, usize)>>,
}

impl Packer<'_> {
    fn place(&mut self, bundle: Bundle) {
        let (tree, members, base) = (self.tree, self.members, self.base);
        let Some(&first) = bundle.places.first() else { return };
        let prefixes = tree.path(members[first]).map(|node| (node, tree.depth(node)));
        let mut held_by_all = prefixes.filter(|&(_, depth)| (base..=bundle.shared).contains(&depth));
        let found = held_by_all.find_map(|(node, depth)| Some((self.fullest(node, bundle.size - depth)?, depth)));

        let held = found.map(|(_, depth)| depth);
        let row = found.map_or(self.rows.len(), |(row, _)| row);
        let size = self.rows.get(row).map_or(0, |row| row.size) + bundle.size - held.unwrap_or(0);
        let space = self.capacity.saturating_sub(size);
        for &place in &bundle.places {
            // A new row holds nothing yet, not even what all bundles begin with.
            let new = |depth| held.map_or(depth >= base, |held| depth > held);
            let prefixes = tree.path(members[place]).take_while(|&node| new(tree.depth(node)));
            for node in prefixes.filter(|&node| tree.is_inner(node)) {
                self.holders.entry(node).or_default().insert((space, row));
            }
        }
        match self.rows.get_mut(row) {
            Some(row) => {
                row.places.extend(bundle.places);
                row.size = size;
                row.shared = base;
            }
            None => self.rows.push(bundle),
        }
    }

    /// The fullest row that holds the prefix of `node` and has space for `added` more tokens.
    fn fullest(&mut self, node: Node, added: usize) -> Option<usize> {
        let holders = self.holders.get_mut(&node)?;
        let looks = if self.tree.depth(node) == self.base { usize::MAX } else { LOOKS };
        for _ in 0..looks {
            let &(noted, row) = holders.range((added, 0)..).next()?;
            let space = self.capacity.saturating_sub(self.rows[row].size);
            if space != noted {
                holders.remove(&(noted, row));
                holders.insert((space, row));
            }
            if space >= added {
                return Some(row);
            }
        }
        None
    }
}
