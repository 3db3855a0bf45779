//! One optimizer step: what it computes, and where.

mod common;

use burn::backend::Flex;
use common::{batch, factors, model, options, rows};
use emberlora_data::Batch;
use emberlora_lora::Projections;
use emberlora_model::CausalLm;
use emberlora_train::{AdamW, StepOutcome, TrainError, TrainOptions, TrainState};

#[test]
fn a_micro_batch_without_a_trained_token_changes_nothing() {
    let with = |batches: &[Batch]| {
        let schedule = options(1).schedule(1);
        let mut state = TrainState::new(model(0.0), options(1).optimizer, schedule, None, 1).unwrap();
        let outcome = state.step(batches).unwrap().unwrap();
        (outcome.loss, outcome.grad_norm, factors(state.model()))
    };
    assert_eq!(with(&[batch(1, 12, 4), batch(2, 9, 9)]), with(&[batch(1, 12, 4)]));
}

#[test]
fn a_look_at_the_gradient_changes_no_dropout_mask() {
    let losses = |looks: usize| {
        let schedule = options(3).schedule(3);
        let mut state = TrainState::new(model(0.2), options(3).optimizer, schedule, None, 3).unwrap();
        let step = |_| {
            for _ in 0..looks {
                state.gradients(&rows(0..2)).unwrap();
            }
            state.step(&rows(0..2)).unwrap().unwrap().loss
        };
        (0..3).map(step).collect::<Vec<f64>>()
    };
    assert_eq!(losses(0), losses(2));
}

#[test]
fn micro_batches_of_a_step_and_steps_have_masks_of_their_own() {
    let mut state = TrainState::new(model(0.5), options(3).optimizer, options(3).schedule(3), None, 3).unwrap();
    // B starts at zero, where no mask can be seen.
    state.step(&rows(0..1)).unwrap();
    let losses = |state: &TrainState| -> Vec<f32> {
        let same = [batch(1, 12, 4), batch(1, 12, 4)];
        state.gradients(&same).unwrap().unwrap().losses.into_data().try_to_vec().unwrap()
    };
    let first = losses(&state);
    // A step that trains nothing moves on and leaves the parameters, so the masks alone tell the losses apart.
    assert!(state.step(&[batch(2, 9, 9)]).unwrap().is_none());
    let second = losses(&state);
    let mut all = [first, second].concat();
    all.sort_by(f32::total_cmp);
    all.dedup();
    assert_eq!(all.len(), 4, "{all:?}");
}

#[test]
fn clipping_bounds_the_update_and_logs_the_norm_before_it() {
    let step = |max_grad_norm| {
        let optimizer = AdamW { betas: [0.0, 0.0], eps: 1.0, weight_decay: 0.0 };
        let mut state = TrainState::new(model(0.0), optimizer, options(1).schedule(1), max_grad_norm, 1).unwrap();
        let outcome = state.step(&rows(0..1)).unwrap().unwrap();
        let (before, after) = (factors(&model(0.0)), factors(state.model()));
        let moved = before.iter().flatten().zip(after.iter().flatten()).map(|(a, b)| f64::from((a - b).abs()));
        (outcome.grad_norm, moved.fold(0.0, f64::max))
    };
    let (norm, moved) = step(None);
    let (same_norm, less) = step(Some(norm / 1e3));
    assert_eq!(norm, same_norm);
    assert!(less < moved / 100.0, "{less} {moved}");
}

#[test]
fn a_model_without_adapters_cannot_be_trained() {
    let mut bare = model(0.0);
    emberlora_lora::detach(&mut bare);
    let error = TrainState::new(bare, options(1).optimizer, options(1).schedule(1), None, 1).map(|_| ()).unwrap_err();
    assert!(matches!(error, TrainError::NothingToTrain), "{error}");
}

#[test]
fn a_token_outside_the_vocabulary_is_an_error_that_names_the_row() {
    let mut wrong = batch(8, 12, 4);
    wrong.ids[3] = common::VOCABULARY;
    let mut state = TrainState::new(model(0.0), options(1).optimizer, options(1).schedule(1), None, 1).unwrap();
    let error = state.step(&[wrong]).unwrap_err().to_string();
    assert!(error.contains("rows.jsonl:8") && error.contains("96"), "{error}");
}

#[test]
fn steps_that_are_read_together_wait_for_the_device_once() {
    let start = || TrainState::new(model(0.2), options(9).optimizer, options(9).schedule(9), Some(0.1), 3).unwrap();
    let (mut together, mut apart) = (start(), start());
    let mut outcomes = Vec::new();
    for _ in 0..5 {
        assert!(together.enqueue(&rows(0..2)).unwrap());
    }
    assert_eq!(together.reads(), 0);
    together.read_into(&mut outcomes).unwrap();
    together.read_into(&mut outcomes).unwrap();
    assert_eq!(together.reads(), 1);
    let expected: Vec<_> = (0..5).map(|_| apart.step(&rows(0..2)).unwrap().unwrap()).collect();
    assert_eq!(apart.reads(), 5);
    assert_eq!(outcomes.len(), 5);
    for (found, expected) in outcomes.into_iter().zip(expected) {
        assert_eq!(StepOutcome { seconds: 0.0, ..found }, StepOutcome { seconds: 0.0, ..expected });
    }
    assert_eq!(factors(together.model()), factors(apart.model()));
}

/// Where the numbers of every A and B lie.
fn places(model: &CausalLm) -> Vec<*const u8> {
    let mut places = Vec::new();
    model.projections(&mut |_, linear| {
        for factor in linear.adapter.iter().flat_map(|adapter| [&adapter.a, &adapter.b]) {
            let tensor = factor.val().inner().try_into_primitive::<Flex>().unwrap();
            places.push(tensor.bytes().as_ptr());
        }
    });
    places
}

#[test]
fn adapters_are_updated_where_they_lie() {
    let mut state = TrainState::new(model(0.0), options(9).optimizer, options(9).schedule(9), Some(0.1), 3).unwrap();
    let (before, started) = (places(state.model()), factors(state.model()));
    for _ in 0..3 {
        state.step(&rows(0..2)).unwrap();
    }
    assert_eq!(places(state.model()), before);
    assert_ne!(factors(state.model()), started);
}

#[test]
fn the_last_update_can_be_undone() {
    for learning_rate in [1e-3, 1e-1, 10.0] {
        let options = TrainOptions { learning_rate, ..options(9) };
        let optimizer = AdamW { weight_decay: 0.1, ..options.optimizer };
        let mut state = TrainState::new(model(0.0), optimizer, options.schedule(9), None, 3).unwrap();
        state.step(&rows(0..1)).unwrap();
        let before = factors(state.model());
        state.step(&rows(1..2)).unwrap();
        assert!(state.step(&[batch(2, 9, 9)]).unwrap().is_none(), "nothing trained");
        state.restore_last_good();
        assert_eq!(state.steps(), 1);
        for (expected, found) in before.iter().flatten().zip(factors(state.model()).iter().flatten()) {
            let error = (expected - found).abs() / expected.abs().max(1.0);
            assert!(error <= 2e-7, "{expected} {found} with {learning_rate}");
        }
        let restored = factors(state.model());
        state.restore_last_good();
        assert_eq!(factors(state.model()), restored, "there is only one way back");
    }
}
