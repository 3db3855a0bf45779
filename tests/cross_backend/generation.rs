//! Text and saved adapters: what one backend writes, every other understands.

use std::fs;
use std::path::Path;

use burn::module::Module;
use emberlora::data::Batch;
use emberlora::lora::peft;
use emberlora::model::generate::{Finish, Generator, SamplingOptions};
use emberlora::model::{AttentionKind, CausalLm, LoadOptions};
use emberlora::quant::FloatDtype;
use emberlora::train::evaluate;
use serde::Deserialize;

use crate::backends::{Drift, Tested};
use crate::parity::{MicroBatch, factors, fixtures, read_case, state};
use crate::training::adapted;

/// A line of what `crates/model/tests/make_greedy.py` wrote.
#[derive(Deserialize)]
struct Greedy {
    family: String,
    prompt: Vec<u32>,
    tokens: Vec<u32>,
}

pub fn greedy_tokens_are_those_of_transformers(tested: &Tested) {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/model/tests/greedy.jsonl"));
    let cases = text.unwrap();
    let cases = cases.lines().map(|line| serde_json::from_str::<Greedy>(line).unwrap());
    let mut seen = 0;
    for case in cases.filter(|case| ["llama", "qwen2"].contains(&case.family.as_str())) {
        let options = LoadOptions::new(tested.weights, FloatDtype::F32, AttentionKind::Fused);
        let model = CausalLm::load(&fixtures().join(&case.family), &options, &tested.device).unwrap().0;
        let greedy = SamplingOptions::greedy(case.tokens.len(), Vec::new());
        let mut generator = Generator::new(&model, &case.prompt, greedy).unwrap();
        let tokens: Vec<u32> = generator.by_ref().collect();
        assert_eq!(tokens, case.tokens, "{} writes something else with {}", tested.name, case.family);
        assert_eq!(generator.finish(), Some(Finish::Length));
        seen += 1;
    }
    assert!(seen >= 2, "{seen} cases");
}

/// Trains an adapter here, saves it, and uses it on every backend of this build.
pub fn an_adapter_means_the_same_everywhere(tested: &Tested) {
    for family in ["llama", "qwen2"] {
        let dir = fixtures().join(family).join("train/default");
        let case = read_case(&dir);
        let device = tested.device.clone().autodiff();
        let mut state =
            state(adapted(tested, family, &case, &dir.join("adapter_init"), FloatDtype::F32, &device), &case);
        let steps: Vec<Vec<Batch>> =
            case.steps.iter().map(|step| step.iter().map(MicroBatch::batch).collect()).collect();
        for batches in &steps[..3] {
            state.step(batches).unwrap();
        }
        let saved = tempfile::tempdir().unwrap();
        let written = saved.path().join("adapter");
        peft::save(state.model(), &case.lora.options(), family, None, &written).unwrap();
        let here = evaluate(&state.model().valid(), &steps[0]).unwrap().loss;
        let trained = factors(state.model());
        for other in Tested::all() {
            let tolerance = other.tolerance(FloatDtype::F32);
            let model = adapted(&other, family, &case, &written, FloatDtype::F32, &other.device.clone().autodiff());
            assert!(factors(&model) == trained, "{} reads other numbers than {} wrote", other.name, tested.name);
            let mut drift = Drift::default();
            let there = evaluate(&model, &steps[0]).unwrap().loss;
            drift.note("evaluation", "loss", (here - there).abs(), tolerance.loss);
            drift.check(&format!("{family} with an adapter of {}", tested.name), tolerance);
        }
    }
}
