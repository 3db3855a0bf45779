//! From a recipe to the files of a run.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use common::{factors, shorthand, tiny_model};
use emberlora_config::{DataFormat, DeviceChoice, Dtype, RunConfig};
use emberlora_data::DataOptions;
use emberlora_lora::peft;
use emberlora_train::{
    AdapterChoice, Base, Event, Listener, LoadedModel, PrepareError, Run, TrainError, Trained, evaluate,
};
use serde_json::{Value, json};

/// A directory with the tiny model, a tokenizer of the words t0 to t95, and rows of such words.
struct Site(tempfile::TempDir);

impl Site {
    fn new() -> Self {
        let site = Self(tempfile::tempdir().unwrap());
        let model = site.path("model");
        fs::create_dir(&model).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(tiny_model().join(name), model.join(name)).unwrap();
        }
        let vocabulary: serde_json::Map<String, Value> =
            (0..common::VOCABULARY).map(|id| (format!("t{id}"), json!(id))).collect();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
        });
        fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        fs::write(model.join("tokenizer_config.json"), "{}").unwrap();
        site.rows("train.jsonl", 0..12);
        site.rows("eval.jsonl", 20..23);
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn rows(&self, name: &str, lines: std::ops::Range<u32>) {
        let word = |line: u32, i: u32| format!("t{}", (line * 11 + i * 5) % common::VOCABULARY);
        let text = |line: u32| (0..8 + line % 5).map(|i| word(line, i)).collect::<Vec<_>>().join(" ");
        let rows: Vec<String> = lines.map(|line| json!({"text": text(line)}).to_string()).collect();
        fs::write(self.path(name), rows.join("\n")).unwrap();
    }

    fn config(&self, overrides: &[&str]) -> RunConfig {
        let recipe = json!({
            "model": {"source": self.path("model")},
            "adapter": {"r": 4, "alpha": 8},
            "data": {"train": self.path("train.jsonl"), "eval": self.path("eval.jsonl"), "max_seq_len": 32},
            "train": {"epochs": 2, "batch_size": 2, "learning_rate": 0.01},
            "output": self.path("run"),
        });
        let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
        RunConfig::parse(&recipe.to_string(), "recipe.yaml", &overrides).unwrap()
    }
}

fn train(config: &RunConfig) -> (Vec<Event>, Trained) {
    let mut run = Run::prepare(config, &()).unwrap();
    let mut events = Vec::new();
    let mut listener = |event: &Event| events.push(event.clone());
    let trained = run.train(&mut [&mut listener], &AtomicBool::new(false)).unwrap();
    (events, trained)
}

fn prepare_error(config: &RunConfig) -> PrepareError {
    match Run::prepare(config, &()) {
        Ok(_) => panic!("the recipe was accepted"),
        Err(error) => error,
    }
}

