//! Weights as checkpoints hold them: read and written as bitsandbytes does, and refused by name when damaged.

mod common;

use std::collections::BTreeMap;

use common::{bytes, golden, matrix, tensors};
use emberlora_quant::bnb::{
    BnbError, Config, Element, LONGEST_STATE, Tensor, from_tensors, is_skipped, parts as parts_of, to_tensors,
    weight_of,
};
use emberlora_quant::{BlockSize, FloatDtype, PackedWeight, QuantKind, Scheme, pack};
use safetensors::SafeTensors;
use serde_json::{Value, json};

type Checkpoint<'a> = BTreeMap<String, Tensor<'a>>;

/// The tensors of a weight in a file of goldens.
fn parts<'a>(file: &SafeTensors<'a>, module: &str) -> Checkpoint<'a> {
    let belongs =
        |name: &str| name == format!("{module}.weight") || weight_of(name).unwrap() == Some(format!("{module}.weight"));
    file.iter()
        .filter(|(name, _)| belongs(name))
        .map(|(name, tensor)| {
            let element = Element::from_name(&tensor.dtype().to_string());
            (name.to_owned(), Tensor::new(element, tensor.shape().to_vec(), tensor.data()))
        })
        .collect()
}

fn read(checkpoint: &Checkpoint<'_>, weight: &str) -> Result<Option<PackedWeight>, BnbError> {
    from_tensors(weight, |name| checkpoint.get(name).cloned())
}

#[test]
fn what_bitsandbytes_wrote_is_read_and_written_again_byte_for_byte() {
    for (file, count) in [("four_bit.safetensors", 52), ("int8.safetensors", 3)] {
        let file = golden(file);
        let file = tensors(&file);
        let modules: Vec<&str> = file.names().into_iter().filter_map(|name| name.strip_suffix(".weight")).collect();
        assert_eq!(modules.len(), count);
        for module in modules {
            let weight = format!("{module}.weight");
            let parts = parts(&file, module);
            let packed = read(&parts, &weight).unwrap().unwrap();
            let input = module.split('.').next().unwrap();
            let (shape, dtype) = matrix(&file, input);
            assert_eq!(packed, pack(&weight, shape, dtype, bytes(&file, input), packed.scheme()).unwrap(), "{module}");
            let written = to_tensors(&weight, &packed);
            assert_eq!(written[0].0, weight);
            let written: Checkpoint<'_> = written.into_iter().collect();
            let text = |parts: &Checkpoint<'_>| {
                let state = parts.iter().find(|(name, _)| name.contains("quant_state"));
                state.map(|(_, state)| String::from_utf8_lossy(&state.bytes).into_owned())
            };
            assert_eq!(text(&written), text(&parts));
            assert_eq!(written, parts, "{module}");
        }
    }
}

