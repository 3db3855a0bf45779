//! What is read back from adapter directories, and what is refused.

mod common;

use std::fs;

use burn::tensor::Device;
use common::saved::*;
use common::*;
use emberlora_lora::peft;
use emberlora_lora::{Exclude, LoraOptions, Pass, Projections, Targets, detach};
use half::{bf16, f16};
use proptest::prelude::*;
use safetensors::tensor::Dtype;
use serde_json::{Value, json};

#[test]
fn a_saved_adapter_gives_the_same_output() {
    let saved = Saved::new(LoraOptions { rslora: true, ..plain() });
    let x = noise(1, [4, WIDTH], &Device::flex());
    let loaded = saved.apply().unwrap();
    assert_eq!(factors(&loaded), factors(&saved.model));
    assert_eq!(values(&loaded.forward(x.clone(), &Pass::eval())), values(&saved.model.forward(x, &Pass::eval())));
}

#[test]
fn options_survive_the_round_trip() {
    let options = LoraOptions {
        r: 3,
        alpha: 7.5,
        dropout: 0.1,
        targets: suffixes(&["up_proj", "down_proj"]),
        exclude: Exclude::Suffixes(vec!["layers.0.mlp.up_proj".into()]),
        layers: Some(vec![0, 1]),
        layers_pattern: vec!["layers".into()],
        rank_pattern: vec![("up_proj".into(), 5), ("0.mlp.down_proj".into(), 1)],
        alpha_pattern: vec![("up_proj".into(), 2.0), ("down_proj".into(), 0.25)],
        rslora: true,
        seed: 0,
    };
    let saved = Saved::new(options.clone());
    assert_eq!(saved.load().unwrap().options, options);
    assert_eq!(factors(&saved.apply().unwrap()), factors(&saved.model));

    let regex = LoraOptions {
        targets: Targets::Regex(r"model\.layers\.\d\.mlp\.(up|down)_proj".into()),
        exclude: Exclude::Regex(r".*\.0\..*".into()),
        seed: 0,
        ..plain()
    };
    assert_eq!(Saved::new(regex.clone()).load().unwrap().options, regex);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn every_bit_of_every_factor_survives(bits in proptest::collection::vec(any::<u32>(), 4 * (WIDTH + INNER) * 2)) {
        let mut saved = Saved::new(plain());
        let mut rest = bits.iter().map(|bits| f32::from_bits(*bits));
        let device = Device::flex();
        saved.model.visit_projections(&mut |_, linear| {
            if let Some(adapter) = &mut linear.adapter {
                for factor in [&mut adapter.a, &mut adapter.b] {
                    let shape = factor.dims();
                    let data: Vec<f32> = rest.by_ref().take(shape[0] * shape[1]).collect();
                    let data = burn::tensor::TensorData::new(data, shape);
                    *factor = factor.clone().map(|_| burn::tensor::Tensor::from_data(data, &device));
                }
            }
        });
        peft::save(&saved.model, &saved.options, "tiny", None, &saved.path()).unwrap();
        let loaded = saved.apply().unwrap();
        let pattern = |model: &Tiny| {
            let all = factors(model).into_iter().flat_map(|(_, a, b)| [a, b].concat());
            all.map(f32::to_bits).collect::<Vec<_>>()
        };
        prop_assert_eq!(pattern(&loaded), bits);
    }
}

#[test]
fn narrow_tensors_become_f32() {
    for dtype in [Dtype::BF16, Dtype::F16] {
        let saved = Saved::new(plain());
        saved.edit_tensors(|name, shape, values| {
            let narrow = |v: &f32| match dtype {
                Dtype::BF16 => bf16::from_f32(*v).to_le_bytes(),
                _ => f16::from_f32(*v).to_le_bytes(),
            };
            Some(Stored { name, dtype, shape, bytes: values.iter().flat_map(narrow).collect() })
        });
        let widen = |v: &f32| match dtype {
            Dtype::BF16 => bf16::from_f32(*v).to_f32(),
            _ => f16::from_f32(*v).to_f32(),
        };
        for ((_, a, b), (_, old_a, old_b)) in factors(&saved.apply().unwrap()).iter().zip(factors(&saved.model)) {
            assert_eq!(*a, old_a.iter().map(widen).collect::<Vec<_>>());
            assert_eq!(*b, old_b.iter().map(widen).collect::<Vec<_>>());
        }
    }
}

