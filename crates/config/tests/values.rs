//! Right recipes: what each way of writing a value means.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use emberlora_config::*;

const MINIMAL: &str = "model: {source: m}\ndata: {train: d.jsonl}\n";

fn parse(recipe: &str, overrides: &[&str]) -> RunConfig {
    let overrides: Vec<_> = overrides.iter().map(|argument| (*argument).to_owned()).collect();
    RunConfig::parse(recipe, "recipes/demo.yaml", &overrides).unwrap_or_else(|error| panic!("{error}"))
}

fn with(overrides: &[&str]) -> RunConfig {
    parse(MINIMAL, overrides)
}

fn source(path: &str, format: DataFormat, weight: f64) -> DataSource {
    DataSource::new(PathBuf::from(path), format, weight)
}

#[test]
fn defaults_fill_in_every_key() {
    let recipe = "\
model:
  source: m
  revision: main
  dtype: auto
  compute_dtype: auto
  attention: fused
adapter:
  kind: lora
  r: 16
  alpha: 32
  dropout: 0.0
  targets: all-linear
  exclude: []
  layers: null
  rank_pattern: {}
  alpha_pattern: {}
  rslora: false
  init_from: null
  task_type: CAUSAL_LM
quantization: null
gradient_checkpointing: none
data:
  train: d.jsonl
  eval: null
  format: auto
  chat_template: auto
  loss_on: assistant
  max_seq_len: 1024
  overflow: truncate
  packing: true
  share_prefix: auto
  shuffle: true
train:
  epochs: 1
  max_steps: null
  batch_size: 8
  grad_accumulation: 1
  learning_rate: 2.0e-4
  schedule: {kind: cosine, warmup_ratio: 0.03, min_ratio: 0.0}
  optimizer: {kind: adamw, betas: [0.9, 0.999], eps: 1.0e-8, weight_decay: 0.0}
  max_grad_norm: 1.0
  eval_every: null
  save_every: null
  log_every: 1
output: runs/demo
device: auto
seed: 42
";
    assert_eq!(parse(recipe, &[]), with(&[]));
    assert_eq!(with(&[]).output, PathBuf::from("runs/demo"));
}

#[test]
fn a_section_with_nothing_under_it_has_its_defaults() {
    assert_eq!(parse("model: {source: m}\nadapter:\ntrain:\n  schedule:\ndata: {train: d.jsonl}\n", &[]), with(&[]));
}

#[test]
fn names_used_by_transformers_are_understood() {
    for name in ["sdpa", "flash_attention_2", "fused"] {
        assert_eq!(with(&[&format!("model.attention={name}")]).model.attention, Attention::Fused);
    }
    assert_eq!(with(&["model.attention=eager"]).model.attention, Attention::Eager);
    assert_eq!(with(&["model.dtype=bfloat16"]).model.dtype, Dtype::Bf16);
}

#[test]
fn gradient_checkpointing_is_a_name_a_boolean_or_a_number_of_blocks() {
    let four = NonZeroUsize::new(4).expect("not zero");
    for (value, expected) in [
        ("none", GradientCheckpointing::None),
        ("false", GradientCheckpointing::None),
        ("block", GradientCheckpointing::Block),
        ("true", GradientCheckpointing::Block),
        ("sqrt", GradientCheckpointing::Sqrt),
        ("{every: 4}", GradientCheckpointing::Every(four)),
    ] {
        let config = with(&[&format!("gradient_checkpointing={value}")]);
        assert_eq!(config.gradient_checkpointing, expected, "{value}");
    }
    let config = parse(&format!("{MINIMAL}gradient_checkpointing: none\n"), &["gradient_checkpointing.every=4"]);
    assert_eq!(config.gradient_checkpointing, GradientCheckpointing::Every(four));
}

