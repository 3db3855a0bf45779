//! A base in 4 and 8 bits, from training to text, and quantised directories that are damaged.

use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use serde_json::{Value, json};

use crate::{QUICKSTART, emberlora, json_lines, set};

const NF4: &str = "quantization={kind: nf4}";

#[test]
fn an_adapter_trained_on_a_packed_base_is_evaluated_and_writes() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    let ran = emberlora(&["train", QUICKSTART, NF4, "train.max_steps=5", &set("output", &output)]);
    assert!(ran.stderr.contains("parameters in nf4 in blocks of 64, double quantised: "), "{}", ran.stderr);
    ran.ok();
    let adapter = output.join("adapter");
    let adapter = adapter.to_str().unwrap();
    let metrics = json_lines(&fs::read_to_string(output.join("metrics.jsonl")).unwrap());
    let after = metrics.iter().rfind(|line| line["split"] == "eval").unwrap()["loss"].as_f64().unwrap();

    let eval = |args: &[&str]| -> f64 {
        let text = emberlora(&[&["eval", QUICKSTART, "--json", "--adapter", adapter], args].concat()).ok();
        serde_json::from_str::<Value>(&text).unwrap()["loss"].as_f64().unwrap()
    };
    assert_eq!(eval(&[NF4]), after);
    let dense = eval(&[]);
    assert!(dense != after && (dense - after).abs() < 0.2, "{dense} {after}");
    for quantization in [NF4, "quantization=null", "quantization={kind: int8}"] {
        let args = ["generate", "--recipe", QUICKSTART, quantization, "--adapter", adapter, "--max-new-tokens", "8"];
        assert!(!emberlora(&[&args[..], &["--chat", "Hello"]].concat()).ok().trim().is_empty());
    }
}

type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A quantised fixture with the quickstart's tokenizer and with its tensors changed.
fn changed(name: &str, change: impl FnOnce(&mut Tensors)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(fixture(name).join("config.json"), dir.path().join("config.json")).unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/quickstart/model");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(model.join(file), dir.path().join(file)).unwrap();
    }
    let bytes = fs::read(fixture(name).join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let copy = |(name, view): (&str, TensorView<'_>)| {
        (name.to_owned(), view.dtype(), view.shape().to_vec(), view.data().to_vec())
    };
    let mut tensors: Tensors = file.iter().map(copy).collect();
    change(&mut tensors);
    let views =
        tensors.iter().map(|(name, dtype, shape, data)| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    fs::write(dir.path().join("model.safetensors"), serialize(views, None).unwrap()).unwrap();
    dir
}

const WEIGHT: &str = "model.layers.0.mlp.gate_proj.weight";

#[track_caller]
fn refused(dir: &Path, quantization: &str, words: &[&str]) {
    let source = set("model.source", dir);
    let args = ["generate", "--recipe", QUICKSTART, &source, quantization, "--prompt", "a", "--max-new-tokens", "1"];
    let message = emberlora(&args).fails(2);
    for word in words {
        assert!(message.contains(word), "{word} is not in: {message}");
    }
}

/// Changes one part of a weight of a quantised directory and expects exit code 2 with a message that names it.
#[track_caller]
fn damaged(part: &str, words: &[&str], change: impl FnOnce(&mut (String, Dtype, Vec<usize>, Vec<u8>))) {
    let name = format!("{WEIGHT}.{part}");
    let dir = changed("quant/llama_nf4_double", |tensors| {
        change(tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap());
    });
    refused(dir.path(), "quantization=null", &[&[WEIGHT], words].concat());
}

fn cut((_, dtype, shape, data): &mut (String, Dtype, Vec<usize>, Vec<u8>), to: usize) {
    shape[0] = to;
    data.truncate(to * dtype.bitsize() / 8);
}

/// Sets a key of a 4-bit weight's state.
fn state(key: &str, value: Value) -> impl FnOnce(&mut (String, Dtype, Vec<usize>, Vec<u8>)) {
    move |(_, _, shape, data)| {
        let mut state: Value = serde_json::from_slice(data).unwrap();
        state[key] = value;
        *data = state.to_string().into_bytes();
        *shape = vec![data.len()];
    }
}

const STATE: &str = "quant_state.bitsandbytes__nf4";

#[test]
fn damaged_quantised_directories_name_the_tensor() {
    damaged(STATE, &[STATE, "truncated"], |tensor| cut(tensor, 40));
    damaged(STATE, &["nf7"], state("quant_type", json!("nf7")));
    damaged("nested_quant_map", &["nested_quant_map", "expected 256"], |tensor| cut(tensor, 100));
    damaged(STATE, &["absmax", "expected 16"], state("blocksize", json!(128)));
    let without = changed("quant/llama_nf4_double", |tensors| {
        tensors.retain(|tensor| tensor.0 != format!("{WEIGHT}.absmax"));
    });
    refused(without.path(), "quantization=null", &[&format!("{WEIGHT}.absmax` is missing")]);
}

#[test]
fn a_directory_that_is_quantised_otherwise_names_what_differs() {
    let dir = changed("quant/llama_nf4_double", |_| {});
    refused(dir.path(), "quantization={kind: fp4}", &["bnb_4bit_quant_type", "nf4", "expected fp4"]);
    refused(
        dir.path(),
        "quantization={kind: nf4, block_size: 32}",
        &["q_proj.weight` is", "blocks of 64", "expected nf4 in blocks of 32"],
    );
}

#[test]
fn a_weight_that_cannot_be_packed_is_named() {
    let dir = changed("llama", |tensors| {
        let weight = tensors.iter_mut().find(|tensor| tensor.0 == WEIGHT).unwrap();
        weight.3[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    refused(dir.path(), NF4, &[WEIGHT, "NaN"]);
}
