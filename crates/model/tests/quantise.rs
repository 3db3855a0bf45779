//! Directories with packed weights, beside those that transformers and bitsandbytes write.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use common::directory::{read_tensors, write};
use common::fixture;
use emberlora_model::export::{ExportError, ExportProgress, quantise};
use emberlora_model::{FloatDtype, QuantizationOptions};
use emberlora_quant::{BlockSize, QuantKind, Scheme};
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn options(kind: QuantKind, double_quant: bool) -> QuantizationOptions {
    let threshold = if kind == QuantKind::Int8 { 0.0 } else { 6.0 };
    QuantizationOptions::new(Scheme::new(kind, BlockSize::default(), double_quant), vec!["lm_head".into()], threshold)
}

fn nf4() -> QuantizationOptions {
    options(QuantKind::Nf4, true)
}

fn run(dir: &Path, out: &Path, options: &QuantizationOptions) -> Result<(), ExportError> {
    quantise(dir, out, options, FloatDtype::F32, &mut ()).map(drop)
}

fn tensors(path: &Path) -> Tensors {
    read_tensors(path).into_iter().map(|(name, dtype, shape, data)| (name, (dtype, shape, data))).collect()
}

fn write_map(path: &Path, tensors: Tensors) {
    write(
        path,
        &tensors.into_iter().map(|(name, (dtype, shape, data))| (name, dtype, shape, data)).collect::<Vec<_>>(),
    );
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The llama fixture with its tensors and its configuration changed, in a directory of its own.
fn model(change: impl FnOnce(&mut Tensors, &mut Value)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = tensors(&fixture("llama").join("model.safetensors"));
    let mut config = json_of(&fixture("llama").join("config.json"));
    change(&mut tensors, &mut config);
    write_map(&dir.path().join("model.safetensors"), tensors);
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

const Q_PROJ: &str = "model.layers.1.self_attn.q_proj.weight";

#[test]
fn every_tensor_is_what_transformers_and_bitsandbytes_write() {
    for (name, options) in [
        ("llama_nf4_double", nf4()),
        ("llama_fp4", options(QuantKind::Fp4, false)),
        ("llama_int8", options(QuantKind::Int8, false)),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let (out, expected) = (folder.path().join("out"), fixture("quant").join(name));
        let report = quantise(&fixture("llama"), &out, &options, FloatDtype::F32, &mut ()).unwrap();
        let (ours, theirs) = (tensors(&out.join("model.safetensors")), tensors(&expected.join("model.safetensors")));
        assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{name}");
        for (tensor, theirs) in &theirs {
            assert_eq!(&ours[tensor], theirs, "{tensor} in {name}");
        }
        let mut source = json_of(&fixture("llama").join("config.json"));
        source["quantization_config"] = json_of(&expected.join("config.json"))["quantization_config"].take();
        assert_eq!(json_of(&out.join("config.json")), source, "{name}");

        assert_eq!(report.projections, 14);
        assert_eq!(report.files, [Path::new("model.safetensors")]);
        let bytes = |tensors: &Tensors| tensors.values().map(|(_, _, data)| data.len() as u64).sum::<u64>();
        assert_eq!(report.bytes_written, bytes(&theirs));
        assert_eq!(report.bytes_read, bytes(&tensors(&fixture("llama").join("model.safetensors"))));
    }
}

#[test]
fn shards_stay_shards_and_give_the_same_tensors() {
    let dir = model(|_, _| {});
    let single = dir.path().join("model.safetensors");
    let whole = tensors(&single);
    let shard = |number: usize| format!("model-0000{number}-of-00002.safetensors");
    let of = |name: &str| if name.contains("layers.0") { 1 } else { 2 };
    for number in [1, 2] {
        let part = whole.iter().filter(|(name, _)| of(name) == number);
        write_map(&dir.path().join(shard(number)), part.map(|(name, tensor)| (name.clone(), tensor.clone())).collect());
    }
    let map: BTreeMap<_, _> = whole.keys().map(|name| (name, shard(of(name)))).collect();
    fs::write(dir.path().join("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
    fs::remove_file(single).unwrap();
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();

    let out = dir.path().join("out");
    run(dir.path(), &out, &nf4()).unwrap();
    let mut names: Vec<_> = fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    let files = [&shard(1), &shard(2), "model.safetensors.index.json", "tokenizer.json"];
    assert_eq!(names, [&["config.json"], &files[..]].concat());

    let index = json_of(&out.join("model.safetensors.index.json"));
    let expected = tensors(&fixture("quant/llama_nf4_double").join("model.safetensors"));
    let weight_map = index["weight_map"].as_object().unwrap();
    assert_eq!(weight_map.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, tensor) in &expected {
        assert_eq!(&tensors(&out.join(weight_map[name].as_str().unwrap()))[name], tensor, "{name}");
    }
    let bytes: usize = expected.values().map(|(_, _, data)| data.len()).sum();
    assert_eq!(index["metadata"]["total_size"], bytes);
}

#[test]
fn skipped_projections_stay_dense_and_transformers_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let skip = vec!["model.layers.0".to_owned(), "down_proj".to_owned()];
    run(&fixture("llama"), &out, &QuantizationOptions { skip, ..nf4() }).unwrap();
    let written = tensors(&out.join("model.safetensors"));
    let source = tensors(&fixture("llama").join("model.safetensors"));
    for (name, dense) in &source {
        let is_norm = dense.1.len() == 1;
        let kept = name.contains("layers.0") || name.contains("down_proj") || name.contains("embed") || is_norm;
        assert_eq!(written[name] == *dense, kept, "{name}");
        assert_eq!(written.contains_key(&format!("{name}.nested_absmax")), !kept, "{name}");
    }
    // The head is a projection like any other once the list is one's own.
    assert_eq!(written["lm_head.weight"].0, Dtype::U8);
    let skipped = &json_of(&out.join("config.json"))["quantization_config"]["llm_int8_skip_modules"];
    assert_eq!(skipped, &json!(["model.layers.0", "down_proj"]));
}

#[test]
fn a_tied_head_stays_dense_whatever_is_skipped() {
    let dir = model(|tensors, config| {
        tensors.remove("lm_head.weight");
        config["tie_word_embeddings"] = json!(true);
    });
    let out = dir.path().join("out");
    run(dir.path(), &out, &QuantizationOptions { skip: vec!["q_proj".into()], ..nf4() }).unwrap();
    let written = tensors(&out.join("model.safetensors"));
    assert!(!written.contains_key("lm_head.weight"));
    assert_eq!(written["model.embed_tokens.weight"].0, Dtype::F32);
    let skipped = &json_of(&out.join("config.json"))["quantization_config"]["llm_int8_skip_modules"];
    assert_eq!(skipped, &json!(["q_proj", "lm_head"]));
}

#[test]
fn the_second_copy_of_a_tied_head_is_left_out() {
    let dir = model(|tensors, config| {
        let embedding = tensors["model.embed_tokens.weight"].clone();
        tensors.insert("lm_head.weight".into(), embedding);
        config["tie_word_embeddings"] = json!(true);
    });
    let out = dir.path().join("out");
    run(dir.path(), &out, &nf4()).unwrap();
    assert!(!tensors(&out.join("model.safetensors")).contains_key("lm_head.weight"));
}

#[test]
fn what_is_written_is_quantised_once_and_for_all() {
    let folder = tempfile::tempdir().unwrap();
    let error = run(&fixture("quant/llama_fp4"), &folder.path().join("out"), &nf4()).unwrap_err();
    assert!(matches!(error, ExportError::AlreadyQuantised { kind: QuantKind::Fp4, .. }), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_weight_that_is_not_a_number_is_named_and_nothing_is_left_behind() {
    let dir = model(|tensors, _| {
        let data = &mut tensors.get_mut(Q_PROJ).unwrap().2;
        data[4 * 33..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let error = run(dir.path(), &dir.path().join("out"), &nf4()).unwrap_err();
    assert!(error.is_wrong_input());
    let error = error.to_string();
    assert!(error.contains(&format!("`{Q_PROJ}` holds NaN at [1, 1]")), "{error}");
    let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["config.json", "model.safetensors"]);
}

#[test]
fn a_place_that_is_taken_is_refused_before_anything_is_read() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("mine"), "").unwrap();
    let nowhere = Path::new("no/such/model");
    for (out, says) in [(folder.path().to_owned(), "is not empty"), (folder.path().join("mine"), "not a directory")] {
        let error = run(nowhere, &out, &nf4()).unwrap_err();
        assert!(matches!(error, ExportError::Occupied { .. }) && error.to_string().contains(says), "{error}");
    }
    assert!(folder.path().join("mine").exists());
}

#[test]
fn names_that_transformers_would_read_as_expressions_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for name in [r"layers\.[01]", ".*q_proj", "(q|k)_proj", "q_proj$", "^lm_head"] {
        let options = QuantizationOptions { skip: vec![name.to_owned()], ..nf4() };
        let error = run(&fixture("llama"), &folder.path().join("out"), &options).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn it_can_be_called_off() {
    struct GiveUp(u64);
    impl ExportProgress for GiveUp {
        fn started(&mut self, _: u64) {}
        fn advanced(&mut self, bytes: u64) {
            self.0 += bytes;
        }
        fn finished(&mut self) {}
        fn is_cancelled(&self) -> bool {
            self.0 > 20_000
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let error = quantise(&fixture("llama"), &out, &nf4(), FloatDtype::F32, &mut GiveUp(0)).unwrap_err();
    assert!(matches!(error, ExportError::Interrupted { .. }) && !error.is_wrong_input(), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
