//! What a trainer asks of the model: the loss of labelled positions and gradients for the adapters.

mod common;

use std::num::NonZeroUsize;
use std::path::Path;

use burn::tensor::{Device, Tensor};
use common::directory::deeper;
use common::*;
use emberlora_lora::{LoraOptions, Pass, Projections, Targets, attach, peft};
use emberlora_model::{CausalLm, Checkpointing, Input, InputError};

fn device() -> Device {
    Device::flex().autodiff()
}

/// A fixture with the adapter that its default training case begins with; its B is not zero.
fn adapted(family: &str) -> CausalLm {
    adapted_on(family, &device())
}

/// The same with the adapter on a device that may ask for gradient checkpointing.
fn adapted_on(family: &str, device: &Device) -> CausalLm {
    with_adapter(load(family), &fixture(family).join("train/default/adapter_init"), device)
}

fn with_adapter(mut model: CausalLm, adapter: &Path, device: &Device) -> CausalLm {
    peft::apply(&mut model, &peft::load(adapter).unwrap(), device).unwrap();
    model
}

struct Labels {
    positions: Vec<u32>,
    tokens: Vec<u32>,
    weights: Vec<f32>,
}

/// Every second token of the golden input is to be predicted, with weights that differ.
fn labels(ids: &[u32]) -> Labels {
    let positions: Vec<u32> = (0..(ROWS * SEQ) as u32).filter(|p| p % 2 == 0 && (p + 1) % SEQ as u32 != 0).collect();
    let tokens = positions.iter().map(|&p| ids[p as usize + 1]).collect();
    let weights = positions.iter().map(|&p| 0.01 + p as f32 * 1e-3).collect();
    Labels { positions, tokens, weights }
}

fn input(model: &CausalLm, ids: &[u32]) -> Input {
    Input::unpacked(ROWS, SEQ, ids, &model.device()).unwrap()
}

/// The loss, and the gradients of all A and B in the order of the projections.
fn loss_and_gradients(model: &CausalLm, pass: &Pass) -> (f32, Vec<f32>) {
    let (ids, _) = golden("llama");
    let Labels { positions, tokens, weights } = labels(&ids);
    let hidden = model.hidden(&input(model, &ids), pass);
    let loss = model.loss(hidden, &positions, &tokens, &weights, pass).unwrap();
    let all = gradients(model, &loss);
    (loss.into_scalar(), all)
}

/// The gradients of all A and B in the order of the projections.
fn gradients(model: &CausalLm, loss: &Tensor<1>) -> Vec<f32> {
    let gradients = loss.backward();
    let mut all = Vec::new();
    model.projections(&mut |name, linear| {
        if let Some(adapter) = &linear.adapter {
            for param in [&adapter.a, &adapter.b] {
                let gradient = param.val().grad(&gradients).unwrap_or_else(|| panic!("{name} has no gradient"));
                all.extend(floats(gradient));
            }
        }
    });
    all
}

#[test]
fn the_loss_is_the_weighted_cross_entropy_of_the_labelled_positions() {
    let model = load("llama");
    let (ids, logits) = golden("llama");
    let Labels { positions, tokens, weights } = labels(&ids);
    let mut want = 0.0;
    for ((&position, &token), &weight) in positions.iter().zip(&tokens).zip(&weights) {
        let scores = &logits[position as usize * VOCAB..][..VOCAB];
        let sum: f64 = scores.iter().map(|&score| f64::from(score).exp()).sum();
        want += f64::from(weight) * (sum.ln() - f64::from(scores[token as usize]));
    }
    let hidden = model.hidden(&input(&model, &ids), &Pass::eval());
    let got: f32 = model.loss(hidden, &positions, &tokens, &weights, &Pass::eval()).unwrap().into_scalar();
    assert!((f64::from(got) - want).abs() < 1e-4, "{got} is not {want}");
}

