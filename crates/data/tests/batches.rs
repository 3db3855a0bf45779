//! Properties of the batches of an epoch, over any documents and layouts.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use emberlora_data::{Batch, DataError, Dataset, Document, Layout, PrefixSharing, RowRef};
use proptest::prelude::*;

const PAD: u32 = 0;

/// Documents whose tokens are all different, so that a token tells where it came from.
fn documents(marks: Vec<Vec<bool>>) -> Vec<Document> {
    let file: Arc<Path> = Arc::from(Path::new("rows.jsonl"));
    let mut next = 1;
    marks
        .into_iter()
        .enumerate()
        .map(|(index, trained)| {
            let ids = (next..).take(trained.len()).collect();
            next += trained.len() as u32;
            Document::new(ids, trained, RowRef::new(file.clone(), index + 1), None)
        })
        .collect()
}

fn any_documents() -> impl Strategy<Value = Vec<Document>> {
    prop::collection::vec(prop::collection::vec(any::<bool>(), 1..=24), 1..40).prop_map(|mut marks| {
        // At least one token is trained, so that the data set is not refused.
        marks.push(vec![false, true]);
        documents(marks)
    })
}

fn any_layout() -> impl Strategy<Value = Layout> {
    let share_prefix = prop::sample::select(vec![PrefixSharing::On, PrefixSharing::OffByRecipe]);
    (1usize..6, 24usize..64, any::<bool>(), share_prefix, any::<bool>()).prop_map(
        |(batch_size, max_seq_len, packing, share_prefix, shuffle)| Layout {
            batch_size,
            max_seq_len,
            packing,
            share_prefix,
            shuffle,
        },
    )
}

