//! Every family computes what transformers computes.

mod common;

use burn::tensor::DType;
use common::*;
use emberlora_lora::{Pass, Projections};
use emberlora_model::generate::{Finish, Generator, SamplingOptions};
use emberlora_model::{AttentionKind, CausalLm, FloatDtype, Input, KvCache, LoadOptions};
use serde::Deserialize;

fn rectangle(model: &CausalLm, ids: &[u32]) -> Input {
    Input::unpacked(ROWS, SEQ, ids, &model.device()).unwrap()
}

#[test]
fn logits_agree_with_transformers() {
    for name in FIXTURES {
        let (ids, want) = golden(name);
        for attention in [AttentionKind::Fused, AttentionKind::Eager] {
            let (model, _) = load_dir(&fixture(name), &LoadOptions { attention, ..OPTIONS });
            let got = logits(&model, &rectangle(&model, &ids));
            assert_close(&got, &want, 1e-4, &format!("{name}, {attention:?}"));
        }
    }
}

/// Documents of these lengths fill a row of the fixtures.
const DOCUMENTS: [usize; 3] = [5, 12, 7];

#[test]
fn packed_documents_compute_what_they_compute_alone() {
    for name in FIXTURES {
        let model = load(name);
        let ids = &golden(name).0[..SEQ];
        let positions: Vec<u32> = DOCUMENTS.iter().flat_map(|&len| 0..len as u32).collect();
        let mut ends = Vec::new();
        for len in DOCUMENTS {
            ends.extend(std::iter::repeat_n((ends.len() + len) as u32, len));
        }
        let packed = logits(&model, &model.input(1, SEQ, ids, &positions, &ends).unwrap());
        let mut alone = Vec::new();
        for (start, len) in [(0, 5), (5, 12), (17, 7)] {
            let input = Input::unpacked(1, len, &ids[start..start + len], &model.device()).unwrap();
            alone.extend(logits(&model, &input));
        }
        assert_close(&packed, &alone, 1e-5, name);
    }
}

#[test]
fn branches_of_a_tree_compute_what_they_compute_alone() {
    // Five shared tokens, then four, then seven, of which three are shared by two branches more.
    let branches: [&[std::ops::Range<usize>]; 4] =
        [&[0..5, 5..9], &[0..5, 9..16], &[0..5, 9..12, 16..20], &[0..5, 9..12, 20..24]];
    let mut ends = vec![24; 5];
    ends.extend([vec![9; 4], vec![24; 3], vec![16; 4], vec![20; 4], vec![24; 4]].concat());
    let positions: Vec<u32> = (0..9).chain(5..12).chain(8..12).chain(8..12).collect();
    for name in FIXTURES {
        let model = load(name);
        if model.config().positions_depend_on_length() {
            continue;
        }
        let ids = &golden(name).0[..SEQ];
        let shared = logits(&model, &model.input(1, SEQ, ids, &positions, &ends).unwrap());
        for branch in branches {
            let columns: Vec<usize> = branch.iter().cloned().flatten().collect();
            let tokens: Vec<u32> = columns.iter().map(|&column| ids[column]).collect();
            let alone = logits(&model, &Input::unpacked(1, tokens.len(), &tokens, &model.device()).unwrap());
            let shared: Vec<f32> =
                columns.iter().flat_map(|&column| &shared[column * VOCAB..][..VOCAB]).copied().collect();
            assert_close(&shared, &alone, 1e-5, name);
        }
    }
    assert!(load("llama_dynamic").config().positions_depend_on_length());
}

#[test]
fn a_cache_filled_in_pieces_gives_what_one_pass_gives() {
    // Dynamic rotation depends on the length so far: keys that were cached earlier keep theirs, in transformers too.
    for name in FIXTURES.iter().filter(|name| **name != "llama_dynamic") {
        let model = load(name);
        let (ids, _) = golden(name);
        let whole = logits(&model, &rectangle(&model, &ids));
        for pieces in [&[24][..], &[9, 1, 1, 1, 12], &[1; 24]] {
            let mut cache = KvCache::new();
            for &new in pieces {
                let seen = cache.len();
                let rows = (0..ROWS).flat_map(|row| &ids[row * SEQ + seen..][..new]);
                let piece: Vec<u32> = rows.copied().collect();
                let input = Input::continued(ROWS, new, &piece, seen, &model.device()).unwrap();
                let hidden = model.step(&input, &mut cache, &Pass::eval());
                let got = floats(model.logits(hidden, &Pass::eval()));
                for row in 0..ROWS {
                    let want = &whole[(row * SEQ + seen) * VOCAB..][..new * VOCAB];
                    assert_close(&got[row * new * VOCAB..][..new * VOCAB], want, 1e-5, name);
                }
            }
            assert_eq!(cache.len(), SEQ);
        }
    }
}