#[test]
fn checkpoints_change_neither_loss_nor_gradients() {
    let every = |n| Checkpointing::Every(NonZeroUsize::new(n).unwrap());
    for family in ["llama", "olmo2", "phi3"] {
        // Deep enough for checkpoints of several blocks, in front of those that are kept.
        let dir = deeper(family, 7);
        let load =
            |device: &Device| with_adapter(load_dir(dir.path(), &OPTIONS).0, &dir.path().join("adapter"), device);
        let (recorded, mut model) = (load(&device()), load(&device().gradient_checkpointing()));
        for pass in [Pass::eval(), Pass::train(7, 3)] {
            let (loss, gradients) = loss_and_gradients(&recorded, &pass);
            for checkpointing in [Checkpointing::Block, Checkpointing::Sqrt, every(2), every(5), every(9)] {
                model.set_checkpointing(checkpointing);
                let (again, other) = loss_and_gradients(&model, &pass);
                // To the last bit: the second run is the first.
                assert_eq!(again, loss, "{family}, {checkpointing:?}");
                assert_eq!(other, gradients, "{family}, {checkpointing:?}");
            }
        }
    }
}

#[test]
fn an_adapter_on_the_head_is_trained() {
    let (ids, _) = golden("llama");
    let Labels { positions, tokens, weights } = labels(&ids);
    let mut model = load("llama3");
    let loss = |model: &CausalLm| {
        let hidden = model.hidden(&input(model, &ids), &Pass::eval());
        model.loss(hidden, &positions, &tokens, &weights, &Pass::eval()).unwrap()
    };
    let plain: f32 = loss(&model).into_scalar();
    let options = LoraOptions { r: 2, targets: Targets::Suffixes(vec!["lm_head".into()]), ..LoraOptions::default() };
    attach(&mut model, &options, &device()).unwrap();
    // B is zero: the same loss by another way, and a gradient for B.
    let adapted = loss(&model);
    let gradients = adapted.backward();
    assert_close(&[adapted.into_scalar()], &[plain], 1e-5, "a fresh adapter on the head");
    let mut found = false;
    model.projections(&mut |_, linear| {
        if let Some(adapter) = &linear.adapter {
            let gradient = floats(adapter.b.val().grad(&gradients).unwrap());
            found = gradient.iter().any(|g| g.abs() > 1e-6);
        }
    });
    assert!(found);
}

#[test]
fn without_labels_the_loss_is_zero_and_has_gradients() {
    let model = adapted("llama");
    let (ids, _) = golden("llama");
    let hidden = model.hidden(&input(&model, &ids), &Pass::eval());
    let loss = model.loss(hidden, &[], &[], &[], &Pass::eval()).unwrap();
    loss.backward();
    assert_eq!(loss.into_scalar::<f32>(), 0.0);
}

#[test]
fn labels_that_do_not_fit_are_errors() {
    let model = load("llama");
    let (ids, _) = golden("llama");
    let hidden = model.hidden(&input(&model, &ids), &Pass::eval());
    let loss = |positions: &[u32], tokens: &[u32], weights: &[f32]| {
        model.loss(hidden.clone(), positions, tokens, weights, &Pass::eval()).map(drop).unwrap_err()
    };
    assert!(matches!(loss(&[0], &[1, 2], &[1.0]), InputError::Labels { list: "tokens", found: 2, labels: 1 }));
    assert!(matches!(loss(&[0], &[1], &[]), InputError::Labels { list: "weights", .. }));
    assert!(matches!(loss(&[48], &[1], &[1.0]), InputError::Position { position: 48, .. }));
    assert!(matches!(loss(&[0], &[96], &[1.0]), InputError::Vocabulary { id: 96, vocab_size: 96 }));
}