#[test]
fn unknown_keys_are_reported_and_ignored() {
    let saved = Saved::new(plain());
    saved.edit_config("brand_new", json!({"a": 1}));
    let adapter = saved.load().unwrap();
    assert_eq!(adapter.warnings.len(), 1);
    assert!(adapter.warnings[0].contains("`brand_new`"), "{:?}", adapter.warnings);
    saved.apply().unwrap();
}

#[test]
fn settings_that_change_the_numbers_are_refused() {
    for (key, value) in [
        ("use_dora", json!(true)),
        ("bias", json!("all")),
        ("modules_to_save", json!(["lm_head"])),
        ("lora_bias", json!(true)),
        ("megatron_config", json!({"a": 1})),
        ("peft_type", json!("IA3")),
        ("task_type", json!("SEQ_CLS")),
        ("fan_in_fan_out", json!(true)),
        ("init_lora_weights", json!("pissa_niter_16")),
        ("init_lora_weights", json!("loftq")),
        ("layer_replication", json!([[0, 1]])),
        ("target_parameters", json!(["experts.gate_up_proj"])),
        ("use_qalora", json!(true)),
        ("trainable_token_indices", json!([1])),
    ] {
        let saved = Saved::new(plain());
        saved.edit_config(key, value.clone());
        let message = saved.refusal();
        assert!(message.contains(&format!("`{key}` is {value}")), "{message}");
    }
}

#[test]
fn settings_without_effect_are_accepted() {
    for (key, value) in [
        ("init_lora_weights", json!("gaussian")),
        ("init_lora_weights", json!(false)),
        ("modules_to_save", json!([])),
        ("task_type", Value::Null),
        ("peft_version", json!("0.5.0")),
        ("inference_mode", json!(false)),
        ("lora_alpha", json!(4.0)),
        ("layers_to_transform", json!([])),
    ] {
        let saved = Saved::new(plain());
        saved.edit_config(key, value.clone());
        if let Err(error) = saved.apply() {
            panic!("{key} = {value}: {error}");
        }
    }
}

#[test]
fn values_of_the_wrong_type_name_key_and_value() {
    for (key, value) in [
        ("r", json!("16")),
        ("r", json!(2.5)),
        ("r", json!(-1)),
        ("lora_alpha", json!([1])),
        ("target_modules", json!([1])),
        ("target_modules", Value::Null),
        ("layers_to_transform", json!("0")),
        ("rank_pattern", json!({"q": "8"})),
        ("use_rslora", json!(1)),
        ("init_lora_weights", json!(3)),
        ("peft_type", Value::Null),
    ] {
        let saved = Saved::new(plain());
        saved.edit_config(key, value.clone());
        let message = saved.refusal();
        assert!(message.contains(&format!("`{key}` is {value}")), "{message}");
    }
    let saved = Saved::new(plain());
    saved.edit_config("r", json!(0));
    assert!(saved.refusal().contains("r is 0"));
    saved.edit_config("r", json!(2));
    saved.edit_config("lora_dropout", json!(1.5));
    assert!(saved.refusal().contains("dropout is 1.5"));
}

#[test]
fn a_configuration_that_is_not_json_is_an_error_with_its_place() {
    let saved = Saved::new(plain());
    fs::write(saved.path().join(peft::CONFIG_FILE), "{\n\"r\": }").unwrap();
    assert!(saved.refusal().contains("line 2"));
    fs::write(saved.path().join(peft::CONFIG_FILE), "[1]").unwrap();
    assert!(saved.refusal().contains("expected an object"));
    fs::write(saved.path().join(peft::CONFIG_FILE), [0xFF, 0xFE]).unwrap();
    saved.refusal();
}

#[test]
fn wrong_shapes_name_the_tensor() {
    let saved = Saved::new(plain());
    saved.edit_config("r", json!(3));
    let message = saved.refusal();
    assert!(message.contains("up_proj.lora_A.weight") && message.contains("[2, 6]") && message.contains("[3, 6]"));

    let saved = Saved::new(plain());
    saved.edit_tensors(|name, mut shape, values| {
        if name.ends_with("1.mlp.down_proj.lora_B.weight") {
            shape = vec![values.len()];
        }
        Some(Stored::f32(name, shape, &values))
    });
    let message = saved.refusal();
    assert!(message.contains("1.mlp.down_proj.lora_B.weight") && message.contains("[12]"), "{message}");
}

