//! Copies of the model that share the micro-batches of a step. All live on the CPU here, which is what tells them from
//! devices of their own.

mod common;

use common::{batch, document, factors, lora, model, options, rows};
use emberlora_data::Batch;
use emberlora_lora::{LoraOptions, attach, detach};
use emberlora_train::{Replica, TrainState};

/// Copies with other adapters than the model's, which they must not keep.
fn copies(count: usize, dropout: f64) -> Vec<Replica> {
    let copy = |seed| {
        let mut copy = model(dropout);
        detach(&mut copy);
        attach(&mut copy, &LoraOptions { seed, ..lora(dropout) }, &common::device()).unwrap();
        Replica::new(copy, format!("copy {seed}"))
    };
    (100..100 + count as u64).map(copy).collect()
}

/// Losses, norms and the adapters after a few steps of `groups` on the model and `further` copies.
fn trained(groups: &[Vec<Batch>], further: usize, dropout: f64) -> (Vec<[f64; 2]>, Vec<Vec<f32>>) {
    let steps = groups.len();
    let state = TrainState::new(model(dropout), options(steps).optimizer, options(steps).schedule(steps), Some(1.0), 3)
        .unwrap();
    let mut state = state.spread("main".to_owned(), copies(further, dropout)).unwrap();
    let losses = groups.iter().map(|group| {
        let outcome = state.step(group).unwrap().unwrap();
        [outcome.loss, outcome.grad_norm]
    });
    (losses.collect(), factors(state.model()))
}

fn assert_same(groups: &[Vec<Batch>], further: usize, dropout: f64) {
    let (expected, adapters) = trained(groups, 0, dropout);
    let (found, spread) = trained(groups, further, dropout);
    for (expected, found) in expected.iter().flatten().zip(found.iter().flatten()) {
        assert!((expected - found).abs() <= 1e-5, "{expected} on one device, {found} on {}", further + 1);
    }
    for (expected, found) in adapters.iter().flatten().zip(spread.iter().flatten()) {
        assert!((expected - found).abs() <= 1e-4, "{expected} on one device, {found} on {}", further + 1);
    }
}

/// Steps of `micro_batches` rows each, of different lengths.
fn groups(steps: usize, micro_batches: usize) -> Vec<Vec<Batch>> {
    let row = |line: usize| batch(line, 8 + line % 7, 3 + line % 2);
    (0..steps).map(|step| (0..micro_batches).map(|place| row(step * micro_batches + place)).collect()).collect()
}

#[test]
fn two_and_three_devices_train_as_one_does() {
    for further in [1, 2] {
        assert_same(&groups(5, 4), further, 0.0);
    }
}

#[test]
fn dropout_masks_do_not_depend_on_the_number_of_devices() {
    assert_same(&groups(3, 5), 2, 0.3);
}

#[test]
fn a_device_without_a_micro_batch_waits() {
    assert_same(&groups(3, 1), 2, 0.0);
}

#[test]
fn a_device_whose_micro_batches_train_nothing_adds_nothing() {
    let untrained = || batch(2, 9, 9);
    assert_same(&[vec![batch(1, 12, 4), untrained(), untrained(), untrained()]], 1, 0.0);
    assert_same(&[vec![untrained(), untrained(), untrained(), batch(1, 12, 4)]], 1, 0.0);
}

#[test]
fn a_step_without_a_trained_token_is_skipped_on_all_devices() {
    let state = TrainState::new(model(0.0), options(1).optimizer, options(1).schedule(1), None, 3).unwrap();
    let mut state = state.spread("main".to_owned(), copies(1, 0.0)).unwrap();
    assert!(state.step(&[batch(2, 9, 9), batch(3, 9, 9)]).unwrap().is_none());
    assert_eq!(state.steps(), 1);
}

#[test]
fn a_row_that_one_device_cannot_read_is_an_error_that_names_it() {
    let state = TrainState::new(model(0.0), options(1).optimizer, options(1).schedule(1), None, 3).unwrap();
    let mut state = state.spread("main".to_owned(), copies(1, 0.0)).unwrap();
    let mut batches = rows(0..2);
    batches[1] = Batch::new(&[vec![&document(8, 12, 4)]], 0);
    batches[1].ids[3] = common::VOCABULARY;
    let error = state.step(&batches).unwrap_err().to_string();
    assert!(error.contains("rows.jsonl:8") && error.contains("96"), "{error}");
}