#[test]
fn inputs_that_are_no_rectangle_are_errors() {
    let model = load("llama");
    let fail = |rows, seq, ids: &[u32], ends: &[u32]| {
        let positions: Vec<u32> = (0..ids.len() as u32).collect();
        model.input(rows, seq, ids, &positions, ends).unwrap_err()
    };
    assert!(matches!(fail(2, 2, &[1, 2, 3], &[2, 2, 2]), InputError::Length { list: "ids", found: 3, .. }));
    assert!(matches!(fail(1, 2, &[1, 2], &[2]), InputError::Length { list: "ends", .. }));
    assert!(matches!(fail(0, 5, &[], &[]), InputError::Empty));
    assert!(matches!(fail(1, 2, &[1, 96], &[2, 2]), InputError::Vocabulary { id: 96, .. }));
    assert!(matches!(fail(usize::MAX, 2, &[1], &[1]), InputError::Length { .. }));
}

#[test]
fn ends_and_positions_that_are_no_forest_are_errors() {
    let model = load("llama");
    let input = |seq, positions: &[u32], ends: &[u32]| {
        model.input(ends.len() / seq, seq, &vec![1; ends.len()], positions, ends).map(drop)
    };
    let fail = |positions: &[u32], ends: &[u32]| input(3, positions, ends).unwrap_err();
    assert_eq!(fail(&[0, 1, 0], &[2, 1, 3]), InputError::End { row: 0, column: 1, end: 1, seq: 3 });
    assert_eq!(fail(&[0, 1, 2], &[4, 3, 3]), InputError::End { row: 0, column: 0, end: 4, seq: 3 });
    let crossing = fail(&[0, 1, 2, 0, 1, 2], &[3, 3, 3, 2, 3, 3]);
    assert_eq!(crossing, InputError::Nesting { row: 1, column: 1, end: 3, parent: 0, parent_end: 2 });
    assert_eq!(fail(&[0, 2, 3], &[3, 3, 3]), InputError::Path { row: 0, column: 1, position: 2, expected: 1 });
    assert_eq!(fail(&[0, 1, 2], &[3, 2, 3]), InputError::Path { row: 0, column: 2, position: 2, expected: 1 });
    assert_eq!(fail(&[1, 2, 3], &[3, 3, 3]), InputError::Path { row: 0, column: 0, position: 1, expected: 0 });
    // A fork, and padding that is counted on.
    assert_eq!(input(6, &[0, 1, 1, 2, 0, 1], &[4, 2, 4, 4, 5, 6]), Ok(()));
}

#[test]
fn only_labelled_rows_change_neither_loss_nor_gradients() {
    let (ids, _) = golden("llama");
    // A few rows, some of which predict several tokens, in no order.
    let positions = [30, 3, 12, 30, 41, 3, 30];
    let tokens: Vec<u32> = (0..positions.len() as u32).map(|i| 5 + 7 * i).collect();
    let weights: Vec<f32> = (0..positions.len()).map(|i| 0.1 + 0.05 * i as f32).collect();
    for family in ["llama", "olmo2", "phi3"] {
        let model = adapted(family);
        let mut recomputed = adapted_on(family, &device().gradient_checkpointing());
        let input = input(&model, &ids);
        let hidden = model.hidden(&input, &Pass::eval());
        let loss = model.loss(hidden, &positions, &tokens, &weights, &Pass::eval()).unwrap();
        let want = gradients(&model, &loss);
        let check = |model: &CausalLm| {
            let labels = emberlora_model::Labels { positions: &positions, tokens: &tokens, weights: &weights };
            let selected = model.loss_of(&model.uploader().label(input.clone(), labels).unwrap(), &Pass::eval());
            let got = gradients(model, &selected);
            assert_close(&[selected.into_scalar()], &[loss.clone().into_scalar()], 1e-5, family);
            assert_close(&got, &want, 1e-5, family);
        };
        check(&model);
        for checkpointing in [Checkpointing::Block, Checkpointing::Sqrt] {
            recomputed.set_checkpointing(checkpointing);
            check(&recomputed);
        }
    }
}