/// Made by `make_greedy.py` beside this file.
#[derive(Deserialize)]
struct Greedy {
    family: String,
    prompt: Vec<u32>,
    tokens: Vec<u32>,
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    let text = include_str!("greedy.jsonl");
    for case in text.lines().map(|line| serde_json::from_str::<Greedy>(line).unwrap()) {
        let model = load(&case.family);
        let options = SamplingOptions::greedy(case.tokens.len(), Vec::new());
        let mut generator = Generator::new(&model, &case.prompt, options).unwrap();
        let tokens: Vec<u32> = generator.by_ref().collect();
        assert_eq!(tokens, case.tokens, "{}", case.family);
        assert_eq!(generator.finish(), Some(Finish::Length));

        // The same again, with one of the tokens as the end.
        let eos = case.tokens[5];
        let options = SamplingOptions::greedy(100, vec![eos]);
        let mut generator = Generator::new(&model, &case.prompt, options).unwrap();
        let until: Vec<u32> = generator.by_ref().collect();
        assert_eq!(until[..], *case.tokens.split(|token| *token == eos).next().unwrap());
        assert_eq!(generator.finish(), Some(Finish::Eos));
        assert_eq!(generator.error(), None);
    }
}

#[test]
fn sampling_repeats_with_its_seed() {
    let model = load("llama");
    let sample = |seed| -> Vec<u32> {
        let options = SamplingOptions { temperature: 1.0, top_p: 0.9, seed, ..SamplingOptions::greedy(30, vec![]) };
        Generator::new(&model, &[1, 5, 9], options).unwrap().collect()
    };
    assert_eq!(sample(1), sample(1));
    assert_ne!(sample(1), sample(2));
}

#[test]
fn a_generation_that_cannot_begin_is_an_error() {
    let model = load("llama");
    let greedy = SamplingOptions::greedy(3, vec![]);
    assert!(Generator::new(&model, &[], greedy.clone()).is_err());
    let error = Generator::new(&model, &[96], greedy.clone()).unwrap_err().to_string();
    assert!(error.contains("96") && error.contains("tokenizer"), "{error}");
    for (temperature, top_p) in [(-1.0, 1.0), (f64::NAN, 1.0), (1.0, 0.0), (1.0, 1.5)] {
        assert!(Generator::new(&model, &[1], SamplingOptions { temperature, top_p, ..greedy.clone() }).is_err());
    }
}

#[test]
fn bf16_weights_stay_bf16_while_activations_are_f32() {
    let (ids, want) = golden("llama");
    let options = LoadOptions { dtype: Some(FloatDtype::Bf16), ..OPTIONS };
    let (model, report) = load_dir(&fixture("llama"), &options);
    model.projections(&mut |name, linear| assert_eq!(linear.weight.as_dense().unwrap().dtype(), DType::BF16, "{name}"));
    assert!(report.converted_bytes > 0);
    let hidden = model.hidden(&rectangle(&model, &ids), &Pass::eval());
    assert_eq!(hidden.dtype(), DType::F32);
    // Weights carry 8 bits: the logits move, but not far.
    assert_close(&logits(&model, &rectangle(&model, &ids)), &want, 0.3, "bf16 weights");
}

#[test]
fn every_projection_is_visited_once_under_its_own_name() {
    for (family, per_layer) in [("llama", 7), ("phi3", 4)] {
        let mut model = load(family);
        let mut seen = Vec::new();
        model.projections(&mut |name, _| seen.push(name.to_owned()));
        let mut again = Vec::new();
        model.visit_projections(&mut |name, _| again.push(name.to_owned()));
        assert_eq!(seen, again);
        assert_eq!(seen.len(), 2 * per_layer + 1);
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), again.len());
        let fused = family == "phi3";
        assert_eq!(seen.iter().any(|name| name == "model.layers.1.self_attn.qkv_proj"), fused);
        assert_eq!(seen.iter().any(|name| name == "model.layers.0.mlp.gate_proj"), !fused);
    }
}
