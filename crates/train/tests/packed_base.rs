//! Runs whose base is packed: QLoRA.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{DType, Tensor};
use common::factors;
use common::site::{Site, metrics, prepare_error, train};
use emberlora_config::{Dtype, QuantizationKind, QuantizationSection, RunConfig};
use emberlora_data::DataOptions;
use emberlora_lora::Projections;
use emberlora_lora::peft;
use emberlora_model::CausalLm;
use emberlora_model::generate::{Generator, SamplingOptions};
use emberlora_quant::FloatDtype;
use emberlora_train::{AdapterChoice, Base, LoadedModel, PrepareError, Run, evaluate};
use serde_json::Value;
use sha2::{Digest, Sha256};

const NF4: &str = "quantization={kind: nf4}";

fn quantised(name: &str) -> PathBuf {
    common::tiny_model().join("../quant").join(name)
}

/// SHA-256 of all that is stored of each packed projection.
fn hashes(model: &CausalLm) -> BTreeMap<String, String> {
    let mut all = BTreeMap::new();
    model.projections(&mut |name, linear| {
        if let Some(packed) = linear.weight.as_packed() {
            let mut hash = Sha256::new();
            hash.update(packed.codes.into_data().as_bytes());
            hash.update(packed.scale_codes.map(|codes| codes.into_data().as_bytes().to_vec()).unwrap_or_default());
            hash.update(packed.scales.into_data().as_bytes());
            all.insert(name.to_owned(), format!("{:x?}", hash.finalize()));
        }
    });
    all
}

fn provenance(config: &RunConfig) -> Value {
    serde_json::from_str(&fs::read_to_string(config.output.join("provenance.json")).unwrap()).unwrap()
}

#[test]
fn training_leaves_every_packed_byte_as_it_was() {
    let site = Site::new();
    for (index, quantization) in [
        NF4,
        "quantization={kind: nf4, double_quant: false}",
        "quantization={kind: fp4, block_size: 32}",
        "quantization={kind: int8, threshold: 0}",
        "quantization={kind: int8, threshold: 1.5, skip: []}",
    ]
    .iter()
    .enumerate()
    {
        for checkpointing in ["none", "block"] {
            let output = format!("output={}", site.path(&format!("{index}-{checkpointing}")).display());
            let checkpointing = format!("gradient_checkpointing={checkpointing}");
            let config = site.config(&[quantization, &output, &checkpointing, "adapter.dropout=0.1"]);
            let mut run = Run::prepare(&config, &()).unwrap();
            let before = hashes(&run.model.model);
            assert_eq!(before.len(), if quantization.contains("skip") { 15 } else { 14 });
            let trained = run.train(&mut [], &AtomicBool::new(false)).unwrap();
            assert_eq!(hashes(&trained.model), before, "{quantization}");
            assert_eq!(hashes(&run.model.model), before, "{quantization}");
            let summary = trained.summary;
            assert!(summary.eval_after.unwrap().loss < summary.eval_before.unwrap().loss, "{quantization}");
        }
    }
}

#[test]
fn a_run_says_how_its_base_was_packed() {
    let site = Site::new();
    let config = site.config(&[NF4]);
    let (_, trained) = train(&config);
    let packed = &provenance(&config)["model"]["packed"];
    assert_eq!(packed["format"], "nf4 in blocks of 64, double quantised");
    assert_eq!(packed["parameters"], 18_432);
    assert!(packed["bytes"].as_u64().unwrap() > 0);
    let text = fs::read_to_string(config.output.join("config.yaml")).unwrap();
    assert!(text.contains("# model weights: ") && text.contains("nf4 in blocks of 64"), "{text}");

    let again = format!("output={}", site.path("again").display());
    let resolved = RunConfig::parse(&text, "config.yaml", &[again]).unwrap();
    assert_eq!(resolved.quantization, config.quantization);
    assert_eq!((resolved.model.dtype, resolved.model.compute_dtype), (Dtype::F32, Dtype::F32));
    let (_, second) = train(&resolved);
    assert_eq!(factors(&trained.model), factors(&second.model));

    let dense = site.config(&[&format!("output={}", site.path("dense").display())]);
    train(&dense);
    assert_eq!(provenance(&dense)["model"]["packed"], Value::Null);
}