#[test]
fn quantization_is_off_or_a_kind_with_its_defaults() {
    assert_eq!(with(&[]).quantization, None);
    assert_eq!(with(&["quantization=null"]).quantization, None);
    let defaults = |kind| QuantizationSection::new(kind, true, 64, vec!["lm_head".to_owned()], 6.0);
    for kind in [QuantizationKind::Nf4, QuantizationKind::Fp4, QuantizationKind::Int8] {
        let expected = Some(defaults(kind));
        assert_eq!(with(&[&format!("quantization={{kind: {kind}}}")]).quantization, expected);
        assert_eq!(with(&[&format!("quantization.kind={kind}")]).quantization, expected);
    }
    let recipe = "\
model: {source: m}
quantization:
  kind: fp4
  double_quant: false
  block_size: 128
  skip: [lm_head, layers.0.mlp]
data: {train: d.jsonl}
";
    let skip = vec!["lm_head".to_owned(), "layers.0.mlp".to_owned()];
    let section = QuantizationSection::new(QuantizationKind::Fp4, false, 128, skip, 6.0);
    assert_eq!(parse(recipe, &[]).quantization, Some(section));

    let int8 = with(&["quantization={kind: int8, threshold: 0, skip: []}"]).quantization;
    let section = QuantizationSection { skip: Vec::new(), threshold: 0.0, ..defaults(QuantizationKind::Int8) };
    assert_eq!(int8, Some(section));
}

#[test]
fn targets_are_a_word_a_list_or_a_regular_expression() {
    let targets = |value: &str| with(&[&format!("adapter.targets={value}")]).adapter.targets;
    assert_eq!(targets("all-linear"), Targets::AllLinear);
    assert_eq!(targets("[q_proj, v_proj]"), Targets::Suffixes(vec!["q_proj".to_owned(), "v_proj".to_owned()]));
    assert_eq!(targets(r".*\.(q|v)_proj"), Targets::Regex(r".*\.(q|v)_proj".to_owned()));
    assert_eq!(targets("q_proj"), Targets::Regex("q_proj".to_owned()));

    let exclude = |value: &str| with(&[&format!("adapter.exclude={value}")]).adapter.exclude;
    assert_eq!(exclude("[lm_head]"), Exclude::Suffixes(vec!["lm_head".to_owned()]));
    assert_eq!(exclude(".*mlp.*"), Exclude::Regex(".*mlp.*".to_owned()));
}

#[test]
fn layers_go_with_a_list_and_with_all_linear() {
    let config = with(&["adapter.layers=[0, 2]", "adapter.targets=[q_proj]"]);
    assert_eq!(config.adapter.layers, Some(vec![0, 2]));
    assert_eq!(with(&["adapter.layers=[1]"]).adapter.layers, Some(vec![1]));
}

#[test]
fn patterns_keep_the_order_of_the_file() {
    let recipe = format!("{MINIMAL}adapter:\n  rank_pattern:\n    z: 1\n    'a.*': 2\n    m: 3\n");
    let ranks = parse(&recipe, &["adapter.rank_pattern.b=4"]).adapter.rank_pattern;
    let ranks: Vec<_> = ranks.iter().map(|(name, rank)| (name.as_str(), *rank)).collect();
    assert_eq!(ranks, [("z", 1), ("a.*", 2), ("m", 3), ("b", 4)]);
}

#[test]
fn training_data_is_a_path_or_a_list_of_paths_and_mappings() {
    let auto = DataFormat::Auto;
    assert_eq!(with(&[]).data.train, [source("d.jsonl", auto, 1.0)]);
    let data = with(&["data.train=[a, {path: b}, {path: c, format: text, weight: 2}]", "data.eval=e"]).data;
    assert_eq!(data.train, [source("a", auto, 1.0), source("b", auto, 1.0), source("c", DataFormat::Text, 2.0)]);
    assert_eq!(data.eval, [source("e", auto, 1.0)]);
    assert_eq!(with(&["data.eval=[]"]).data.eval, []);
}

#[test]
fn a_source_without_a_format_takes_that_of_the_section() {
    let data = with(&["data.format=chat", "data.train=[a, {path: b, format: text}]", "data.eval=e"]).data;
    assert_eq!(data.train, [source("a", DataFormat::Chat, 1.0), source("b", DataFormat::Text, 1.0)]);
    assert_eq!(data.eval, [source("e", DataFormat::Chat, 1.0)]);
}

