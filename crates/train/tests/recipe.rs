//! From a recipe to the files of a run.

mod common;

use std::fs;
use std::sync::atomic::AtomicBool;

use common::site::{Site, metrics, prepare_error, train};
use common::{factors, shorthand};
use emberlora_config::{DataFormat, DeviceChoice, Dtype, RunConfig};
use emberlora_data::DataOptions;
use emberlora_lora::peft;
use emberlora_train::{AdapterChoice, Base, Event, Listener, LoadedModel, PrepareError, Run, TrainError, evaluate};
use serde_json::Value;

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
    assert_eq!(resolved.device, DeviceChoice::Flex.into());
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
            Err(TrainError::Device { device: None, message: "full".to_owned() })
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
