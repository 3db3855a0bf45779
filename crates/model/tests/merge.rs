//! Adapters merged into their models, beside what PEFT makes of them.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::directory::{Tensors, read_tensors, write};
use common::*;
use emberlora_lora::peft;
use emberlora_model::export::{ExportError, MergeOptions, merge};
use emberlora_model::{CausalLm, FloatDtype, Input, LoadOptions, QuantizationOptions};
use emberlora_quant::{BlockSize, QuantKind, Scheme};
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

const CASES: [&str; 6] = ["rslora", "patterns", "fused", "tied", "biases", "head"];
/// How far numbers may lie from PEFT's, which adds them up in another order.
const TOLERANCE: f32 = 1e-4;

struct Case {
    model: PathBuf,
    adapter: PathBuf,
    name: String,
    expected: Tensors,
}

fn case(name: &str) -> Case {
    let dir = fixture("merge").join(name);
    let case = json_of(&dir.join("case.json"));
    let path = |key: &str| fixture(case[key].as_str().unwrap());
    let expected = read_tensors(&dir.join("merged.safetensors"));
    Case { model: path("model"), adapter: path("adapter"), name: case["model"].as_str().unwrap().to_owned(), expected }
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn values(tensors: &Tensors, name: &str) -> Vec<f32> {
    let (_, dtype, _, bytes) = tensors.iter().find(|tensor| tensor.0 == name).unwrap_or_else(|| panic!("no {name}"));
    assert_eq!(*dtype, Dtype::F32, "{name}");
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn merged(model: &Path, adapter: &Path, options: &MergeOptions) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    merge(model, adapter, &dir.path().join("out"), options, &mut ()).unwrap();
    dir
}

fn out(dir: &TempDir) -> PathBuf {
    dir.path().join("out")
}

fn input(model: &CausalLm, ids: &[u32]) -> Input {
    Input::unpacked(ROWS, SEQ, ids, &model.device()).unwrap()
}

/// The logits of a model with its adapter beside it.
fn adapted(model: &Path, adapter: &Path, options: &LoadOptions, ids: &[u32]) -> Vec<f32> {
    let (mut model, _) = load_dir(model, options);
    let device = model.device();
    peft::apply(&mut model, &peft::load(adapter).unwrap(), &device).unwrap();
    logits(&model, &input(&model, ids))
}

fn nf4() -> QuantizationOptions {
    QuantizationOptions::new(Scheme::new(QuantKind::Nf4, BlockSize::default(), true), vec!["lm_head".into()], 6.0)
}

#[test]
fn weights_and_logits_are_those_of_pefts_merge_and_unload() {
    for name in CASES {
        let Case { model, adapter, name: family, expected } = case(name);
        let dir = merged(&model, &adapter, &MergeOptions::default());
        let tensors = read_tensors(&out(&dir).join("model.safetensors"));
        for (tensor, ..) in expected.iter().filter(|tensor| tensor.0 != "logits") {
            let what = format!("{tensor} in {name}");
            assert_close(&values(&tensors, tensor), &values(&expected, tensor), TOLERANCE, &what);
        }
        let (ids, _) = golden(&family);
        let (merged, _) = load_dir(&out(&dir), &OPTIONS);
        let ours = logits(&merged, &input(&merged, &ids));
        assert_close(&ours, &values(&expected, "logits"), TOLERANCE, name);
        assert_eq!(json_of(&out(&dir).join("config.json")), json_of(&model.join("config.json")), "{name}");
    }
}

#[test]
fn tensors_without_an_adapter_are_the_same_bytes() {
    let Case { model, adapter, .. } = case("patterns");
    let dir = merged(&model, &adapter, &MergeOptions::default());
    let (before, after) =
        (read_tensors(&model.join("model.safetensors")), read_tensors(&out(&dir).join("model.safetensors")));
    assert_eq!(before.len(), after.len());
    for (before, after) in before.iter().zip(&after) {
        let is_adapted = ["q_proj", "v_proj", "down_proj"].iter().any(|name| before.0.contains(name));
        assert_eq!(before.0, after.0);
        assert_eq!(before == after, !is_adapted, "{}", before.0);
    }
}

#[test]
fn an_adapted_head_is_untied_from_the_embedding() {
    let (ids, _) = golden("qwen2");
    let dir = tempfile::tempdir().unwrap();
    let adapter = dir.path().join("adapter");
    fs::create_dir(&adapter).unwrap();
    let factor = |name: &str, rows: usize, columns: usize| {
        let numbers = (0..rows * columns).map(|index| ((index * 37 % 19) as f32 - 9.0) / 20.0);
        let bytes = numbers.flat_map(f32::to_le_bytes).collect::<Vec<_>>();
        (format!("base_model.model.lm_head.lora_{name}.weight"), Dtype::F32, vec![rows, columns], bytes)
    };
    write(&adapter.join("adapter_model.safetensors"), &[factor("A", 3, 32), factor("B", VOCAB, 3)]);
    let config = json!({"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["lm_head"]});
    fs::write(adapter.join("adapter_config.json"), config.to_string()).unwrap();

    let model = fixture("qwen2");
    merge(&model, &adapter, &out(&dir), &MergeOptions::default(), &mut ()).unwrap();
    assert_eq!(json_of(&out(&dir).join("config.json"))["tie_word_embeddings"], false);
    let (before, after) =
        (read_tensors(&model.join("model.safetensors")), read_tensors(&out(&dir).join("model.safetensors")));
    assert_eq!(before.len() + 1, after.len());
    let embedding = |tensors: &Tensors| values(tensors, "model.embed_tokens.weight");
    assert_eq!(embedding(&before), embedding(&after));
    assert_ne!(values(&after, "lm_head.weight"), embedding(&after));
    let (merged, _) = load_dir(&out(&dir), &OPTIONS);
    let expected = adapted(&model, &adapter, &OPTIONS, &ids);
    assert_close(&logits(&merged, &input(&merged, &ids)), &expected, TOLERANCE, "an adapted head");
}

#[test]
fn a_packed_base_is_dequantised_whether_the_files_or_the_options_say_so() {
    let Case { adapter, .. } = case("rslora");
    let (ids, _) = golden("llama");
    let options = MergeOptions::new(Some(nf4()), None);
    let from_dense = merged(&fixture("llama"), &adapter, &options);
    let from_packed = merged(&fixture("quant/llama_nf4_double"), &adapter, &MergeOptions::default());
    let tensors = |dir: &TempDir| read_tensors(&out(dir).join("model.safetensors"));
    assert_eq!(tensors(&from_dense), tensors(&from_packed));
    let config = json_of(&out(&from_packed).join("config.json"));
    assert_eq!(config.get("quantization_config"), None);
    assert_eq!(config["dtype"], "float32");

    let (model, _) = load_dir(&out(&from_packed), &OPTIONS);
    let expected = adapted(&fixture("llama"), &adapter, &LoadOptions { quantization: Some(nf4()), ..OPTIONS }, &ids);
    assert_close(&logits(&model, &input(&model, &ids)), &expected, TOLERANCE, "the adapter on the packed base");
}

#[test]
fn options_that_differ_from_a_packed_directory_are_refused() {
    let Case { adapter, .. } = case("rslora");
    let dir = tempfile::tempdir().unwrap();
    let options = MergeOptions::new(Some(nf4()), None);
    let error = merge(&fixture("quant/llama_fp4"), &adapter, &out(&dir), &options, &mut ()).unwrap_err();
    assert!(error.is_wrong_input() && error.to_string().contains("fp4"), "{error}");
}

#[test]
fn a_result_is_rounded_once_to_the_format_that_is_asked_for() {
    let Case { model, adapter, .. } = case("rslora");
    let exact = merged(&model, &adapter, &MergeOptions::default());
    let exact = read_tensors(&out(&exact).join("model.safetensors"));
    for (dtype, stored, name) in [(FloatDtype::Bf16, Dtype::BF16, "bfloat16"), (FloatDtype::F16, Dtype::F16, "float16")]
    {
        let dir = merged(&model, &adapter, &MergeOptions::new(None, Some(dtype)));
        let rounded = read_tensors(&out(&dir).join("model.safetensors"));
        for (exact, rounded) in exact.iter().zip(&rounded) {
            assert_eq!((&exact.0, stored, &exact.2), (&rounded.0, rounded.1, &rounded.2));
            let expected = emberlora_quant::convert(&exact.3, FloatDtype::F32, dtype).unwrap();
            assert_eq!(&expected[..], rounded.3, "{} in {dtype}", exact.0);
        }
        assert_eq!(json_of(&out(&dir).join("config.json"))["dtype"], name);
    }
}

/// The rsLoRA case with the tensors of its adapter changed.
fn broken_adapter(change: impl FnOnce(&mut Tensors)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let from = case("rslora").adapter;
    fs::copy(from.join("adapter_config.json"), dir.path().join("adapter_config.json")).unwrap();
    let mut tensors = read_tensors(&from.join("adapter_model.safetensors"));
    change(&mut tensors);
    write(&dir.path().join("adapter_model.safetensors"), &tensors);
    dir
}

#[test]
fn an_adapter_that_does_not_fit_is_refused_and_nothing_is_left_behind() {
    let refused = |model: &str, adapter: &Path, options: &MergeOptions| {
        let dir = tempfile::tempdir().unwrap();
        let error = merge(&fixture(model), adapter, &out(&dir), options, &mut ()).unwrap_err();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{error}");
        assert!(error.is_wrong_input(), "{error}");
        error
    };
    let default = MergeOptions::default();
    let error = refused("llama", &case("fused").adapter, &default);
    assert!(matches!(error, ExportError::Adapter { .. }), "{error}");
    let error = refused("llama", Path::new("no/such/adapter"), &default).to_string();
    assert!(error.contains("no/such/adapter"), "{error}");

    let missing = broken_adapter(|tensors| drop(tensors.pop()));
    let error = refused("llama", missing.path(), &default).to_string();
    assert!(error.contains("lora_B"), "{error}");

    let set = |value: f32| {
        broken_adapter(move |tensors| {
            let b = tensors.iter_mut().find(|tensor| tensor.0.contains("layers.1.mlp.up_proj.lora_B")).unwrap();
            b.3[..4].copy_from_slice(&value.to_le_bytes());
        })
    };
    let error = refused("llama", set(f32::NAN).path(), &default);
    assert!(matches!(&error, ExportError::Unstorable { row: 0, column: 0, .. }), "{error}");
    assert!(error.to_string().contains("`model.layers.1.mlp.up_proj.weight` would hold NaN"), "{error}");
    let error = refused("llama", set(1e7).path(), &MergeOptions::new(None, Some(FloatDtype::F16))).to_string();
    assert!(error.contains("f16 cannot store"), "{error}");
}

#[test]
fn the_head_that_an_adapter_was_trained_on_must_be_the_models() {
    let Case { model, adapter, .. } = case("head");
    let dir = tempfile::tempdir().unwrap();
    fs::copy(model.join("config.json"), dir.path().join("config.json")).unwrap();
    let mut tensors = read_tensors(&model.join("model.safetensors"));
    let head = tensors.iter_mut().find(|tensor| tensor.0 == "lm_head.weight").unwrap();
    head.3[..4].copy_from_slice(&3f32.to_le_bytes());
    write(&dir.path().join("model.safetensors"), &tensors);
    let error = merge(dir.path(), &adapter, &out(&dir), &MergeOptions::default(), &mut ()).unwrap_err().to_string();
    assert!(error.contains("lm_head.base_layer.weight"), "{error}");
}
