//! Documents that begin alike share what they begin with, and nothing else changes.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use emberlora_data::{Batch, Dataset, Document, Layout, PrefixSharing, RowRef};
use proptest::prelude::*;

const PAD: u32 = 0;

fn document(line: usize, ids: Vec<u32>, trained: Vec<bool>) -> Document {
    let file: Arc<Path> = Arc::from(Path::new("rows.jsonl"));
    Document::new(ids, trained, RowRef::new(file, line), None)
}

fn all_trained(ids: Vec<Vec<u32>>) -> Vec<Document> {
    ids.into_iter().enumerate().map(|(index, ids)| document(index + 1, ids.clone(), vec![true; ids.len()])).collect()
}

fn layout(max_seq_len: usize, share_prefix: PrefixSharing) -> Layout {
    Layout { batch_size: 4, max_seq_len, packing: true, share_prefix, shuffle: true }
}

/// Documents of few different tokens that continue one of a few stems, or end within it.
fn any_documents() -> impl Strategy<Value = Vec<Document>> {
    let tokens = |most| prop::collection::vec(1u32..4, 0..=most);
    let tail = (any::<prop::sample::Index>(), 0usize..=16, tokens(8), prop::collection::vec(any::<bool>(), 24));
    (prop::collection::vec(tokens(16), 1..4), prop::collection::vec(tail, 1..40)).prop_map(|(stems, tails)| {
        let one =
            |(index, (stem, kept, tail, mut trained)): (usize, (prop::sample::Index, usize, Vec<u32>, Vec<bool>))| {
                let stem = &stems[stem.index(stems.len())];
                let mut ids = [&stem[..kept.min(stem.len())], &tail].concat();
                if ids.is_empty() {
                    ids.push(9);
                }
                trained.truncate(ids.len());
                document(index + 1, ids, trained)
            };
        let mut documents: Vec<Document> = tails.into_iter().enumerate().map(one).collect();
        // At least one token is trained, so that the data set is not refused.
        documents.push(document(documents.len() + 1, vec![7, 8], vec![false, true]));
        documents
    })
}

/// The columns of the row of `flat` that it may attend to, itself last.
fn ancestors(batch: &Batch, flat: usize) -> Vec<usize> {
    let begin = flat - flat % batch.seq;
    (begin..=flat).filter(|&other| flat - begin < batch.ends[other] as usize).collect()
}

/// How often each label is predicted from each context.
type Labels = BTreeMap<(Vec<u32>, u32), u32>;

fn labels(batches: &[Batch]) -> Labels {
    let mut labels = Labels::new();
    for batch in batches {
        for target in &batch.targets {
            let context = ancestors(batch, target.position as usize).into_iter().map(|token| batch.ids[token]);
            *labels.entry((context.collect(), target.token)).or_default() += target.weight;
        }
    }
    labels
}