fn lines(batches: &[Batch]) -> Vec<usize> {
    batches.iter().flat_map(|batch| &batch.documents).map(|row| row.line).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn every_trained_token_is_predicted_once_by_the_token_before_it(
        documents in any_documents(), layout in any_layout(), seed in any::<u64>(),
    ) {
        let mut expected = HashMap::new();
        for document in &documents {
            for index in 1..document.ids.len() {
                if document.trained[index] {
                    expected.insert(document.ids[index], document.ids[index - 1]);
                }
            }
        }
        let dataset = Dataset::from_documents(documents, layout, PAD).unwrap();
        for batch in dataset.batches(seed, 3) {
            for target in &batch.targets {
                let predecessor = batch.ids[target.position as usize];
                prop_assert_eq!(expected.remove(&target.token), Some(predecessor));
            }
        }
        prop_assert!(expected.is_empty(), "never predicted: {:?}", expected);
    }

    #[test]
    fn attention_and_positions_begin_anew_with_each_document(
        documents in any_documents(), layout in any_layout(), seed in any::<u64>(),
    ) {
        let of: HashMap<u32, &Document> =
            documents.iter().flat_map(|document| document.ids.iter().map(move |&id| (id, document))).collect();
        let dataset = Dataset::from_documents(documents.clone(), layout, PAD).unwrap();
        for batch in dataset.batches(seed, 0) {
            prop_assert_eq!(batch.ids.len(), batch.rows * batch.seq);
            prop_assert_eq!(batch.positions.len(), batch.ids.len());
            prop_assert_eq!(batch.ends.len(), batch.ids.len());
            prop_assert!(batch.rows <= layout.batch_size && batch.seq <= layout.max_seq_len);
            for (flat, &id) in batch.ids.iter().enumerate() {
                let (column, end) = (flat % batch.seq, batch.ends[flat] as usize);
                if id == PAD {
                    prop_assert_eq!(end, column + 1);
                } else {
                    let position = batch.positions[flat] as usize;
                    prop_assert_eq!(of[&id].ids[position], id);
                    prop_assert_eq!(end, column - position + of[&id].ids.len());
                }
            }
        }
    }

    #[test]
    fn a_batch_is_as_wide_as_its_longest_row(
        documents in any_documents(), layout in any_layout(), seed in any::<u64>(),
    ) {
        let total: usize = documents.iter().map(|d| d.ids.len()).sum();
        let dataset = Dataset::from_documents(documents, layout, PAD).unwrap();
        let mut tokens = 0;
        for batch in dataset.batches(seed, 0) {
            let widest = batch.ids.chunks(batch.seq).map(|row| row.iter().filter(|&&id| id != PAD).count()).max();
            prop_assert_eq!(widest, Some(batch.seq));
            prop_assert_eq!(batch.ids.iter().filter(|&&id| id != PAD).count(), batch.computed);
            prop_assert_eq!(batch.computed, batch.tokens);
            tokens += batch.tokens;
        }
        prop_assert_eq!(tokens, total);
    }

    #[test]
    fn the_order_depends_on_seed_and_epoch_alone(
        documents in any_documents(), layout in any_layout(), seed in any::<u64>(),
    ) {
        let dataset = Dataset::from_documents(documents.clone(), layout, PAD).unwrap();
        let fresh: Vec<Batch> = dataset.batches(seed, 5).collect();
        let again = Dataset::from_documents(documents, layout, PAD).unwrap();
        for epoch in 0..5 {
            again.batches(seed, epoch).for_each(drop);
        }
        prop_assert_eq!(&fresh, &again.batches(seed, 5).collect::<Vec<_>>());
    }

    #[test]
    fn every_epoch_holds_every_document_once(
        documents in any_documents(), layout in any_layout(), seed in any::<u64>(), epoch in 0u64..100,
    ) {
        let count = documents.len();
        let dataset = Dataset::from_documents(documents, layout, PAD).unwrap();
        let batches: Vec<Batch> = dataset.batches(seed, epoch).collect();
        let mut seen = lines(&batches);
        seen.sort_unstable();
        prop_assert_eq!(seen, (1..=count).collect::<Vec<_>>());
        prop_assert_eq!(batches.len(), dataset.batches(seed, 0).len());
    }

    #[test]
    fn batches_can_be_asked_for_in_any_order(
        documents in any_documents(), layout in any_layout(), seed in any::<u64>(), skipped in 0usize..50,
    ) {
        let dataset = Dataset::from_documents(documents, layout, PAD).unwrap();
        let all: Vec<Batch> = dataset.batches(seed, 1).collect();
        let batches = dataset.batches(seed, 1);
        prop_assert_eq!(batches.get(skipped), all.get(skipped).cloned());
        let rest: Vec<Batch> = dataset.batches(seed, 1).skip(skipped).collect();
        prop_assert_eq!(&rest[..], all.get(skipped..).unwrap_or_default());
        prop_assert_eq!(batches.len(), all.len());
    }
}

fn uniform(count: usize, length: usize) -> Vec<Document> {
    documents(vec![vec![true; length]; count])
}

fn layout(batch_size: usize, max_seq_len: usize, packing: bool, shuffle: bool) -> Layout {
    Layout { batch_size, max_seq_len, packing, share_prefix: PrefixSharing::OffByRecipe, shuffle }
}

#[test]
fn a_packed_row_is_laid_out_as_expected() {
    let documents = documents(vec![vec![false, true, true], vec![true, true], vec![false, false, true, true]]);
    let dataset = Dataset::from_documents(documents, layout(2, 6, true, false), PAD).unwrap();
    let batch = dataset.batches(0, 0).next().unwrap();
    // 4 and 2 tokens share a row; the rows stand in the order of their first documents.
    assert_eq!((batch.rows, batch.seq, batch.tokens), (2, 6, 9));
    assert_eq!(batch.ids, [1, 2, 3, 0, 0, 0, 4, 5, 6, 7, 8, 9]);
    assert_eq!(batch.positions, [0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 2, 3]);
    assert_eq!(batch.ends, [3, 3, 3, 4, 5, 6, 2, 2, 6, 6, 6, 6]);
    let targets: Vec<(u32, u32, u32)> = batch.targets.iter().map(|t| (t.position, t.token, t.weight)).collect();
    assert_eq!(targets, [(0, 2, 1), (1, 3, 1), (6, 5, 1), (9, 8, 1), (10, 9, 1)]);
    assert_eq!(lines(&[batch]), [1, 2, 3]);
}