#[test]
fn chat_templates_are_names_or_jinja_files() {
    let template = |value: &str| with(&[&format!("data.chat_template={value}")]).data.chat_template;
    assert_eq!(template("auto"), ChatTemplateChoice::Auto);
    assert_eq!(template("llama3"), ChatTemplateChoice::Llama3);
    assert_eq!(template("t/my.jinja"), ChatTemplateChoice::File(PathBuf::from("t/my.jinja")));
}

#[test]
fn warm_up_is_a_ratio_or_a_number_of_steps() {
    let warmup = |overrides: &[&str]| with(overrides).train.schedule.warmup;
    assert_eq!(warmup(&[]), Warmup::Ratio(0.03));
    assert_eq!(warmup(&["train.schedule.warmup_ratio=0.5"]), Warmup::Ratio(0.5));
    assert_eq!(warmup(&["train.schedule.warmup_ratio=null"]), Warmup::Ratio(0.0));
    assert_eq!(warmup(&["train.schedule.warmup_steps=10"]), Warmup::Steps(10));
    assert_eq!(warmup(&["train.schedule.warmup_steps=0"]), Warmup::Steps(0));
    assert_eq!(warmup(&["train.schedule={kind: linear, warmup_steps: 5, warmup_ratio: null}"]), Warmup::Steps(5));
}

#[test]
fn devices_are_named_with_an_optional_number() {
    let remote = |host: &str, index| DeviceChoice::Remote(RemoteAddress { host: host.to_owned(), port: 4000, index });
    for (value, expected) in [
        ("auto", DeviceChoice::Auto),
        ("flex", DeviceChoice::Flex),
        ("ndarray", DeviceChoice::NdArray),
        ("wgpu", DeviceChoice::Wgpu(None)),
        ("wgpu:1", DeviceChoice::Wgpu(Some(1))),
        ("cuda", DeviceChoice::Cuda(None)),
        ("cuda:0", DeviceChoice::Cuda(Some(0))),
        ("remote://gpu-1.local:4000", remote("gpu-1.local", 0)),
        ("remote://127.0.0.1:4000/2", remote("127.0.0.1", 2)),
        ("remote://[::1]:4000", remote("[::1]", 0)),
    ] {
        let device = with(&[&format!("device={value:?}")]).device;
        assert_eq!(device.all(), std::slice::from_ref(&expected));
        assert_eq!(device.to_string(), value);
        assert_eq!(value.parse(), Ok(expected));
    }
}

#[test]
fn several_devices_share_the_micro_batches_of_a_step() {
    let config = with(&["device=[cuda:0, remote://gpu:4000]", "train.grad_accumulation=2"]);
    assert_eq!(config.device.first(), &DeviceChoice::Cuda(Some(0)));
    assert_eq!(config.device.to_string(), "cuda:0, remote://gpu:4000");
    assert_eq!(with(&["device=[auto]"]).device, DeviceChoice::Auto.into());
}

#[test]
fn a_warmup_that_ends_within_the_run_goes_with_max_steps() {
    let train = with(&["train.max_steps=5", "train.schedule.warmup_steps=4"]).train;
    assert_eq!((train.max_steps, train.schedule.warmup), (Some(5), Warmup::Steps(4)));
    assert_eq!(with(&["train.schedule={kind: constant, min_ratio: 0}"]).train.schedule.min_ratio, 0.0);
}

#[test]
fn epochs_and_max_steps_may_both_be_given() {
    let train = with(&["train.epochs=3", "train.max_steps=10"]).train;
    assert_eq!((train.epochs, train.max_steps), (3.0, Some(10)));
}

