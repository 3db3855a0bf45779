//! Rows of tokens as forests, by the definition: who a token's parent is.

/// For each column in preorder the column of its parent.
#[derive(Clone, Debug)]
pub struct Forest(pub Vec<Option<usize>>);

impl Forest {
    /// One document of `len` tokens.
    pub fn chain(len: usize) -> Self {
        Self::from_steps(&vec![0; len])
    }

    /// Documents of these lengths beside one another.
    pub fn documents(lengths: &[usize]) -> Self {
        let parents = lengths.iter().scan(0, |first, &len| {
            let begin = *first;
            *first += len;
            Some((begin..begin + len).map(move |column| column.checked_sub(1).filter(|&parent| parent >= begin)))
        });
        Self(parents.flatten().collect())
    }

    /// Every token continues the one before it or, `steps[i]` tokens further up the path, an ancestor of that; beyond
    /// the root a new tree begins.
    pub fn from_steps(steps: &[usize]) -> Self {
        let mut parents = Vec::new();
        for (column, &steps) in steps.iter().enumerate() {
            let before = column.checked_sub(1);
            let parent = (0..steps).fold(before, |token, _| token.and_then(|token: usize| parents[token]));
            parents.push(parent);
        }
        Self(parents)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The token and its ancestors, from itself to the root.
    pub fn path(&self, column: usize) -> impl Iterator<Item = usize> {
        std::iter::successors(Some(column), |&column| self.0[column])
    }

    /// The columns that a token sees, in order: its path, or the last `window` tokens of it.
    pub fn seen(&self, column: usize, window: Option<usize>) -> Vec<usize> {
        let mut seen: Vec<usize> = self.path(column).take(window.unwrap_or(usize::MAX)).collect();
        seen.reverse();
        seen
    }

    /// (end, position) of every column, as the operation takes them.
    pub fn spans(&self) -> Vec<i64> {
        let mut ends: Vec<i64> = (1..=self.len() as i64).collect();
        for column in (0..self.len()).rev() {
            if let Some(parent) = self.0[column] {
                ends[parent] = ends[parent].max(ends[column]);
            }
        }
        let position = |column| self.path(column).count() as i64 - 1;
        ends.iter().enumerate().flat_map(|(column, &end)| [end, position(column)]).collect()
    }
}
