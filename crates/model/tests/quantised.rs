//! Directories that transformers and bitsandbytes quantised, whole and damaged.

mod common;

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use common::directory::{Tensors, directory, find, read_tensors, write};
use common::packed::{nf4, packed, packing, quantised, refused, scheme, with_threshold};
use common::*;
use emberlora_model::{CausalLm, Input, LoadError, LoadOptions, LoadReport};
use emberlora_quant::{BlockSize, QuantKind, Scheme};
use proptest::prelude::*;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

/// `(ids, logits)` of a quantised fixture.
fn golden_of(name: &str, logits: &str) -> (Vec<u32>, Vec<f32>) {
    golden_tensor(&quantised(name), logits)
}

#[track_caller]
fn check_logits(dir: &Path, options: &LoadOptions, (ids, want): (Vec<u32>, Vec<f32>), tolerance: f32, what: &str) {
    let (model, _) = load_dir(dir, options);
    let input = Input::unpacked(ROWS, SEQ, &ids, &model.device()).unwrap();
    assert_close(&logits(&model, &input), &want, tolerance, what);
}

#[test]
fn quantised_directories_compute_what_transformers_computes() {
    for (name, logits) in
        [("llama_nf4_double", "logits"), ("llama_fp4", "logits"), ("llama_int8", "logits.dequantised")]
    {
        check_logits(&quantised(name), &OPTIONS, golden_of(name, logits), 1e-5, name);
    }
}

#[test]
fn activations_in_eight_bits_go_around_outliers_as_in_bitsandbytes() {
    let never = 1e4;
    for (logits, threshold) in [("logits.1.5", 1.5), ("logits.3.0", 3.0), ("logits", never)] {
        let golden = golden_of("llama_int8", logits);
        check_logits(&quantised("llama_int8"), &with_threshold(threshold), golden.clone(), 1e-3, logits);
        check_logits(&fixture("llama"), &with_threshold(threshold), golden, 1e-3, logits);
    }
}

#[test]
fn shards_are_packed_like_one_file() {
    let dir = directory(json!({}));
    let tensors = read_tensors(&quantised("llama_nf4_double").join("model.safetensors"));
    fs::copy(quantised("llama_nf4_double").join("config.json"), dir.path().join("config.json")).unwrap();
    let mut index = json!({"weight_map": {}});
    for (number, part) in tensors.chunks(tensors.len().div_ceil(3)).enumerate() {
        let name = format!("part-{number}.safetensors");
        write(&dir.path().join(&name), part);
        for tensor in part {
            index["weight_map"][&tensor.0] = json!(name);
        }
    }
    fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let whole = load_dir(&quantised("llama_nf4_double"), &OPTIONS).0;
    assert_eq!(packed(&load_dir(dir.path(), &OPTIONS).0), packed(&whole));
}

#[test]
fn a_recipe_and_a_quantised_directory_must_agree() {
    let agreeing: LoadReport = load_dir(&quantised("llama_nf4_double"), &nf4()).1;
    assert_eq!(agreeing.quantization, nf4().quantization);
    let refused = |dir: &str, options: &LoadOptions, words: &[&str]| {
        let (error, text) = refused(&quantised(dir), options);
        assert!(matches!(error, LoadError::Quantization { .. }), "{text}");
        for word in words.iter().chain(&["as `quantization` says"]) {
            assert!(text.contains(word), "{word} is not in: {text}");
        }
    };
    let head = &["lm_head"];
    let fp4 = packing(scheme(QuantKind::Fp4, true), head);
    refused("llama_nf4_double", &fp4, &["config.json", "bnb_4bit_quant_type", "is nf4; expected fp4"]);
    let plain = packing(scheme(QuantKind::Nf4, false), head);
    refused("llama_nf4_double", &plain, &["bnb_4bit_use_double_quant", "is true; expected false"]);
    refused("llama_int8", &nf4(), &["load_in_8bit", "is true (int8); expected false (nf4)"]);
    refused("llama_fp4", &packing(Scheme::Int8, head), &["load_in_8bit", "is false (fp4); expected true (int8)"]);
    let blocks = packing(Scheme::new(QuantKind::Nf4, BlockSize::try_from(128).unwrap(), true), head);
    let q_proj = "`model.layers.0.self_attn.q_proj.weight` is ";
    refused("llama_nf4_double", &blocks, &[q_proj, "blocks of 64", "expected nf4 in blocks of 128"]);
    let skip = packing(scheme(QuantKind::Nf4, true), &["lm_head", "q_proj"]);
    refused("llama_nf4_double", &skip, &[q_proj, "packed in nf4; expected dense"]);
    let all = packing(scheme(QuantKind::Nf4, true), &[]);
    refused("llama_nf4_double", &all, &["`lm_head.weight` is dense; expected packed in nf4"]);
    // What it computes with INT8 weights is not a property of the directory.
    load_dir(&quantised("llama_int8"), &with_threshold(2.5));
}