fn batches(documents: &[Document], layout: Layout, seed: u64) -> Vec<Batch> {
    Dataset::from_documents(documents.to_vec(), layout, PAD).unwrap().batches(seed, 2).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn what_a_token_attends_to_is_its_document(
        documents in any_documents(), max_seq_len in 24usize..80, seed in any::<u64>(),
    ) {
        let mut lines = Vec::new();
        for batch in batches(&documents, layout(max_seq_len, PrefixSharing::On), seed) {
            let mut used = HashSet::new();
            for (source, &last) in batch.documents.iter().zip(&batch.last_tokens) {
                let document = &documents[source.line - 1];
                let tokens = ancestors(&batch, last as usize);
                let ids: Vec<u32> = tokens.iter().map(|&token| batch.ids[token]).collect();
                prop_assert_eq!(&ids, &document.ids);
                for (position, &token) in tokens.iter().enumerate() {
                    prop_assert_eq!(batch.positions[token] as usize, position);
                    prop_assert_eq!(&ancestors(&batch, token)[..], &tokens[..=position]);
                }
                used.extend(tokens);
                lines.push(source.line);
            }
            prop_assert_eq!(used.len(), batch.computed);
            for padding in (0..batch.ids.len()).filter(|token| !used.contains(token)) {
                prop_assert_eq!(batch.ids[padding], PAD);
                prop_assert_eq!(ancestors(&batch, padding), vec![padding]);
            }
        }
        lines.sort_unstable();
        prop_assert_eq!(lines, (1..=documents.len()).collect::<Vec<_>>());
    }

    #[test]
    fn labels_and_their_contexts_are_those_of_documents_apart(
        documents in any_documents(), max_seq_len in 24usize..80, seed in any::<u64>(),
    ) {
        let shared = batches(&documents, layout(max_seq_len, PrefixSharing::On), seed);
        let apart = batches(&documents, layout(max_seq_len, PrefixSharing::OffByRecipe), seed);
        prop_assert_eq!(labels(&shared), labels(&apart));
        for batch in shared.iter().chain(&apart) {
            let places: Vec<_> = batch.targets.iter().map(|target| (target.position, target.token)).collect();
            prop_assert!(places.is_sorted_by(|a, b| a < b), "sorted and without repetition: {places:?}");
        }
    }

    #[test]
    fn a_row_computes_each_prefix_once_and_keeps_its_capacity(
        documents in any_documents(), max_seq_len in 24usize..80, seed in any::<u64>(),
    ) {
        for batch in batches(&documents, layout(max_seq_len, PrefixSharing::On), seed) {
            prop_assert!(batch.seq <= max_seq_len && batch.computed <= batch.tokens);
            let mut prefixes = HashSet::new();
            for &last in &batch.last_tokens {
                for token in ancestors(&batch, last as usize) {
                    let ids: Vec<u32> = ancestors(&batch, token).into_iter().map(|token| batch.ids[token]).collect();
                    prefixes.insert((token / batch.seq, ids));
                }
            }
            prop_assert_eq!(prefixes.len(), batch.computed);
        }
    }

    #[test]
    fn the_report_counts_what_the_batches_hold(documents in any_documents(), max_seq_len in 24usize..80) {
        for sharing in [PrefixSharing::On, PrefixSharing::OffByRecipe] {
            let dataset = Dataset::from_documents(documents.clone(), layout(max_seq_len, sharing), PAD).unwrap();
            let report = &dataset.report;
            let batches: Vec<Batch> = dataset.batches(0, 0).collect();
            let sum = |count: fn(&Batch) -> usize| batches.iter().map(count).sum::<usize>();
            prop_assert_eq!(report.first_epoch.given, sum(|batch| batch.tokens));
            prop_assert_eq!(report.first_epoch.computed, sum(|batch| batch.computed));
            prop_assert_eq!(report.first_epoch.trained, sum(Batch::trained_tokens));
            prop_assert_eq!(dataset.batches(0, 0).tokens(), report.first_epoch);
            let padding = 1.0 - sum(|batch| batch.computed) as f64 / sum(|batch| batch.ids.len()) as f64;
            prop_assert!((report.padding.packed - padding).abs() < 1e-12);
            prop_assert_eq!(report.share_prefix, sharing);
        }
    }

    #[test]
    fn the_order_depends_on_seed_and_epoch_alone(documents in any_documents(), seed in any::<u64>()) {
        let dataset = || Dataset::from_documents(documents.clone(), layout(48, PrefixSharing::On), PAD).unwrap();
        let again = dataset();
        again.batches(seed, 0).for_each(drop);
        let fresh: Vec<Batch> = dataset().batches(seed, 5).collect();
        prop_assert_eq!(fresh, again.batches(seed, 5).collect::<Vec<_>>());
    }
}