fn metrics(dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_run_leaves_config_metrics_provenance_and_adapter() {
    let site = Site::new();
    let config = site.config(&[]);
    let (events, trained) = train(&config);
    let order: Vec<String> = events.iter().map(shorthand).collect();
    assert_eq!(order.first().map(String::as_str), Some("start/4"), "{order:?}");
    assert_eq!(order.last().map(String::as_str), Some("finish/4"), "{order:?}");
    let summary = &trained.summary;
    assert!(summary.eval_after.unwrap().loss < summary.eval_before.unwrap().loss);

    let lines = metrics(&config.output);
    let (eval, steps): (Vec<&Value>, Vec<&Value>) = lines.iter().partition(|line| line["split"] == "eval");
    assert_eq!((eval.len(), steps.len()), (2, 4));
    assert_eq!(eval[1]["loss"].as_f64(), summary.eval_after.map(|evaluation| evaluation.loss));
    let losses: Vec<f64> = events
        .iter()
        .filter_map(|event| match event {
            Event::Step(step) => Some(step.loss),
            _ => None,
        })
        .collect();
    assert_eq!(steps.iter().map(|line| line["loss"].as_f64().unwrap()).collect::<Vec<_>>(), losses);
    for key in ["step", "epoch", "lr", "grad_norm", "tokens", "trained_tokens", "tokens_per_second", "step_seconds"] {
        assert!(steps[0][key].is_number(), "{key}");
    }
    assert!(steps[0].get("peak_memory_bytes").is_some());

    let saved = peft::load(&config.output.join("adapter")).unwrap();
    assert_eq!(saved.tensors.len(), factors(&trained.model).len());
    let provenance: Value =
        serde_json::from_str(&fs::read_to_string(config.output.join("provenance.json")).unwrap()).unwrap();
    assert_eq!(provenance["model"]["files"].as_object().unwrap().len(), 2);
    assert_eq!(provenance["train"]["files"][0]["sha256"].as_str().unwrap().len(), 64);
    assert_eq!(provenance["seed"], 42);
}

#[test]
fn the_resolved_recipe_leaves_nothing_open_and_runs_again_to_the_same_numbers() {
    let site = Site::new();
    let config = site.config(&["adapter.dropout=0.1"]);
    let (_, trained) = train(&config);

    let text = fs::read_to_string(config.output.join("config.yaml")).unwrap();
    assert!(text.contains("# model model.safetensors: sha256 "), "{text}");
    let again = format!("output={}", site.path("again").display());
    let resolved = RunConfig::parse(&text, "config.yaml", &[again]).unwrap();
    assert_eq!(resolved.device, DeviceChoice::Flex);
    assert_eq!((resolved.model.dtype, resolved.model.compute_dtype), (Dtype::F32, Dtype::F32));
    assert_eq!(resolved.data.train[0].format, DataFormat::Text);
    let (_, second) = train(&resolved);
    assert_eq!(factors(&trained.model), factors(&second.model));
}

#[test]
fn an_output_with_a_run_in_it_is_refused_before_anything_is_loaded() {
    let site = Site::new();
    let config = site.config(&["train.max_steps=1"]);
    train(&config);
    fs::remove_dir_all(site.path("model")).unwrap();
    let error = prepare_error(&config);
    assert!(matches!(error, PrepareError::Train(TrainError::OutputInUse { .. })), "{error}");
    assert!(error.is_wrong_input());
}

#[test]
fn an_output_that_cannot_be_is_refused_before_anything_is_loaded() {
    let site = Site::new();
    let output = format!("output={}", site.path("train.jsonl").join("run").display());
    fs::remove_dir_all(site.path("model")).unwrap();
    let error = prepare_error(&site.config(&[&output]));
    assert!(matches!(error, PrepareError::Train(TrainError::OutputUnusable { .. })), "{error}");
    assert!(error.is_wrong_input());
}

#[test]
fn patterns_that_are_no_regular_expressions_are_refused_before_anything_is_loaded() {
    let site = Site::new();
    fs::remove_dir_all(site.path("model")).unwrap();
    for (key, value) in [("targets", "q_proj("), ("exclude", "'[a'"), ("rank_pattern", "{\"k_proj(\": 4}")] {
        let error = prepare_error(&site.config(&[&format!("adapter.{key}={value}")]));
        assert!(matches!(error, PrepareError::Lora(_)) && error.is_wrong_input(), "{key}: {error}");
    }
}

#[test]
fn training_in_half_precision_is_refused_before_anything_is_loaded() {
    let site = Site::new();
    fs::remove_dir_all(site.path("model")).unwrap();
    let error = prepare_error(&site.config(&["model.compute_dtype=f16"]));
    assert!(matches!(error, PrepareError::HalfTraining) && error.is_wrong_input(), "{error}");
}

#[test]
fn a_start_that_fails_leaves_the_output_free_for_the_next() {
    let site = Site::new();
    let config = site.config(&["data.eval=null", "train.max_steps=1"]);
    let weights = site.path("model/model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..100]).unwrap();
    assert!(matches!(prepare_error(&config), PrepareError::Load(_)));
    fs::write(&weights, bytes).unwrap();

    // The files of the run are written, and then it fails before its first step.
    struct Full;
    impl Listener for Full {
        fn event(&mut self, _: &Event) -> Result<(), TrainError> {
            Err(TrainError::Device { message: "full".to_owned() })
        }
    }
    let mut run = Run::prepare(&config, &()).unwrap();
    run.train(&mut [&mut Full], &AtomicBool::new(false)).unwrap_err();
    assert!(!config.output.join("adapter").exists());
    train(&config);
}

#[test]
fn a_revision_of_a_local_directory_is_refused() {
    let site = Site::new();
    let error = prepare_error(&site.config(&["model.revision=v2"]));
    assert!(error.to_string().contains("model.revision") && error.is_wrong_input(), "{error}");
}

#[test]
fn the_console_is_thinned_out_and_the_metrics_are_not() {
    let site = Site::new();
    let config = site.config(&["train.log_every=3", "data.eval=null"]);
    train(&config);
    let steps: Vec<u64> = metrics(&config.output).iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [1, 2, 3, 4]);
}

#[test]
fn a_recipe_without_an_adapter_cannot_train() {
    let site = Site::new();
    let error = prepare_error(&site.config(&["adapter.kind=none"]));
    assert!(matches!(error, PrepareError::NoAdapter), "{error}");
}

#[test]
#[cfg(not(feature = "cuda"))]
fn a_device_that_is_not_compiled_in_is_refused_before_anything_is_loaded() {
    let site = Site::new();
    let config = site.config(&["device=cuda"]);
    fs::remove_dir_all(site.path("model")).unwrap();
    assert!(prepare_error(&config).to_string().contains("--features cuda"));
}

#[test]
fn a_vocabulary_that_is_larger_than_the_models_is_refused_with_the_row() {
    let site = Site::new();
    let path = site.path("model/tokenizer.json");
    let text = fs::read_to_string(&path).unwrap().replace("\"t95\":95", "\"t95\":96");
    fs::write(&path, text).unwrap();
    let error = prepare_error(&site.config(&[])).to_string();
    assert!(error.contains(".jsonl:") && error.contains("token 96"), "{error}");
}

#[test]
fn training_goes_on_from_a_saved_adapter() {
    let site = Site::new();
    let first = site.config(&[]);
    let (_, trained) = train(&first);
    let from = format!("adapter.init_from={}", first.output.join("adapter").display());
    let output = format!("output={}", site.path("second").display());
    let second = site.config(&[&from, &output]);
    let mut run = Run::prepare(&second, &()).unwrap();
    assert_eq!(factors(&run.model.model), factors(&trained.model));
    assert_eq!(run.provenance.init_from.as_ref().unwrap().files.len(), 2);
    let trained_on = run.train(&mut [], &AtomicBool::new(false)).unwrap();
    assert!(trained_on.summary.eval_after.unwrap().loss < trained.summary.eval_after.unwrap().loss);

    let error = prepare_error(&site.config(&[&from, "adapter.r=8", "output=elsewhere"])).to_string();
    assert!(error.contains("rank 8 in the recipe and 4 there"), "{error}");
}

#[test]
fn a_saved_adapter_is_evaluated_with_its_own_options() {
    let site = Site::new();
    let config = site.config(&[]);
    let (_, trained) = train(&config);
    // The recipe for evaluation says nothing of the adapter.
    let plain = site.config(&["adapter.r=2", "adapter.targets=[q_proj]"]);
    let base = Base::resolve(&plain, &()).unwrap();
    let data = base.dataset(DataOptions::eval(&plain), &(), "eval").unwrap();
    let saved = config.output.join("adapter");
    let loss = |choice| {
        let loaded = LoadedModel::load(&plain, &base, choice).unwrap();
        evaluate(&loaded.model, data.batches(plain.seed, 0)).unwrap().loss
    };
    assert_eq!(loss(AdapterChoice::Saved(&saved)), trained.summary.eval_after.unwrap().loss);
    assert_eq!(loss(AdapterChoice::Start), trained.summary.eval_before.unwrap().loss);
    assert_eq!(loss(AdapterChoice::Recipe), trained.summary.eval_before.unwrap().loss);
}

#[test]
fn gradient_checkpointing_trains_to_the_same_adapter() {
    let site = Site::new();
    let (_, plain) = train(&site.config(&[]));
    let output = format!("output={}", site.path("checkpointed").display());
    let (_, checkpointed) = train(&site.config(&["gradient_checkpointing=block", &output]));
    for (a, b) in factors(&plain.model).iter().flatten().zip(factors(&checkpointed.model).iter().flatten()) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
}
