//! Weight files that are not what they should be, and what a load reports about those that are.

mod common;

use std::fs;
use std::path::Path;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};
use common::directory::{Tensors, directory, find, read_tensors, write};
use common::*;
use emberlora_model::generate::{Finish, Generator, SamplingOptions};
use emberlora_model::{CausalLm, FloatDtype, Input, LoadError, LoadOptions};
use proptest::prelude::*;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

fn llama_tensors() -> Tensors {
    read_tensors(&fixture("llama").join("model.safetensors"))
}

/// The llama fixture with its tensors changed.
fn model(change: impl FnOnce(&mut Tensors)) -> TempDir {
    let dir = directory(json!({}));
    let mut tensors = llama_tensors();
    change(&mut tensors);
    write(&dir.path().join("model.safetensors"), &tensors);
    dir
}

fn refused(dir: &TempDir) -> (LoadError, String) {
    let error = CausalLm::load(dir.path(), &OPTIONS, &Device::flex()).unwrap_err();
    let text = error.to_string();
    (error, text)
}

const K_PROJ: &str = "model.layers.1.self_attn.k_proj.weight";

#[test]
fn nothing_requires_a_gradient() {
    struct Check(usize);
    impl ModuleVisitor for Check {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            assert!(!param.is_require_grad() && !param.val().is_require_grad() && !param.val().is_tracked());
            self.0 += 1;
        }
    }
    for name in FIXTURES {
        let (model, report) = CausalLm::load(&fixture(name), &OPTIONS, &Device::flex().autodiff()).unwrap();
        let mut check = Check(0);
        model.visit(&mut check);
        assert_eq!(check.0, report.tensors + usize::from(model.is_tied()));
        // Training mode turns on what was frozen only by accident.
        model.train().visit(&mut check);
    }
}

#[test]
fn a_model_in_the_format_of_its_file_is_not_copied() {
    for name in FIXTURES {
        let (model, report) = load_dir(&fixture(name), &OPTIONS);
        assert_eq!(report.converted_bytes, 0, "{name}");
        assert_eq!(report.mapped_bytes, 4 * report.parameters, "{name}");
        assert_eq!(model.num_base_parameters(), report.parameters);
        assert_eq!(report.ignored, [""; 0]);
    }
    let (model, report) = load_dir(&fixture("llama3"), &OPTIONS);
    assert!(model.is_tied());
    assert_eq!(report.parameters, load_dir(&fixture("llama"), &OPTIONS).1.parameters - 96 * 32);
}

#[test]
fn weights_stored_as_bf16_equal_weights_converted_to_bf16() {
    let narrow = model(|tensors| {
        for (_, dtype, _, data) in tensors {
            let floats = data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
            *data = floats.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect();
            *dtype = Dtype::BF16;
        }
    });
    let (stored, report) = load_dir(narrow.path(), &OPTIONS);
    // Only the norms, five of 32 values, are widened for computing.
    assert_eq!(report.converted_bytes, 5 * 32 * 4);
    let (widened, _) = load_dir(narrow.path(), &LoadOptions { dtype: Some(FloatDtype::F32), ..OPTIONS });
    let (ids, _) = golden("llama");
    let input = Input::unpacked(ROWS, SEQ, &ids, &stored.device()).unwrap();
    assert_close(&logits(&stored, &input), &logits(&widened, &input), 1e-5, "bf16 against the same values in f32");
}

