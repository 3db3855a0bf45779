//! Training in step with transformers and PEFT: `fixtures/make_families.py` made the models, the batches and the numbers.

mod parity;

use std::fs;
use std::path::PathBuf;

use burn::tensor::Device;
use emberlora::data::{Batch, Document};
use emberlora::lora::{attach, peft};
use emberlora::model::{AttentionKind, CausalLm, Checkpointing, LoadOptions};
use emberlora::quant::FloatDtype;
use emberlora::train::TrainState;
use parity::{
    Case, MicroBatch, Tensors, Tolerances, batch_of, compare, device, first_gradients, fixtures, follow, read_case,
    state, with_adapter,
};

const FAMILIES: [&str; 7] = ["llama", "llama3", "qwen2", "qwen3", "mistral", "olmo2", "phi3"];

fn case(family: &str, name: &str) -> (PathBuf, Case) {
    let dir = fixtures().join(family).join("train").join(name);
    let case = read_case(&dir);
    (dir, case)
}

fn model(family: &str, attention: AttentionKind) -> CausalLm {
    let options = LoadOptions::new(None, FloatDtype::F32, attention);
    CausalLm::load(&fixtures().join(family), &options, &device()).unwrap().0
}

fn check(family: &str, name: &str, attention: AttentionKind) {
    let (dir, case) = case(family, name);
    let model = with_adapter(model(family, attention), &dir.join("adapter_init"), &device());
    let allowed = Tolerances { losses: vec![1e-4; case.losses.len()], norm: 1e-3, gradients: 1e-5, factors: 1e-4 };
    follow(&format!("{family}/{name}"), &dir, &case, model, &allowed);
}

fn cases(family: &str) -> Vec<String> {
    let entries = fs::read_dir(fixtures().join(family).join("train")).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn ten_steps_of_every_family_follow_peft() {
    for family in FAMILIES {
        check(family, "default", AttentionKind::Fused);
    }
}

#[test]
fn ten_steps_with_eager_attention_follow_peft() {
    for family in FAMILIES {
        check(family, "default", AttentionKind::Eager);
    }
}

#[test]
fn ten_steps_of_every_llama_case_follow_peft() {
    let names = cases("llama");
    assert!(names.len() >= 9, "{names:?}");
    for name in names {
        check("llama", &name, AttentionKind::Fused);
    }
}

#[test]
fn the_rules_of_a_case_choose_what_peft_chose() {
    for family in FAMILIES {
        for name in cases(family) {
            let (dir, case) = case(family, &name);
            let mut fresh = model(family, AttentionKind::Fused);
            let report = attach(&mut fresh, &case.lora.options(), &device()).unwrap();
            assert_eq!(report.trainable_parameters, case.trainable_parameters, "{family}/{name}");
            let mut saved = model(family, AttentionKind::Fused);
            let loaded = peft::apply(&mut saved, &peft::load(&dir.join("adapter_init")).unwrap(), &device()).unwrap();
            assert_eq!(report.modules, loaded.modules, "{family}/{name}");
        }
    }
}

/// Documents of 24, 9, 9, 15, 15 and 15 tokens.
fn documents() -> Vec<Document> {
    let (_, case) = case("llama", "accumulation");
    case.steps[0].iter().flat_map(MicroBatch::documents).collect()
}

/// A llama adapter fits every model of llama's shape.
fn with_llama_adapter(family: &str) -> TrainState {
    let adapter = if family.starts_with("llama") { "llama" } else { family };
    let (dir, case) = case(adapter, "default");
    state(with_adapter(model(family, AttentionKind::Fused), &dir.join("adapter_init"), &device()), &case)
}

fn check_equal_gradients(context: &str, a: (f64, Tensors), b: (f64, Tensors)) {
    assert!((a.0 - b.0).abs() < 1e-5, "{context}: loss {} and {}", a.0, b.0);
    compare(context, &a.1, &b.1, true, 1e-5);
}

#[test]
fn packed_equals_unpacked() {
    let documents = documents();
    let [a, b, c, d, e, f] = &documents[..] else { panic!("six documents") };
    for family in FAMILIES.into_iter().chain(["llama_linear", "llama_dynamic", "llama_yarn"]) {
        let mut state = with_llama_adapter(family);
        let packed = Batch::new(&[vec![a, b, d], vec![e, c, f]], 0);
        let packed = first_gradients(&mut state, &[packed]);
        let unpacked = first_gradients(&mut state, &[batch_of(&documents)]);
        check_equal_gradients(family, packed, unpacked);
    }
}

#[test]
fn accumulation_equals_one_large_batch() {
    let documents = documents();
    for family in FAMILIES {
        let mut state = with_llama_adapter(family);
        let large = first_gradients(&mut state, &[batch_of(&documents)]);
        let parts = [batch_of(&documents[..1]), batch_of(&documents[1..5]), batch_of(&documents[5..])];
        let parts = first_gradients(&mut state, &parts);
        check_equal_gradients(family, large, parts);
    }
}

#[test]
fn gradient_checkpointing_changes_no_gradient() {
    let documents = documents();
    for family in FAMILIES {
        let (dir, case) = case(family, "default");
        let run = |device: Device, checkpointing| {
            let model = model(family, AttentionKind::Fused);
            let mut model = with_adapter(model, &dir.join("adapter_init"), &device);
            model.set_checkpointing(checkpointing);
            first_gradients(&mut state(model, &case), &[batch_of(&documents)])
        };
        for checkpointing in [Checkpointing::Block, Checkpointing::Sqrt] {
            let recomputed = run(device().gradient_checkpointing(), checkpointing);
            check_equal_gradients(family, recomputed, run(device(), checkpointing));
        }
    }
}