#[test]
fn without_shuffle_and_packing_rows_keep_the_order_of_the_file() {
    let dataset = Dataset::from_documents(uniform(7, 3), layout(3, 8, false, false), PAD).unwrap();
    let batches: Vec<Batch> = dataset.batches(1, 4).collect();
    assert_eq!(lines(&batches), [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(batches.iter().map(|batch| batch.rows).collect::<Vec<_>>(), [3, 3, 1]);
}

#[test]
fn shuffled_epochs_differ_by_seed_and_epoch() {
    for packing in [false, true] {
        let dataset = Dataset::from_documents(uniform(40, 3), layout(4, 6, packing, true), PAD).unwrap();
        let order = |seed, epoch| lines(&dataset.batches(seed, epoch).collect::<Vec<_>>());
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
    }
}

#[test]
fn the_last_partial_accumulation_is_a_step() {
    let dataset = Dataset::from_documents(uniform(7, 3), layout(1, 8, false, true), PAD).unwrap();
    assert_eq!(dataset.batches(0, 0).len(), 7);
    assert_eq!(dataset.steps_in_epoch(0, 0, 1), 7);
    assert_eq!(dataset.steps_in_epoch(0, 0, 3), 3);
    assert_eq!(dataset.total_steps(0, 2.0, 3), 6);
    assert_eq!(dataset.total_steps(0, 1.5, 3), 5);
    assert_eq!(dataset.total_steps(0, 0.1, 3), 1);
}

#[test]
fn a_run_too_long_to_count_has_the_most_steps_there_are() {
    let dataset = Dataset::from_documents(uniform(7, 3), layout(1, 8, false, true), PAD).unwrap();
    assert_eq!(dataset.total_steps(0, 1e300, 1), usize::MAX);
    assert_eq!(dataset.total_steps(0, f64::INFINITY, 1), usize::MAX);
    assert_eq!(dataset.total_steps(0, f64::NAN, 1), 0);
    let packed = Layout { share_prefix: PrefixSharing::On, ..layout(1, 8, true, true) };
    let dataset = Dataset::from_documents(uniform(7, 3), packed, PAD).unwrap();
    assert_eq!(dataset.total_steps(0, 2.5, 1), 4 + 4 + 2);
    assert_eq!(dataset.total_steps(0, f64::INFINITY, 1), usize::MAX);
}

#[test]
fn packing_saves_padding() {
    let marks = (0..60).map(|index| vec![true; 2 + index * 7 % 30]).collect();
    let dataset = Dataset::from_documents(documents(marks), layout(4, 64, true, true), PAD).unwrap();
    let padding = dataset.report.padding;
    assert!(padding.packed < 0.05 && padding.unpacked > 0.25, "{padding:?}");
}

#[test]
fn documents_that_do_not_fit_are_refused_by_name() {
    let refused = |documents, layout| Dataset::from_documents(documents, layout, PAD).unwrap_err();
    let error = refused(uniform(2, 9), layout(1, 8, true, true)).to_string();
    assert!(error.contains("rows.jsonl:1") && error.contains("9 tokens"), "{error}");
    let mut uneven = uniform(2, 3);
    uneven[1].trained.pop();
    assert!(refused(uneven, layout(1, 8, true, true)).to_string().contains("rows.jsonl:2"));
    let untrained = documents(vec![vec![true, false, false]]);
    assert!(matches!(refused(untrained, layout(1, 8, true, true)), DataError::NothingTrained { .. }));
    assert!(matches!(refused(uniform(1, 2), layout(0, 8, true, true)), DataError::Size { .. }));
}