#[test]
fn a_row_is_laid_out_as_a_forest() {
    let documents = [
        document(1, vec![1, 2, 5], vec![false, false, true]),
        document(2, vec![1, 2, 3, 4], vec![false, true, true, true]),
        document(3, vec![6, 7], vec![false, true]),
        // A prefix of another document, and one that is there already; only one of them trains its last token.
        document(4, vec![1, 2], vec![false, true]),
        document(5, vec![1, 2, 3, 4], vec![false, false, true, true]),
    ];
    let batch = Batch::shared(&[documents.iter().collect(), vec![&documents[0]]], PAD);
    assert_eq!((batch.rows, batch.seq, batch.tokens, batch.computed), (2, 7, 18, 10));
    assert_eq!(batch.ids, [1, 2, 3, 4, 5, 6, 7, 1, 2, 5, 0, 0, 0, 0]);
    assert_eq!(batch.positions, [0, 1, 2, 3, 2, 0, 1, 0, 1, 2, 0, 1, 2, 3]);
    assert_eq!(batch.ends, [5, 5, 4, 4, 5, 7, 7, 3, 3, 3, 4, 5, 6, 7]);
    let targets: Vec<[u32; 3]> = batch.targets.iter().map(|t| [t.position, t.token, t.weight]).collect();
    assert_eq!(targets, [[0, 2, 2], [1, 3, 2], [1, 5, 1], [2, 4, 2], [5, 7, 1], [8, 5, 1]]);
    assert_eq!(batch.trained_tokens(), 9);
    assert_eq!(batch.documents.iter().map(|row| row.line).collect::<Vec<_>>(), [4, 2, 5, 1, 3, 1]);
    assert_eq!(batch.last_tokens, [1, 3, 3, 4, 6, 9]);
}

#[test]
fn without_packing_nothing_is_shared() {
    let documents = all_trained(vec![vec![1, 2, 3]; 4]);
    let layout = Layout { packing: false, ..layout(8, PrefixSharing::On) };
    let dataset = Dataset::from_documents(documents, layout, PAD).unwrap();
    assert_eq!(dataset.report.share_prefix, PrefixSharing::PackingOff);
    assert_eq!((dataset.report.first_epoch.given, dataset.report.first_epoch.computed), (12, 12));
    assert_eq!(dataset.batches(0, 0).next().unwrap().rows, 4);
}

#[test]
fn completions_of_a_prompt_share_its_row() {
    // A prompt of 30 tokens with a short and a long completion each, in an order that keeps the two apart.
    let prompt = |number: u32| (0..30).map(move |index| 1000 * number + index);
    let completion =
        |number: u32, length: u32| (0..length).map(move |index| 500 + 1000 * number + length * 100 + index);
    let long = (1..=40).map(|number| prompt(number).chain(completion(number, 20 + number)).collect());
    let short = (1..=40).map(|number| prompt(number).chain(completion(number, 1 + number % 4)).collect());
    let documents = all_trained(long.chain(short).collect());
    for seed in 0..5 {
        let mut rows = BTreeMap::new();
        for (index, batch) in batches(&documents, layout(256, PrefixSharing::On), seed).iter().enumerate() {
            for (source, &last) in batch.documents.iter().zip(&batch.last_tokens) {
                rows.insert(source.line, (index, last as usize / batch.seq));
            }
        }
        assert!((1..=40).all(|line| rows[&line] == rows[&(line + 40)]), "{rows:?}");
    }
}

#[test]
fn more_completions_than_a_row_holds_cost_the_prompt_once_for_each_row() {
    let prompt: Vec<u32> = (1..=100).collect();
    let documents = (0..40).map(|answer| [&prompt[..], &[200 + answer; 50]].concat()).collect();
    let dataset = Dataset::from_documents(all_trained(documents), layout(400, PrefixSharing::On), PAD).unwrap();
    // Six answers of 50 tokens fit beside the prompt.
    assert_eq!(dataset.report.first_epoch.computed, 7 * 100 + 40 * 50);
}

#[test]
fn a_system_prompt_is_computed_once_for_each_row() {
    let system: Vec<u32> = (1..=24).collect();
    let rows = (0..200u32).map(|row| [&system[..], &vec![100 + row; 20 + row as usize * 7 % 31]].concat()).collect();
    let dataset = Dataset::from_documents(all_trained(rows), layout(512, PrefixSharing::On), PAD).unwrap();
    let rows: usize = dataset.batches(0, 0).map(|batch| batch.rows).sum();
    let tokens = dataset.report.first_epoch;
    assert_eq!(tokens.computed, tokens.given - 24 * (200 - rows));
    let own = tokens.given - 24 * 200;
    assert_eq!(rows, own.div_ceil(512 - 24));
    assert!(dataset.report.to_string().contains("shared prefixes save"), "{}", dataset.report);
}