/// A quantised fixture with its tensors and its configuration changed.
fn changed(name: &str, change: impl FnOnce(&mut Tensors, &mut Value)) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut tensors = read_tensors(&quantised(name).join("model.safetensors"));
    let mut config = serde_json::from_slice(&fs::read(quantised(name).join("config.json")).unwrap()).unwrap();
    change(&mut tensors, &mut config);
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    write(&dir.path().join("model.safetensors"), &tensors);
    dir
}

#[test]
fn a_directory_that_contradicts_its_configuration_is_refused() {
    let check = |dir: TempDir, words: &[&str]| {
        let (_, text) = refused(dir.path(), &OPTIONS);
        for word in words {
            assert!(text.contains(word), "{word} is not in: {text}");
        }
    };
    let says = "as `quantization_config` of config.json says";
    let set = |key: &'static str, value: Value| {
        changed("llama_nf4_double", move |_, config| config["quantization_config"][key] = value)
    };
    check(set("bnb_4bit_quant_type", json!("fp4")), &["is nf4 in blocks of 64", "expected fp4", says]);
    check(set("bnb_4bit_use_double_quant", json!(false)), &[".weight` is nf4", says]);
    check(
        set("llm_int8_skip_modules", json!(["lm_head", "q_proj"])),
        &["q_proj.weight` is packed in nf4; expected dense", says],
    );
    check(set("llm_int8_skip_modules", json!([])), &["`lm_head.weight` is dense; expected packed", says]);
    check(set("quant_method", json!("gptq")), &["quantization_config.quant_method", "gptq", "bitsandbytes"]);
    let unknown = changed("llama_fp4", |_, config| drop(config.as_object_mut().unwrap().remove("quantization_config")));
    check(unknown, &["config.json: `quantization_config` is missing", "the files hold quantised weights"]);
    let dense = directory(json!({"quantization_config": {"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}}));
    fs::copy(fixture("llama").join("model.safetensors"), dir_file(&dense)).unwrap();
    check(dense, &["down_proj.weight` is dense; expected packed in nf4", says]);
}

fn dir_file(dir: &TempDir) -> std::path::PathBuf {
    dir.path().join("model.safetensors")
}

#[test]
fn weights_that_do_not_agree_among_themselves_are_refused() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let dir = changed("llama_fp4", |tensors, _| {
        let (_, _, shape, data) = find(tensors, &format!("{name}.absmax"));
        shape[0] /= 2;
        data.truncate(shape[0] * 4);
        set_state(tensors, name, "fp4", |state| state["blocksize"] = json!(128));
    });
    let text = refused(dir.path(), &OPTIONS).1;
    assert!(text.contains(name) && text.contains("blocks of 128; expected fp4 in blocks of 64"), "{text}");
}

fn set_state(tensors: &mut Tensors, weight: &str, kind: &str, change: impl FnOnce(&mut Value)) {
    let (_, _, shape, data) = find(tensors, &format!("{weight}.quant_state.bitsandbytes__{kind}"));
    let mut state: Value = serde_json::from_slice(data).unwrap();
    change(&mut state);
    *data = state.to_string().into_bytes();
    *shape = vec![data.len()];
}

const UP_PROJ: &str = "model.layers.1.mlp.up_proj.weight";

/// Damages `llama_nf4_double` and expects an error that names the damaged tensor and says `says`.
#[track_caller]
fn damaged(part: &str, says: &str, damage: impl FnOnce(&mut Tensors)) {
    let dir = changed("llama_nf4_double", |tensors, _| damage(tensors));
    let (_, text) = refused(dir.path(), &OPTIONS);
    assert!(text.contains(&format!("{UP_PROJ}{part}")) && text.contains(says), "{text}");
}

fn cut(tensors: &mut Tensors, part: &str, by: usize) {
    let (_, dtype, shape, data) = find(tensors, &format!("{UP_PROJ}{part}"));
    data.truncate(data.len() - by * dtype.bitsize() / 8);
    shape[0] -= by;
}

#[test]
fn damaged_packed_weights_are_refused_by_name() {
    let state = ".quant_state.bitsandbytes__nf4";
    damaged(state, "truncated", |tensors| cut(tensors, state, 20));
    damaged(state, "quantised format `nf5`", |tensors| {
        set_state(tensors, UP_PROJ, "nf4", |state| state["quant_type"] = json!("nf5"));
    });
    damaged(".quant_state.bitsandbytes__nf5", "`nf5`", |tensors| {
        find(tensors, &format!("{UP_PROJ}{state}")).0 = format!("{UP_PROJ}.quant_state.bitsandbytes__nf5");
    });
    damaged(".nested_quant_map", "expected 256", |tensors| cut(tensors, ".nested_quant_map", 1));
    damaged(".nested_absmax", "expected 1", |tensors| cut(tensors, ".nested_absmax", 1));
    damaged(".absmax", "expected 16", |tensors| {
        set_state(tensors, UP_PROJ, "nf4", |state| state["blocksize"] = json!(128));
    });
    damaged(".absmax", "is missing", |tensors| tensors.retain(|tensor| tensor.0 != format!("{UP_PROJ}.absmax")));
    damaged(state, "is missing", |tensors| {
        tensors.retain(|tensor| tensor.0 != format!("{UP_PROJ}{state}") && tensor.0 != format!("{UP_PROJ}.absmax"));
    });
    damaged("", "bytes; expected 1024", |tensors| cut(tensors, "", 8));
    damaged("", "missing (1)", |tensors| tensors.retain(|tensor| tensor.0 != UP_PROJ));
    damaged("", "expected [64, 32], found [32, 64]", |tensors| {
        set_state(tensors, UP_PROJ, "nf4", |state| state["shape"] = json!([32, 64]));
    });
}

#[test]
fn parts_of_no_projection_are_unused() {
    let dir = changed("llama_nf4_double", |tensors, _| {
        tensors.push(("model.layers.7.mlp.up_proj.weight.absmax".to_owned(), Dtype::U8, vec![1], vec![0]));
    });
    let text = refused(dir.path(), &OPTIONS).1;
    assert!(text.contains("unused (1)") && text.contains("layers.7.mlp.up_proj.weight.absmax"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Loading damaged bytes is an error or a model, never a panic.
    #[test]
    fn damage_is_never_a_panic(at in any::<prop::sample::Index>(), to in any::<u8>(), in_header in any::<bool>()) {
        for name in ["llama_nf4_double", "llama_int8"] {
            let dir = tempfile::tempdir().unwrap();
            fs::copy(quantised(name).join("config.json"), dir.path().join("config.json")).unwrap();
            let mut bytes = fs::read(quantised(name).join("model.safetensors")).unwrap();
            let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let at = if in_header { at.index(header + 8) } else { header + 8 + at.index(bytes.len() - header - 8) };
            bytes[at] = to;
            fs::write(dir_file(&dir), bytes).unwrap();
            drop(CausalLm::load(dir.path(), &OPTIONS, &Device::flex()));
        }
    }
}