#[test]
fn models_that_transformers_quantised_hold_what_packing_their_source_gives() {
    let source = golden("../llama/model.safetensors");
    let source = tensors(&source);
    for (name, scheme) in [
        ("llama_nf4_double", Scheme::new(QuantKind::Nf4, BlockSize::default(), true)),
        ("llama_fp4", Scheme::new(QuantKind::Fp4, BlockSize::default(), false)),
        ("llama_int8", Scheme::Int8),
    ] {
        let config: Value = serde_json::from_slice(&golden(&format!("{name}/config.json"))).unwrap();
        let config = &config["quantization_config"];
        let read_config = Config::from_json(config).unwrap();
        assert_eq!(read_config.kind, scheme.kind());
        assert_eq!(read_config.to_json(), *config, "{name}");

        let file = golden(&format!("{name}/model.safetensors"));
        let file = tensors(&file);
        let mut quantised = 0;
        for weight in source.names() {
            let module = weight.strip_suffix(".weight").unwrap();
            let parts = parts(&file, module);
            if let Some(packed) = read(&parts, weight).unwrap() {
                let (shape, dtype) = matrix(&source, weight);
                assert_eq!(packed, pack(weight, shape, dtype, bytes(&source, weight), scheme).unwrap(), "{weight}");
                assert_eq!(to_tensors(weight, &packed).into_iter().collect::<Checkpoint<'_>>(), parts, "{weight}");
                quantised += 1;
            } else {
                assert_eq!(parts[weight].bytes, bytes(&source, weight), "{weight}");
            }
        }
        assert_eq!(quantised, 14, "{name}");
    }
}

#[test]
fn a_dense_weight_is_not_a_quantised_one() {
    let dense = Tensor::new(Element::Float(FloatDtype::Bf16), vec![2, 2], vec![0; 8]);
    let checkpoint = BTreeMap::from([("q_proj.weight".to_owned(), dense)]);
    assert!(read(&checkpoint, "q_proj.weight").unwrap().is_none());
    assert!(read(&checkpoint, "k_proj.weight").unwrap().is_none());
}

#[test]
fn parts_are_known_before_a_weight_is_packed() {
    let block = |size| BlockSize::try_from(size).unwrap();
    let schemes = [
        Scheme::new(QuantKind::Nf4, block(64), true),
        Scheme::new(QuantKind::Nf4, block(4096), false),
        Scheme::new(QuantKind::Fp4, block(32), true),
        Scheme::Int8,
    ];
    for (scheme, shape) in
        schemes.into_iter().flat_map(|scheme| [[1, 1], [3, 7], [130, 257]].map(|shape| (scheme, shape)))
    {
        let values = (0..shape[0] * shape[1]).map(|index| (index as f32 * 0.37).sin() * 1e-7);
        let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
        let packed = pack("w.weight", shape, FloatDtype::F32, &bytes, scheme).unwrap();
        let (written, parts) = (to_tensors("w.weight", &packed), parts_of("w.weight", shape, scheme));
        assert_eq!(written.len(), parts.len());
        for ((name, tensor), part) in written.into_iter().zip(parts) {
            assert_eq!((&name, tensor.element), (&part.name, part.element), "{scheme}");
            match part.shape {
                Some(shape) => assert_eq!(tensor.shape, shape, "{name} in {scheme}"),
                None => assert!(tensor.bytes.len() < LONGEST_STATE, "{name} in {scheme}"),
            }
        }
    }
}

#[test]
fn every_part_knows_its_weight() {
    let weight = "model.layers.0.self_attn.q_proj.weight";
    for scheme in [Scheme::new(QuantKind::Nf4, BlockSize::default(), true), Scheme::Int8] {
        let packed = pack(weight, [4, 32], FloatDtype::F32, &[0; 512], scheme).unwrap();
        for (name, _) in &to_tensors(weight, &packed)[1..] {
            assert_eq!(weight_of(name).unwrap().as_deref(), Some(weight), "{name}");
        }
    }
    for other in [weight, "model.layers.0.self_attn.q_proj.bias", "model.norm.weight", "SCB", "x.absmax"] {
        assert_eq!(weight_of(other).unwrap(), None, "{other}");
    }
    let error = weight_of("q_proj.weight.quant_state.bitsandbytes__int3").unwrap_err().to_string();
    assert!(error.contains("`q_proj.weight.quant_state.bitsandbytes__int3`") && error.contains("int3"), "{error}");
}

/// Damages one part of the weight of a golden, and expects an error that names the part and says `says`.
#[track_caller]
fn check(module: &str, part: &str, says: &str, damage: impl FnOnce(&mut Tensor<'_>)) {
    let int8 = module == "f32";
    let file = golden(if int8 { "int8.safetensors" } else { "four_bit.safetensors" });
    let file = tensors(&file);
    let mut checkpoint = parts(&file, module);
    let name = format!("{module}.{part}");
    damage(checkpoint.get_mut(&name).unwrap());
    let error = read(&checkpoint, &format!("{module}.weight")).unwrap_err().to_string();
    assert!(error.contains(&format!("`{name}`")) && error.contains(says), "{error}");
}

/// Changes the JSON of the state of `many_blocks.nf4.32.double`.
#[track_caller]
fn check_state(says: &str, change: impl FnOnce(&mut Value)) {
    check("many_blocks.nf4.32.double", "weight.quant_state.bitsandbytes__nf4", says, |state| {
        let mut value = serde_json::from_slice(&state.bytes).unwrap();
        change(&mut value);
        state.bytes = value.to_string().into_bytes().into();
    });
}

fn cut(tensor: &mut Tensor<'_>, len: usize) {
    tensor.bytes.to_mut().truncate(len);
}

const DOUBLE: &str = "many_blocks.nf4.32.double";

#[test]
fn a_truncated_state_is_refused_wherever_it_ends() {
    for len in 0..150 {
        check(DOUBLE, "weight.quant_state.bitsandbytes__nf4", "truncated", |state| cut(state, len));
    }
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    check_state("`int3`", |state| state["quant_type"] = json!("int3"));
    check_state("fp4; expected nf4", |state| state["quant_type"] = json!("fp4"));
    check_state("blocksize 48", |state| state["blocksize"] = json!(48));
    check_state("blocksize 0", |state| state["blocksize"] = json!(0));
    check_state("dtype int8", |state| state["dtype"] = json!("int8"));
    check_state("shape [160]", |state| state["shape"] = json!([160]));
    check_state("shape [0, 160]", |state| state["shape"] = json!([0, 160]));
    check_state("shape", |state| state["shape"] = json!([u64::MAX, 160]));
    check_state("nested_blocksize 64", |state| state["nested_blocksize"] = json!(64));
    check_state("nested_dtype float16", |state| state["nested_dtype"] = json!("float16"));
    check_state("inf", |state| state["nested_offset"] = json!(1e300));
    check_state("unknown field `surprise`", |state| state["surprise"] = json!(1));
    check_state("nested_offset nothing", |state| drop(state.as_object_mut().unwrap().remove("nested_offset")));
    check_state("nested_blocksize nothing", |state| drop(state.as_object_mut().unwrap().remove("nested_blocksize")));
    check(DOUBLE, "weight.quant_state.bitsandbytes__nf4", "expected U8", |state| state.element = Element::I8);
}

#[test]
fn a_block_size_that_disagrees_with_the_scales_is_refused_by_name() {
    let file = golden("four_bit.safetensors");
    let file = tensors(&file);
    for (module, blocks) in [(DOUBLE, 325), ("even.fp4.64", 12)] {
        let mut checkpoint = parts(&file, module);
        let state = checkpoint.iter_mut().find(|(name, _)| name.contains("quant_state")).unwrap().1;
        let mut value: Value = serde_json::from_slice(&state.bytes).unwrap();
        value["blocksize"] = json!(value["blocksize"].as_u64().unwrap() * 2);
        state.bytes = value.to_string().into_bytes().into();
        let error = read(&checkpoint, &format!("{module}.weight")).unwrap_err().to_string();
        assert!(error.contains(&format!("`{module}.weight.absmax`")), "{error}");
        assert!(error.contains(&format!("expected {blocks} for the shape")), "{error}");
    }
}

#[test]
fn parts_of_the_wrong_length_are_refused() {
    check(DOUBLE, "weight", "10399 bytes; expected 10400", |tensor| cut(tensor, 10_399));
    check(DOUBLE, "weight.absmax", "649 elements; expected 650", |tensor| cut(tensor, 649));
    check(DOUBLE, "weight.quant_map", "15 elements; expected 16", |tensor| cut(tensor, 60));
    check(DOUBLE, "weight.nested_absmax", "2 elements; expected 3", |tensor| cut(tensor, 8));
    check(DOUBLE, "weight.nested_quant_map", "255 elements; expected 256", |tensor| cut(tensor, 1020));
    check(DOUBLE, "weight.nested_quant_map", "1021 bytes; expected 1024", |tensor| cut(tensor, 1021));
    check("f32", "weight", "332 bytes; expected 333", |tensor| cut(tensor, 332));
    check("f32", "SCB", "8 elements; expected 9", |tensor| cut(tensor, 32));
}

#[test]
fn parts_of_the_wrong_type_are_refused() {
    let half = Element::Float(FloatDtype::F16);
    check(DOUBLE, "weight.absmax", "expected U8", |tensor| tensor.element = half);
    check("even.fp4.64", "weight.absmax", "expected F32", |tensor| tensor.element = half);
    check(DOUBLE, "weight.nested_quant_map", "expected F32", |tensor| tensor.element = half);
    check("f32", "weight", "expected I8", |tensor| tensor.element = Element::U8);
    check("f32", "SCB", "holds other; expected F32", |tensor| tensor.element = Element::from_name("I64"));
    check("f32", "weight_format", "[3]", |tensor| tensor.bytes = vec![3].into());
    check("f32", "weight", "shape [333]", |tensor| tensor.shape = vec![333]);
}

#[test]
fn scales_that_are_not_finite_are_refused() {
    let set = |at: usize, value: f32| {
        move |tensor: &mut Tensor<'_>| tensor.bytes.to_mut()[4 * at..][..4].copy_from_slice(&value.to_le_bytes())
    };
    check("even.fp4.64", "weight.absmax", "NaN at 3", set(3, f32::NAN));
    check("f32", "SCB", "inf at 1", set(1, f32::INFINITY));
    check(DOUBLE, "weight.nested_absmax", "-inf at 2", set(2, f32::NEG_INFINITY));
    check(DOUBLE, "weight.nested_quant_map", "NaN at 200", set(200, f32::NAN));
    check(DOUBLE, "weight.quant_map", "the format has -0.39", set(3, -0.5));
}

#[test]
fn missing_and_surplus_parts_are_refused() {
    let file = golden("four_bit.safetensors");
    let file = tensors(&file);
    let whole = parts(&file, DOUBLE);
    for name in whole.keys() {
        let mut checkpoint = whole.clone();
        checkpoint.remove(name);
        let error = read(&checkpoint, &format!("{DOUBLE}.weight")).unwrap_err().to_string();
        assert!(error.starts_with(&format!("`{name}")) && error.contains("is missing"), "{error}");
    }
    let mut both = whole.clone();
    let fp4 = format!("{DOUBLE}.weight.quant_state.bitsandbytes__fp4");
    both.insert(fp4.clone(), Tensor::new(Element::U8, vec![1], vec![0]));
    let error = read(&both, &format!("{DOUBLE}.weight")).unwrap_err().to_string();
    assert!(error.contains(&fp4) && error.contains("nf4"), "{error}");
    let mut plain = parts(&file, "even.fp4.64");
    plain.insert("even.fp4.64.weight.nested_absmax".into(), whole[&format!("{DOUBLE}.weight.nested_absmax")].clone());
    let error = read(&plain, "even.fp4.64.weight").unwrap_err().to_string();
    assert!(error.contains("`even.fp4.64.weight.nested_absmax` is there although"), "{error}");
}

#[test]
fn a_map_of_its_own_is_kept() {
    let file = golden("four_bit.safetensors");
    let file = tensors(&file);
    let mut checkpoint = parts(&file, DOUBLE);
    let map = checkpoint.get_mut(&format!("{DOUBLE}.weight.nested_quant_map")).unwrap();
    map.bytes.to_mut()[..4].copy_from_slice(&(-0.999f32).to_le_bytes());
    let packed = read(&checkpoint, &format!("{DOUBLE}.weight")).unwrap().unwrap();
    let written: Checkpoint<'_> = to_tensors(&format!("{DOUBLE}.weight"), &packed).into_iter().collect();
    assert_eq!(written, checkpoint);
}

#[test]
fn the_configuration_survives_the_round_trip() {
    for (kind, double_quant) in [(QuantKind::Nf4, true), (QuantKind::Fp4, false), (QuantKind::Int8, false)] {
        for skip in [None, Some(vec!["lm_head".to_owned(), "q_proj".to_owned()])] {
            let config = Config { kind, double_quant, compute_dtype: FloatDtype::Bf16, skip, threshold: 0.0 };
            assert_eq!(Config::from_json(&config.to_json()), Ok(config));
        }
    }
}

#[test]
fn modules_are_skipped_as_transformers_skips_them() {
    let q_proj = "model.layers.1.self_attn.q_proj";
    for (name, expected) in [
        (q_proj, true),
        ("q_proj", true),
        ("self_attn.q_proj", true),
        ("proj", true),
        ("model.layers.1", true),
        ("model", true),
        ("model.layers.1.self_attn.q", false),
        ("layers.1", false),
        ("lm_head", false),
    ] {
        assert_eq!(is_skipped(q_proj, &[name.to_owned()]), expected, "{name}");
    }
    assert!(!is_skipped("model.layers.11.self_attn.q_proj", &["model.layers.1".to_owned()]));
    assert!(!is_skipped("lm_head", &[]));

    let config = Config::from_json(&json!({"load_in_8bit": true})).unwrap();
    assert!(config.skips("lm_head") && !config.skips(q_proj));
    let config = Config { skip: Some(vec!["q_proj".to_owned()]), ..config };
    assert!(config.skips(q_proj) && !config.skips("lm_head"));
}

#[test]
fn a_configuration_may_leave_out_what_has_a_default() {
    let config = Config::from_json(&json!({"load_in_4bit": true})).unwrap();
    let expected = Config {
        kind: QuantKind::Fp4,
        double_quant: false,
        compute_dtype: FloatDtype::F32,
        skip: None,
        threshold: 6.0,
    };
    assert_eq!(config, expected);
}

#[test]
fn configurations_that_mean_something_else_are_refused_by_key() {
    for (config, key) in [
        (json!({"quant_method": "gptq", "bits": 4}), "quant_method"),
        (json!({"load_in_4bit": true, "bnb_4bit_quant_type": "int4"}), "bnb_4bit_quant_type"),
        (json!({"load_in_4bit": true, "load_in_8bit": true}), "load_in_4bit"),
        (json!({"quant_method": "bitsandbytes"}), "load_in_4bit"),
        (json!({"load_in_4bit": 1}), "load_in_4bit"),
        (json!({"load_in_8bit": true, "llm_int8_has_fp16_weight": true}), "llm_int8_has_fp16_weight"),
        (json!({"load_in_8bit": true, "llm_int8_threshold": "high"}), "llm_int8_threshold"),
        (json!({"load_in_8bit": true, "llm_int8_skip_modules": [1]}), "llm_int8_skip_modules"),
        (json!({"load_in_4bit": true, "bnb_4bit_compute_dtype": "float64"}), "bnb_4bit_compute_dtype"),
    ] {
        let error = Config::from_json(&config).unwrap_err();
        assert_eq!(error.key, key);
        assert!(error.to_string().contains(&format!("quantization_config.{key}")), "{error}");
    }
}