#[test]
fn missing_and_unused_tensors_are_all_listed() {
    let saved = Saved::new(plain());
    saved.edit_tensors(|name, shape, values| {
        let name = match name.strip_suffix("1.mlp.down_proj.lora_B.weight") {
            Some(head) => format!("{head}1.mlp.other.lora_B.weight"),
            None => name,
        };
        (!name.ends_with("0.mlp.up_proj.lora_A.weight")).then(|| Stored::f32(name, shape, &values))
    });
    let message = saved.refusal();
    for part in ["2 missing", "0.mlp.up_proj.lora_A", "1.mlp.down_proj.lora_B", "1 unused", "1.mlp.other.lora_B"] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn truncated_and_malformed_tensor_files_are_errors() {
    let saved = Saved::new(plain());
    let path = saved.path().join(peft::TENSORS_FILE);
    let bytes = fs::read(&path).unwrap();
    for keep in [0, 7, 8, 100, bytes.len() - 1] {
        fs::write(&path, &bytes[..keep]).unwrap();
        assert!(saved.refusal().contains("truncated or not a safetensors file"), "{keep} bytes");
    }
    fs::write(&path, [&bytes[..], b"more"].concat()).unwrap();
    saved.refusal();
}

#[test]
fn tensors_of_other_kinds_are_explained() {
    for (name, part) in [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embedding"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector", "DoRA"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_B.bias", "lora_bias"),
    ] {
        let saved = Saved::new(plain());
        write_tensors(&saved.path(), &[Stored::f32(name.to_owned(), vec![1], &[0.0])]);
        let message = saved.refusal();
        assert!(message.contains(name) && message.contains(part), "{message}");
    }
    let saved = Saved::new(plain());
    let stored = Stored { name: "x".to_owned(), dtype: Dtype::I64, shape: vec![1], bytes: vec![0; 8] };
    write_tensors(&saved.path(), &[stored]);
    assert!(saved.refusal().contains("stored as I64"));
}

#[test]
fn missing_files_and_pickles_are_told_apart() {
    let saved = Saved::new(plain());
    fs::remove_file(saved.path().join(peft::TENSORS_FILE)).unwrap();
    assert!(saved.refusal().contains("has no adapter_model.safetensors"));
    fs::write(saved.path().join("adapter_model.bin"), "pickle").unwrap();
    assert!(saved.refusal().contains("convert it"));
    fs::remove_file(saved.path().join(peft::CONFIG_FILE)).unwrap();
    assert!(saved.refusal().contains("has no adapter_config.json"));
}

#[test]
fn a_stored_head_must_be_the_models_own() {
    let saved = Saved::new(options(2, suffixes(&["lm_head"])));
    let head = values(&saved.model.head.weight.as_dense().unwrap());
    let key = "base_model.model.lm_head.base_layer.weight";
    let rounded: Vec<f32> = head.iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
    let other: Vec<f32> = head.iter().map(|v| v + 0.5).collect();
    let store = |values: &[f32]| {
        saved.edit_tensors(|name, shape, values| {
            (!name.contains("base_layer")).then(|| Stored::f32(name, shape, &values))
        });
        let adapter = saved.load().unwrap();
        let mut all: Vec<Stored> =
            adapter.tensors.into_iter().map(|(name, t)| Stored::f32(name, t.shape, &t.values)).collect();
        all.push(Stored::f32(key.to_owned(), vec![VOCABULARY, WIDTH], values));
        write_tensors(&saved.path(), &all);
    };
    store(&head);
    saved.apply().unwrap();
    store(&rounded);
    saved.apply().unwrap();
    store(&other);
    assert!(saved.refusal().contains(key));
}

#[test]
fn a_refused_adapter_leaves_the_model_as_it_was() {
    let saved = Saved::new(plain());
    saved.edit_tensors(|name, shape, values| (!name.contains("layers.1")).then(|| Stored::f32(name, shape, &values)));
    let device = Device::flex();
    let mut model = Tiny::new(&device);
    peft::apply(&mut model, &saved.load().unwrap(), &device).unwrap_err();
    assert_eq!(detach(&mut model), 0);
}

#[test]
fn applying_over_adapters_is_an_error() {
    let saved = Saved::new(plain());
    let (device, mut model) = (Device::flex(), saved.model.clone());
    let error = peft::apply(&mut model, &saved.load().unwrap(), &device).unwrap_err();
    assert!(error.to_string().contains("detach"), "{error}");
}
