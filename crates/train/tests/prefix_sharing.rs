//! Documents that share the tokens they begin with train as documents apart.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{device, factors, lora, tiny_model};
use emberlora_data::{Batch, Document, RowRef};
use emberlora_lora::{Projections, attach};
use emberlora_model::{AttentionKind, CausalLm, FloatDtype, LoadOptions};
use emberlora_train::{AdamW, TrainState, evaluate};
use proptest::prelude::*;

/// Full attention, sliding windows shorter than the documents in all blocks and in some, and fused projections.
const FAMILIES: [&str; 4] = ["llama", "mistral", "qwen2_window", "phi3_partial"];

fn state(family: &str) -> TrainState {
    let options = LoadOptions::new(None, FloatDtype::F32, AttentionKind::Fused);
    let dir = tiny_model().with_file_name(family);
    let (mut model, _) = CausalLm::load(&dir, &options, &device()).unwrap();
    attach(&mut model, &lora(0.0), &device()).unwrap();
    // Without memory and with a large epsilon, steps are about as different as gradients are.
    let optimizer = AdamW { betas: [0.0, 0.0], eps: 1.0, weight_decay: 0.0 };
    TrainState::new(model, optimizer, common::options(9).schedule(9), None, 1).unwrap()
}

/// Documents of few different tokens that continue one of two stems, or end within it.
fn any_documents() -> impl Strategy<Value = Vec<Document>> {
    let tokens = |most| prop::collection::vec(1u32..5, 1..=most);
    let tail = (any::<bool>(), 0usize..=12, tokens(10), prop::collection::vec(any::<bool>(), 22));
    ([tokens(12), tokens(12)], prop::collection::vec(tail, 2..8)).prop_map(|(stems, tails)| {
        let file: Arc<Path> = Arc::from(Path::new("rows.jsonl"));
        let one = |(index, (second, kept, tail, mut trained)): (usize, (bool, usize, Vec<u32>, Vec<bool>))| {
            let stem = &stems[usize::from(second)];
            let ids = [&stem[..kept.min(stem.len())], &tail].concat();
            trained.truncate(ids.len());
            Document::new(ids, trained, RowRef::new(file.clone(), index + 1), None)
        };
        let mut documents: Vec<Document> = tails.into_iter().enumerate().map(one).collect();
        // One that is there twice, and at least one label.
        documents[0].ids.push(7);
        documents[0].trained.push(true);
        documents.insert(1, documents[0].clone());
        documents
    })
}

/// All documents in two rows, with shared prefixes and without.
fn batches(documents: &[Document]) -> [Batch; 2] {
    let rows: Vec<Vec<&Document>> =
        documents.chunks(documents.len().div_ceil(2)).map(|row| row.iter().collect()).collect();
    [Batch::shared(&rows, 0), Batch::new(&rows, 0)]
}

/// The loss, then the gradient of every A and B.
fn loss_and_gradients(state: &TrainState, batch: &Batch) -> Vec<Vec<f32>> {
    let step = state.gradients(std::slice::from_ref(batch)).unwrap().unwrap();
    let mut all = vec![step.losses.into_data().try_to_vec().unwrap()];
    state.model().projections(&mut |_, linear| {
        for factor in linear.adapter.iter().flat_map(|adapter| [&adapter.a, &adapter.b]) {
            all.push(step.grads.get::<2>(factor.id).unwrap().into_data().try_to_vec().unwrap());
        }
    });
    all
}

#[track_caller]
fn assert_near(what: &str, shared: &[Vec<f32>], apart: &[Vec<f32>]) {
    for (shared, apart) in shared.iter().zip(apart) {
        let largest = apart.iter().fold(1e-3f32, |largest, value| largest.max(value.abs()));
        for (a, b) in shared.iter().zip(apart) {
            assert!((a - b).abs() <= 2e-5 * largest, "{what}: {a} {b} where {largest} is the largest");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn loss_gradients_and_adapters_are_those_of_documents_apart(
        documents in any_documents(), family in prop::sample::select(FAMILIES.to_vec()),
    ) {
        let [shared, apart] = batches(&documents);
        prop_assert!(shared.computed < apart.computed);
        let [mut one, mut other] = [state(family), state(family)];
        // The first step moves B away from zero, so that A has a gradient from the second on.
        for _ in 0..3 {
            one.step(std::slice::from_ref(&shared)).unwrap();
            other.step(std::slice::from_ref(&apart)).unwrap();
        }
        assert_near("adapters", &factors(one.model()), &factors(other.model()));
        assert_near("gradients", &loss_and_gradients(&one, &shared), &loss_and_gradients(&one, &apart));
        let [a, b] = [&shared, &apart].map(|batch| evaluate(one.model(), [batch]).unwrap());
        prop_assert_eq!(a.tokens, b.tokens);
        prop_assert!((a.loss - b.loss).abs() < 1e-5 * b.loss, "{} {}", a.loss, b.loss);
    }
}
