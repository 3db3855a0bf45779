//! A tiny model with adapters, batches for it, and a listener that remembers.

#![allow(dead_code, reason = "no test file uses all of it")]

pub mod site;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::Device;
use emberlora_config::Warmup;
use emberlora_data::{Batch, Document, RowRef};
use emberlora_lora::{LoraOptions, Projections, attach};
use emberlora_model::{AttentionKind, CausalLm, FloatDtype, LoadOptions};
use emberlora_train::{AdamW, Decay, Event, Length, TrainOptions};

/// The vocabulary of the tiny model.
pub const VOCABULARY: u32 = 96;

pub fn tiny_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama")
}

pub fn device() -> Device {
    Device::flex().autodiff()
}

pub fn lora(dropout: f64) -> LoraOptions {
    LoraOptions { r: 4, alpha: 8.0, dropout, seed: 7, ..LoraOptions::default() }
}

/// The tiny Llama with fresh adapters.
pub fn model(dropout: f64) -> CausalLm {
    let options = LoadOptions::new(None, FloatDtype::F32, AttentionKind::Fused);
    let (mut model, _) = CausalLm::load(&tiny_model(), &options, &device()).unwrap();
    attach(&mut model, &lora(dropout), &device()).unwrap();
    model
}

/// A document of `length` tokens in an order that can be learnt, trained from token `from` on.
pub fn document(line: usize, length: usize, from: usize) -> Document {
    let ids = (0..length as u32).map(|i| (line as u32 * 11 + i * 5) % VOCABULARY).collect();
    let trained = (0..length).map(|i| i >= from).collect();
    Document::new(ids, trained, RowRef::new(Arc::from(Path::new("rows.jsonl")), line), None)
}

/// One row of one document.
pub fn batch(line: usize, length: usize, from: usize) -> Batch {
    let document = document(line, length, from);
    Batch::new(&[vec![&document]], 0)
}

/// A batch for each line.
pub fn rows(lines: std::ops::Range<usize>) -> Vec<Batch> {
    lines.map(|line| batch(line, 12, 4)).collect()
}

pub fn options(steps: usize) -> TrainOptions {
    TrainOptions {
        length: Length::Steps(steps),
        grad_accumulation: 1,
        learning_rate: 1e-2,
        decay: Decay::Constant,
        warmup: Warmup::Steps(0),
        min_ratio: 0.0,
        optimizer: AdamW { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.0 },
        max_grad_norm: Some(1.0),
        eval_every: None,
        save_every: None,
        log_every: 1,
        seed: 3,
    }
}

/// Every A and B, in the order of the model.
pub fn factors(model: &CausalLm) -> Vec<Vec<f32>> {
    let mut all = Vec::new();
    model.projections(&mut |_, linear| {
        if let Some(adapter) = &linear.adapter {
            for factor in [&adapter.a, &adapter.b] {
                all.push(factor.val().inner().into_data().try_to_vec().unwrap());
            }
        }
    });
    all
}

/// One word per event: its kind and its step.
pub fn shorthand(event: &Event) -> String {
    match event {
        Event::RunStarted(run) => format!("start/{}", run.total_steps),
        Event::Step(step) => format!("step/{}", step.step),
        Event::Skipped { step, .. } => format!("skip/{step}"),
        Event::Eval { step, .. } => format!("eval/{step}"),
        Event::Saved { step, .. } => format!("save/{step}"),
        Event::Stopped { step, reason } => format!("stop/{step}/{reason:?}"),
        Event::Finished(summary) => format!("finish/{}", summary.steps),
    }
}