#[test]
fn a_directory_that_is_quantised_already_needs_no_section() {
    let site = Site::of(&quantised("llama_nf4_double"));
    let config = site.config(&[]);
    let (_, trained) = train(&config);
    let text = fs::read_to_string(config.output.join("config.yaml")).unwrap();
    let again = format!("output={}", site.path("again").display());
    let resolved = RunConfig::parse(&text, "config.yaml", &[again]).unwrap();
    let expected = QuantizationSection::new(QuantizationKind::Nf4, true, 64, vec!["lm_head".to_owned()], 6.0);
    assert_eq!(resolved.quantization, Some(expected));
    assert_eq!(factors(&train(&resolved).1.model), factors(&trained.model));

    // Packing the dense model gives the same base, and so the same run.
    let dense = Site::new();
    assert_eq!(factors(&train(&dense.config(&[NF4])).1.model), factors(&trained.model));
}

#[test]
fn a_section_that_disagrees_with_the_directory_is_refused() {
    let site = Site::of(&quantised("llama_nf4_double"));
    for (quantization, word) in [
        ("{kind: fp4}", "bnb_4bit_quant_type"),
        ("{kind: int8}", "load_in_8bit"),
        ("{kind: nf4, double_quant: false}", "bnb_4bit_use_double_quant"),
        ("{kind: nf4, block_size: 128}", "blocks of 128"),
        ("{kind: nf4, skip: [lm_head, o_proj]}", "o_proj.weight"),
    ] {
        let error = prepare_error(&site.config(&[&format!("quantization={quantization}")]));
        assert!(matches!(error, PrepareError::Load(_)) && error.is_wrong_input(), "{error}");
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn adapters_are_f32_and_norms_in_the_compute_dtype() {
    /// The formats of vectors as wide as the model: a norm each, as scales of 4-bit blocks are fewer.
    struct Norms(Vec<DType>);
    impl ModuleVisitor for Norms {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if param.dims()[..] == [32] {
                self.0.push(param.val().dtype());
            }
        }
    }
    let site = Site::new();
    for (compute_dtype, expected) in [("f32", DType::F32), ("bf16", DType::BF16)] {
        let compute_dtype = format!("model.compute_dtype={compute_dtype}");
        let config = site.config(&[NF4, "model.dtype=f16", &compute_dtype]);
        let base = Base::resolve(&config, &()).unwrap();
        let LoadedModel { model, .. } = LoadedModel::load(&config, &base, AdapterChoice::Recipe).unwrap();
        assert_eq!(model.weight_dtype(), Some(FloatDtype::F16));
        let mut adapters = 0;
        model.projections(&mut |_, linear| {
            if let Some(adapter) = &linear.adapter {
                assert_eq!((adapter.a.val().dtype(), adapter.b.val().dtype()), (DType::F32, DType::F32));
                adapters += 1;
            }
        });
        assert_eq!(adapters, 14);
        let mut norms = Norms(Vec::new());
        model.visit(&mut norms);
        assert_eq!(norms.0, [expected; 5]);
    }
}

#[test]
fn an_adapter_of_a_packed_base_is_evaluated_and_generates() {
    let site = Site::new();
    let config = site.config(&[NF4]);
    let (_, trained) = train(&config);
    let saved = config.output.join("adapter");
    let written = peft::load(&saved).unwrap();
    assert_eq!(written.tensors.len(), 28);
    assert_eq!(written.base_model_name.as_deref(), site.path("model").to_str());

    let base = Base::resolve(&config, &()).unwrap();
    let data = base.dataset(DataOptions::eval(&config), &(), "eval").unwrap();
    let load = |choice| LoadedModel::load(&config, &base, choice).unwrap();
    let loss = |choice| evaluate(&load(choice).model, data.batches(config.seed, 0)).unwrap().loss;
    let evals: Vec<Value> = metrics(&config.output).into_iter().filter(|line| line["split"] == "eval").collect();
    assert_eq!(loss(AdapterChoice::Start), evals[0]["loss"].as_f64().unwrap());
    assert_eq!(loss(AdapterChoice::Saved(&saved)), evals[1]["loss"].as_f64().unwrap());

    let generated = |model: CausalLm| -> Vec<u32> {
        let model = model.valid();
        let prompt = [5, 10, 15, 20, 25, 30];
        Generator::new(&model, &prompt, SamplingOptions::greedy(12, vec![])).unwrap().collect()
    };
    let with_adapter = generated(load(AdapterChoice::Saved(&saved)).model);
    assert_eq!(with_adapter.len(), 12);
    assert_eq!(with_adapter, generated(trained.model));
    assert_eq!(generated(load(AdapterChoice::Start).model).len(), 12);
}
