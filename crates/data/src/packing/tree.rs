//! The tree of the prefixes that documents have in common.

use rayon::prelude::*;

use crate::Document;

/// A node of a [`PrefixTree`].
pub(crate) type Node = u32;

/// The compressed trie of all documents: a node for every document's end and for every place where two documents part,
/// so at most twice as many nodes as documents.
///
/// Built in O(tokens + n log n) comparisons of documents; depends on nothing but the documents and their order.
#[derive(Clone, Debug)]
pub(crate) struct PrefixTree {
    parents: Vec<Node>,
    /// Tokens from the root.
    depths: Vec<u32>,
    /// Whether documents go on from here.
    inner: Vec<bool>,
    /// Where each document ends.
    ends: Vec<Node>,
    /// The place of each document in the order of their tokens, in which the documents below any node are neighbours.
    ranks: Vec<u32>,
}

impl PrefixTree {
    /// The prefix of no tokens.
    pub(crate) const ROOT: Node = 0;

    pub(crate) fn new(documents: &[Document]) -> Self {
        let mut order: Vec<usize> = (0..documents.len()).collect();
        order.par_sort_unstable_by(|&a, &b| documents[a].ids.cmp(&documents[b].ids).then(a.cmp(&b)));

        let mut tree = PrefixTree {
            parents: vec![0],
            depths: vec![0],
            inner: vec![false],
            ends: vec![0; documents.len()],
            ranks: vec![0; documents.len()],
        };
        // The nodes from the root to the end of the document before.
        let mut path = vec![Self::ROOT];
        let mut before: &[u32] = &[];
        for (rank, &document) in order.iter().enumerate() {
            let ids = &documents[document].ids;
            let shared = common_prefix(before, ids) as u32;
            let mut left = None;
            while let Some(node) = path.pop_if(|&mut node| tree.depths[node as usize] > shared) {
                left = Some(node);
            }
            let mut top = path.last().copied().unwrap_or(Self::ROOT);
            if let Some(left) = left
                && tree.depths[top as usize] < shared
            {
                top = tree.add(top, shared);
                tree.parents[left as usize] = top;
                tree.inner[top as usize] = true;
                path.push(top);
            }
            if (shared as usize) < ids.len() {
                top = tree.add(top, ids.len() as u32);
                path.push(top);
            }
            tree.ends[document] = top;
            tree.ranks[document] = rank as u32;
            before = ids;
        }
        tree
    }

    fn add(&mut self, parent: Node, depth: u32) -> Node {
        let node = self.parents.len() as Node;
        self.parents.push(parent);
        self.depths.push(depth);
        self.inner.push(false);
        self.inner[parent as usize] = true;
        node
    }

    /// Tokens from the root to a node.
    pub(crate) fn depth(&self, node: Node) -> usize {
        self.depths[node as usize] as usize
    }

    /// Whether documents go on from a node.
    pub(crate) fn is_inner(&self, node: Node) -> bool {
        self.inner[node as usize]
    }

    /// Where documents are neighbours if they have much in common.
    pub(crate) fn rank(&self, document: usize) -> u32 {
        self.ranks[document]
    }

    /// The nodes from the end of a document up to the root, both included.
    pub(crate) fn path(&self, document: usize) -> impl Iterator<Item = Node> {
        std::iter::successors(Some(self.ends[document]), |&node| {
            (node != Self::ROOT).then(|| self.parents[node as usize])
        })
    }
}

/// How many tokens `a` and `b` begin with alike.
pub(crate) fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::RowRef;

    pub(crate) fn documents(ids: Vec<Vec<u32>>) -> Vec<Document> {
        let file: Arc<Path> = Arc::from(Path::new("rows.jsonl"));
        let document = |(line, ids): (usize, Vec<u32>)| {
            Document::new(ids.clone(), vec![true; ids.len()], RowRef::new(file.clone(), line + 1), None)
        };
        ids.into_iter().enumerate().map(document).collect()
    }

    #[test]
    fn documents_part_where_their_tokens_do() {
        let documents = documents(vec![vec![1, 2, 3], vec![7], vec![1, 2, 4, 5], vec![1, 2], vec![1, 2, 3]]);
        let tree = PrefixTree::new(&documents);
        let depths = |document| tree.path(document).map(|node| tree.depth(node)).collect::<Vec<_>>();
        assert_eq!(depths(0), [3, 2, 0]);
        assert_eq!(depths(1), [1, 0]);
        assert_eq!(depths(2), [4, 2, 0]);
        assert_eq!(depths(3), [2, 0]);
        assert_eq!(tree.path(0).collect::<Vec<_>>(), tree.path(4).collect::<Vec<_>>());
        assert_eq!(tree.parents.len(), 5);
        assert_eq!([3, 0, 4, 2, 1].map(|document| tree.rank(document)), [0, 1, 2, 3, 4]);
    }

    proptest! {
        #[test]
        fn the_deepest_common_node_is_the_common_prefix(
            ids in prop::collection::vec(prop::collection::vec(0u32..3, 1..9), 1..20),
        ) {
            let documents = documents(ids);
            let tree = PrefixTree::new(&documents);
            prop_assert!(tree.parents.len() <= 2 * documents.len());
            for a in 0..documents.len() {
                for b in 0..documents.len() {
                    let of_b: Vec<Node> = tree.path(b).collect();
                    let common = tree.path(a).find(|node| of_b.contains(node)).unwrap();
                    prop_assert_eq!(tree.depth(common), common_prefix(&documents[a].ids, &documents[b].ids));
                }
                let end = tree.path(a).next().unwrap();
                let longer = documents.iter().any(|b| b.ids.len() > documents[a].ids.len() && b.ids.starts_with(&documents[a].ids));
                prop_assert_eq!(tree.is_inner(end), longer);
            }
        }
    }
}
