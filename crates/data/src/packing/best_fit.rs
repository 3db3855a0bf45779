//! Best-fit decreasing bin packing of documents into rows.

use std::cmp::Reverse;
use std::collections::BTreeMap;

/// Distributes items over bins of `capacity` and returns, for each bin, the indices into `lengths` it holds.
///
/// Items are placed from the longest to the shortest, each into the fullest bin it still fits in; ties keep the order
/// of `lengths`. The result uses at most 11/9·OPT + 6/9 bins (Dósa 2007), takes O(n log n) and depends on nothing but
/// its arguments: how full the bins are depends only on the multiset of lengths. An item longer than `capacity` gets
/// a bin for itself.
pub fn best_fit_decreasing(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&item| Reverse(lengths[item]));

    let mut bins: Vec<Vec<usize>> = Vec::new();
    // Bins by how much space they have left, full ones too: an item of length 0 fits into them. Bins with equal space
    // are interchangeable: the last one is taken.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for item in order {
        let length = lengths[item];
        let fitting =
            open.range_mut(length..).next().and_then(|(&space, bins)| Some((space, bins.pop()?, bins.is_empty())));
        let (bin, left) = match fitting {
            Some((space, bin, emptied)) => {
                if emptied {
                    open.remove(&space);
                }
                (bin, space - length)
            }
            None => {
                bins.push(Vec::new());
                (bins.len() - 1, capacity.saturating_sub(length))
            }
        };
        bins[bin].push(item);
        open.entry(left).or_default().push(bin);
    }
    bins
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_item_goes_into_the_fullest_bin_that_holds_it() {
        let bins = best_fit_decreasing(&[3, 7, 6, 2, 1, 4], 10);
        assert_eq!(bins, vec![vec![1, 0], vec![2, 5], vec![3, 4]]);
    }

    #[test]
    fn an_item_without_length_fits_into_a_full_bin() {
        assert_eq!(best_fit_decreasing(&[0, 10, 0], 10), vec![vec![1, 0, 2]]);
    }

    #[test]
    fn no_items_need_no_bins() {
        assert!(best_fit_decreasing(&[], 10).is_empty());
    }

    proptest! {
        #[test]
        fn every_item_lands_in_exactly_one_bin_and_no_bin_overflows(
            lengths in prop::collection::vec(1usize..=64, 0..200),
        ) {
            let bins = best_fit_decreasing(&lengths, 64);
            let mut seen: Vec<usize> = bins.concat();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            for bin in &bins {
                prop_assert!(bin.iter().map(|&i| lengths[i]).sum::<usize>() <= 64);
            }
        }

        #[test]
        fn no_two_bins_could_be_joined(lengths in prop::collection::vec(1usize..=64, 0..200)) {
            let mut fill: Vec<usize> = best_fit_decreasing(&lengths, 64)
                .iter()
                .map(|bin| bin.iter().map(|&i| lengths[i]).sum())
                .collect();
            fill.sort_unstable();
            if let [least, next, ..] = fill[..] {
                prop_assert!(least + next > 64);
            }
        }

        #[test]
        fn how_full_the_bins_are_depends_only_on_the_multiset_of_lengths(
            lengths in prop::collection::vec(1usize..=64, 0..100),
        ) {
            let fills = |lengths: &[usize]| -> Vec<usize> {
                let mut fills: Vec<usize> = best_fit_decreasing(lengths, 64)
                    .iter()
                    .map(|bin| bin.iter().map(|&i| lengths[i]).sum())
                    .collect();
                fills.sort_unstable();
                fills
            };
            let reversed: Vec<usize> = lengths.iter().rev().copied().collect();
            prop_assert_eq!(fills(&lengths), fills(&reversed));
        }
    }
}