#[test]
fn scores_that_are_not_numbers_end_a_generation_with_a_reason() {
    let broken = model(|tensors| {
        find(tensors, "model.norm.weight").3[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let (broken, _) = load_dir(broken.path(), &OPTIONS);
    let mut generator = Generator::new(&broken, &[1, 5, 9], SamplingOptions::greedy(3, vec![])).unwrap();
    assert_eq!(generator.error(), None);
    assert_eq!(generator.next(), None);
    assert_eq!(generator.finish(), Some(Finish::NotFinite));
    assert!(generator.error().unwrap().contains("not finite"));
    assert_eq!(generator.next(), None);
}

#[test]
fn a_truncated_file_is_an_error_that_says_so() {
    let dir = model(|_| {});
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for keep in [bytes.len() - 1, bytes.len() / 2, 100] {
        fs::write(&path, &bytes[..keep]).unwrap();
        let (error, text) = refused(&dir);
        assert!(matches!(error, LoadError::Truncated { .. }), "{text}");
        assert!(text.contains("model.safetensors") && text.contains(&keep.to_string()), "{text}");
    }
    fs::write(&path, b"tiny").unwrap();
    assert!(refused(&dir).1.contains("4 bytes"));
}

#[test]
fn garbage_overlaps_and_trailing_bytes_are_errors() {
    let dir = model(|_| {});
    let path = dir.path().join("model.safetensors");
    let malformed = |bytes: &[u8], expected: &str| {
        fs::write(&path, bytes).unwrap();
        let (error, text) = refused(&dir);
        assert!(matches!(error, LoadError::Malformed { .. }) && text.contains(expected), "{text}");
    };
    let with_header = |header: &str, data: usize| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    };
    malformed(&[0xff; 64], "header");
    malformed(&with_header("{not json", 8), "JSON");
    let tensor = |from: usize, to: usize| json!({"dtype": "F32", "shape": [2], "data_offsets": [from, to]});
    malformed(&with_header(&json!({"a": tensor(0, 8), "b": tensor(4, 12)}).to_string(), 12), "overlap");
    malformed(&with_header(&json!({"a": tensor(0, 8)}).to_string(), 9), "1 bytes follow");
    malformed(&with_header(&json!({"a": tensor(0, 4)}).to_string(), 4), "do not fit");
}

#[test]
fn a_misnamed_tensor_is_reported_with_its_likely_name() {
    let dir = model(|tensors| find(tensors, K_PROJ).0 = K_PROJ.replace("k_proj", "key_proj"));
    let (error, text) = refused(&dir);
    let LoadError::Mismatch { mismatch, .. } = error else { panic!("{text}") };
    assert_eq!(mismatch.missing, [(K_PROJ.to_owned(), Some(K_PROJ.replace("k_proj", "key_proj")))]);
    assert_eq!(mismatch.unused.len(), 1);
    assert!(text.contains("missing (1)") && text.contains("there is an unused"), "{text}");
}

#[test]
fn a_tensor_too_many_is_an_error_unless_it_follows_from_the_config() {
    let extra = |name: &str| {
        let name = name.to_owned();
        model(|tensors| tensors.push((name, Dtype::F32, vec![4], vec![0; 16])))
    };
    let (error, text) = refused(&extra("model.layers.0.self_attn.q_proj.bias"));
    assert!(matches!(error, LoadError::Mismatch { .. }) && text.contains("unused (1)"), "{text}");
    let (_, report) = load_dir(extra("model.layers.0.self_attn.rotary_emb.inv_freq").path(), &OPTIONS);
    assert_eq!(report.ignored, ["model.layers.0.self_attn.rotary_emb.inv_freq"]);
}

#[test]
fn another_shape_or_number_format_names_the_tensor() {
    let dir = model(|tensors| find(tensors, K_PROJ).2 = vec![32, 16]);
    let text = refused(&dir).1;
    assert!(text.contains(K_PROJ) && text.contains("expected [16, 32], found [32, 16]"), "{text}");

    let dir = model(|tensors| {
        let tensor = find(tensors, K_PROJ);
        (tensor.1, tensor.2) = (Dtype::I32, vec![16, 32]);
    });
    let (error, text) = refused(&dir);
    assert!(matches!(error, LoadError::Dtype { .. }) && text.contains("I32") && text.contains(K_PROJ), "{text}");
}

#[test]
fn tied_models_load_from_either_tensor_and_stay_apart_where_they_differ() {
    let tied = |change: &dyn Fn(&mut Tensors)| {
        let dir = directory(json!({"tie_word_embeddings": true}));
        let mut tensors = llama_tensors();
        change(&mut tensors);
        write(&dir.path().join("model.safetensors"), &tensors);
        let (model, report) = load_dir(dir.path(), &OPTIONS);
        (model.is_tied(), report.ignored)
    };
    assert_eq!(tied(&|tensors| tensors.retain(|t| t.0 != "lm_head.weight")), (true, vec![]));
    assert_eq!(tied(&|tensors| tensors.retain(|t| t.0 != "model.embed_tokens.weight")), (true, vec![]));
    assert_eq!(tied(&|_| {}), (false, vec![]));
    let equal = |tensors: &mut Tensors| {
        let table = find(tensors, "model.embed_tokens.weight").3.clone();
        find(tensors, "lm_head.weight").3 = table;
    };
    assert_eq!(tied(&equal), (true, vec!["lm_head.weight".to_owned()]));
}

/// Splits the llama fixture into two shards and an index, which `change` may spoil.
fn sharded(change: impl FnOnce(&mut Value)) -> TempDir {
    let dir = directory(json!({}));
    let tensors = llama_tensors();
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let mut index = json!({"metadata": {"total_size": 0}, "weight_map": {}});
    for (name, part) in names.iter().zip(tensors.chunks(tensors.len().div_ceil(2))) {
        write(&dir.path().join(name), part);
        for tensor in part {
            index["weight_map"][&tensor.0] = json!(name);
        }
    }
    change(&mut index);
    fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    dir
}

#[test]
fn shards_load_like_one_file() {
    let (model, report) = load_dir(sharded(|_| {}).path(), &OPTIONS);
    assert_eq!(report.files.len(), 2);
    let (ids, want) = golden("llama");
    let input = Input::unpacked(ROWS, SEQ, &ids, &model.device()).unwrap();
    assert_close(&logits(&model, &input), &want, 1e-4, "sharded");
}

#[test]
fn a_shard_outside_the_directory_is_refused() {
    let elsewhere = tempfile::tempdir().unwrap();
    let outside = elsewhere.path().join("outside.safetensors");
    fs::copy(fixture("llama").join("model.safetensors"), &outside).unwrap();
    let up = format!("../{}/outside.safetensors", elsewhere.path().file_name().unwrap().to_str().unwrap());
    for shard in [up.as_str(), outside.to_str().unwrap(), "", ".", "a/../../x", "..\\x"] {
        let dir = sharded(|index| index["weight_map"][K_PROJ] = json!(shard));
        let (error, text) = refused(&dir);
        assert!(matches!(error, LoadError::ShardOutside { .. }), "{shard}: {text}");
        assert!(text.contains(K_PROJ), "{text}");
    }
}

#[cfg(unix)]
#[test]
fn a_shard_may_be_a_link_into_the_hub_cache_and_nowhere_else() {
    use std::os::unix::fs::symlink;
    let whole = fixture("llama").join("model.safetensors");
    let index = {
        let map = llama_tensors().into_iter().map(|t| (t.0, json!("part.safetensors")));
        json!({"weight_map": map.collect::<serde_json::Map<_, _>>()}).to_string()
    };
    let root = tempfile::tempdir().unwrap();
    let snapshot = root.path().join("models--a--b/snapshots/c0ffee");
    let blobs = root.path().join("models--a--b/blobs");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    fs::copy(&whole, blobs.join("blob")).unwrap();
    fs::copy(fixture("llama").join("config.json"), snapshot.join("config.json")).unwrap();
    fs::write(snapshot.join("model.safetensors.index.json"), index).unwrap();

    let link = snapshot.join("part.safetensors");
    symlink("../../blobs/blob", &link).unwrap();
    load_dir(&snapshot, &OPTIONS);

    fs::remove_file(&link).unwrap();
    symlink(whole.canonicalize().unwrap(), &link).unwrap();
    let error = CausalLm::load(&snapshot, &OPTIONS, &Device::flex()).unwrap_err();
    assert!(matches!(error, LoadError::ShardOutside { .. }), "{error}");
}

#[test]
fn an_index_that_lies_is_an_error() {
    let text =
        refused(&sharded(|index| index["weight_map"]["model.extra"] = json!("model-00001-of-00002.safetensors"))).1;
    assert!(text.contains("model.extra") && text.contains("no such tensor"), "{text}");
    let text = refused(&sharded(|index| index["weight_map"][K_PROJ] = json!("model-3.safetensors"))).1;
    assert!(text.contains("model-3.safetensors"), "{text}");
    assert!(refused(&sharded(|index| *index = json!({}))).1.contains("weight_map"));
    assert!(refused(&sharded(|index| index["weight_map"] = json!({}))).1.contains("empty"));
}

#[test]
fn a_directory_without_weights_says_what_is_there() {
    let dir = directory(json!({}));
    assert!(matches!(refused(&dir).0, LoadError::NoWeights { .. }));
    fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    assert!(refused(&dir).1.contains("PyTorch"));
    let text = CausalLm::load(Path::new("/no/such/dir"), &OPTIONS, &Device::flex()).unwrap_err().to_string();
    assert!(text.contains("/no/such/dir/config.json"), "{text}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Loading damaged bytes is an error or a model, never a panic; a shorter file is always an error.
    #[test]
    fn damage_is_never_a_panic(at in 0usize..3000, to in any::<u8>(), cut in 0usize..2000) {
        let dir = model(|_| {});
        let path = dir.path().join("model.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let length = bytes.len();
        bytes[at % length] = to;
        bytes.truncate(length - cut);
        fs::write(&path, bytes).unwrap();
        let loaded = CausalLm::load(dir.path(), &OPTIONS, &Device::flex());
        prop_assert!(cut == 0 || loaded.is_err());
    }
}