#[test]
fn numbers_are_read_in_every_usual_form() {
    for (value, expected) in [("2e-4", 2e-4), ("2.0e-4", 2e-4), ("0.0002", 2e-4), ("1", 1.0), ("1E-3", 1e-3)] {
        assert_eq!(with(&[&format!("train.learning_rate={value}")]).train.learning_rate, expected, "{value}");
    }
    assert_eq!(with(&["seed=18446744073709551615"]).seed, u64::MAX);
    for (value, expected) in [("16", 16), ("16.0", 16), ("1.6e1", 16), ("65536", 65536)] {
        assert_eq!(with(&[&format!("adapter.r={value}")]).adapter.r, expected, "{value}");
    }
}

#[test]
fn words_that_old_yaml_takes_for_booleans_are_strings() {
    let config = with(&["model.revision=on", "adapter.targets=[y, no]", "model.source=off"]);
    assert_eq!(config.model.revision, "on");
    assert_eq!(config.model.source, "off");
    assert_eq!(config.adapter.targets, Targets::Suffixes(vec!["y".to_owned(), "no".to_owned()]));
    assert_eq!(with(&["model.revision='4e15273'"]).model.revision, "4e15273");
}

#[test]
fn anchors_and_merge_keys_work() {
    let recipe = "model: {source: m}\ndata:\n  train: [&a {path: a, weight: 2.0}, {<<: *a, path: b}]\n  eval: [*a]\n";
    let data = parse(recipe, &[]).data;
    assert_eq!(data.train, [source("a", DataFormat::Auto, 2.0), source("b", DataFormat::Auto, 2.0)]);
    assert_eq!(data.eval, [source("a", DataFormat::Auto, 2.0)]);
}

#[test]
fn later_overrides_win_and_reach_into_lists() {
    assert_eq!(with(&["seed=1", "seed=2"]).seed, 2);
    let list = "model: {source: m}\ndata: {train: [{path: a}, {path: b}]}\n";
    let train = parse(list, &["data.train.0.weight=3", "data.train.1=c", "data.train.2.path=d"]).data.train;
    let auto = DataFormat::Auto;
    assert_eq!(train, [source("a", auto, 3.0), source("c", auto, 1.0), source("d", auto, 1.0)]);
}

#[test]
fn overrides_make_sections_and_replace_them() {
    let config = parse("seed: 1\n", &["model.source=m", "data.train=d", "train.optimizer={eps: 1e-6}"]);
    assert_eq!(config.train.optimizer, Optimizer::new(OptimizerKind::AdamW, [0.9, 0.999], 1e-6, 0.0));
    let recipe = format!("{MINIMAL}train: {{schedule: {{kind: linear, min_ratio: 0.5}}}}\n");
    let schedule = parse(&recipe, &["train.schedule={warmup_steps: 1}"]).train.schedule;
    assert_eq!(schedule, Schedule::new(ScheduleKind::Cosine, Warmup::Steps(1), 0.0));
}

#[test]
fn an_override_may_hold_an_equals_sign() {
    assert_eq!(with(&["output=runs/lr=1"]).output, PathBuf::from("runs/lr=1"));
}

#[test]
fn a_number_sign_that_begins_no_comment_is_part_of_the_value() {
    for (value, expected) in
        [("a#b", "a#b"), ("'a #b'", "a #b"), ("\"a #b\"", "a #b"), ("it's#1", "it's#1"), ("'#'", "#")]
    {
        assert_eq!(with(&[&format!("output={value}")]).output, PathBuf::from(expected), "{value}");
    }
    assert_eq!(with(&["adapter.targets=|-\n  a #b"]).adapter.targets, Targets::Regex("a #b".to_owned()));
}

#[test]
fn a_name_with_dots_is_set_with_its_mapping() {
    let ranks = with(&["adapter.rank_pattern={layers.0.self_attn.q_proj: 4}"]).adapter.rank_pattern;
    assert_eq!(ranks.get("layers.0.self_attn.q_proj"), Some(&4));
}

#[test]
fn a_recipe_is_loaded_from_its_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("my run.yaml");
    std::fs::write(&path, format!("\u{feff}{MINIMAL}").replace('\n', "\r\n")).expect("written");
    let config = RunConfig::load(&path, &["adapter.r=2".to_owned()]).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(config.output, PathBuf::from("runs/my run"));
    assert_eq!(config.adapter.r, 2);
}
