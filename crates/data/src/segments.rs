//! The forests of a batch, taken apart again.

use std::ops::Range;

use crate::Batch;

/// A stretch of tokens that the same documents go through: it ends where they part or where one of them ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Flat indices of its tokens.
    pub tokens: Range<usize>,
    /// How many segments its documents go through before it.
    pub level: usize,
    /// The documents that go through it, as indices into [`Batch::documents`].
    pub documents: Range<usize>,
    /// Those of its documents that end with it.
    pub complete: Range<usize>,
}

impl Batch {
    /// The segments of all rows, in the order of their tokens. Padding is in none.
    pub fn segments(&self) -> Vec<Segment> {
        let mut segments = Vec::new();
        // In depth-first order the last tokens of documents ascend.
        let documents_before = |token: usize| self.last_tokens.partition_point(|&last| (last as usize) < token);
        for row in (0..self.rows).map(|row| row * self.seq) {
            let documents = documents_before(row)..documents_before(row + self.seq);
            let filled = self.last_tokens[documents].last().map_or(row, |&last| last as usize + 1);
            // Where the segments before this one in its documents, and what follows them, end.
            let mut above: Vec<usize> = Vec::new();
            let mut begin = row;
            while begin < filled {
                while above.pop_if(|end| *end <= begin).is_some() {}
                let end = row + self.ends[begin] as usize;
                let documents = documents_before(begin)..documents_before(end);
                let first_to_end = self.last_tokens[documents.start] as usize;
                // Where documents part, the next token has fewer after it.
                let last = (begin..first_to_end).find(|&token| self.ends[token + 1] != self.ends[token]);
                let last = last.unwrap_or(first_to_end);
                let complete = documents.start..documents_before(last + 1);
                segments.push(Segment { tokens: begin..last + 1, level: above.len(), documents, complete });
                above.push(end);
                begin = last + 1;
            }
        }
        segments
    }

    /// For each token, how many documents it is a label of.
    pub fn label_weights(&self) -> Vec<u32> {
        let mut weights = vec![0; self.ids.len()];
        for target in &self.targets {
            let position = target.position as usize;
            let row = position - position % self.seq;
            let end = row + self.ends[position] as usize;
            // The tokens that follow this one directly, each after all that follows the one before.
            let mut next = std::iter::successors(Some(position + 1), |&token| Some(row + self.ends[token] as usize));
            if let Some(label) =
                next.by_ref().take_while(|&token| token < end).find(|&token| self.ids[token] == target.token)
            {
                weights[label] += target.weight;
            }
        }
        weights
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{Document, RowRef};

    #[test]
    fn a_row_comes_apart_where_documents_part_and_end() {
        let document = |line, ids: &[u32], trained: &[bool]| {
            Document::new(ids.to_vec(), trained.to_vec(), RowRef::new(Path::new("a").into(), line), None)
        };
        let documents = [
            document(1, &[1, 2, 3, 4], &[false, true, false, true]),
            document(2, &[1, 2, 3, 5, 6], &[false, true, true, true, true]),
            document(3, &[1, 2], &[false, false]),
            document(4, &[7, 8], &[false, true]),
            document(5, &[7, 8], &[false, true]),
            document(6, &[9], &[false]),
        ];
        let batch = Batch::shared(&[documents.iter().collect(), vec![&documents[3]]], 0);
        assert_eq!(batch.ids, [1, 2, 3, 4, 5, 6, 7, 8, 9, 7, 8, 0, 0, 0, 0, 0, 0, 0]);
        let found = batch.segments();
        let shown: Vec<_> = found
            .iter()
            .map(|part| (part.tokens.clone(), part.level, part.documents.clone(), part.complete.clone()))
            .collect();
        assert_eq!(
            shown,
            [
                (0..2, 0, 0..3, 0..1),
                (2..3, 1, 1..3, 1..1),
                (3..4, 2, 1..2, 1..2),
                (4..6, 2, 2..3, 2..3),
                (6..8, 0, 3..5, 3..5),
                (8..9, 0, 5..6, 5..6),
                (9..11, 0, 6..7, 6..7),
            ]
        );
        assert_eq!(batch.label_weights(), [0, 2, 1, 1, 1, 1, 0, 2, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(batch.label_weights().iter().sum::<u32>() as usize, batch.trained_tokens());
    }

    #[test]
    fn documents_apart_are_a_segment_each() {
        let document = Document::new(vec![1, 2], vec![true; 2], RowRef::new(Path::new("a").into(), 1), None);
        let batch = Batch::new(&[vec![&document, &document], vec![]], 0);
        let tokens: Vec<_> = batch.segments().into_iter().map(|part| (part.tokens, part.complete)).collect();
        assert_eq!(tokens, [(0..2, 0..1), (2..4, 1..2)]);
    }
}
