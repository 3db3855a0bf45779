//! Projections that are packed while they are read.

mod common;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};
use common::directory::{Tensors, directory, find, read_tensors, write};
use common::packed::{QUANTISED, nf4, packed, packing, quantised, refused, scheme};
use common::*;
use emberlora_lora::Projections;
use emberlora_model::{CausalLm, FloatDtype, Input, LoadError, LoadOptions};
use emberlora_quant::{QuantKind, Scheme, pack};
use safetensors::tensor::Dtype;
use serde_json::json;
use tempfile::TempDir;

fn names(model: &CausalLm) -> Vec<String> {
    packed(model).into_keys().collect()
}

#[test]
fn packing_while_reading_gives_what_transformers_saved() {
    for (name, kind, double_quant) in QUANTISED {
        let (here, report) = load_dir(&fixture("llama"), &packing(scheme(kind, double_quant), &["lm_head"]));
        let (there, stored) = load_dir(&quantised(name), &OPTIONS);
        assert_eq!(packed(&here).len(), 14, "{name}");
        assert_eq!(packed(&here), packed(&there), "{name}");
        assert_eq!((report.packed_bytes, report.packed_parameters), (stored.packed_bytes, stored.packed_parameters));
        assert_eq!(report.quantization, stored.quantization, "{name}");
        assert_eq!(report.tensors, load_dir(&fixture("llama"), &OPTIONS).1.tensors);
        assert_eq!((report.parameters, report.tensors), (stored.parameters, stored.tensors));
    }
}

#[test]
fn every_dense_format_is_packed_from_its_own_bytes() {
    for (dtype, stored) in
        [(FloatDtype::F32, Dtype::F32), (FloatDtype::Bf16, Dtype::BF16), (FloatDtype::F16, Dtype::F16)]
    {
        let mut tensors = read_tensors(&fixture("llama").join("model.safetensors"));
        for (_, element, _, data) in &mut tensors {
            *data = emberlora_quant::convert(data, FloatDtype::F32, dtype).unwrap().into_owned();
            *element = stored;
        }
        let dir = directory(json!({}));
        write(&dir.path().join("model.safetensors"), &tensors);
        for scheme in [scheme(QuantKind::Nf4, true), scheme(QuantKind::Fp4, false), Scheme::Int8] {
            // The format of dense weights says nothing about packed ones.
            let options = LoadOptions { dtype: Some(FloatDtype::F32), ..packing(scheme, &["lm_head"]) };
            let (model, report) = load_dir(dir.path(), &options);
            assert_eq!(model.weight_dtype(), Some(FloatDtype::F32));
            model.projections(&mut |name, linear| {
                if name == "lm_head" {
                    return;
                }
                let (_, _, shape, data) = find(&mut tensors, &format!("{name}.weight"));
                let expected = pack(name, [shape[0], shape[1]], dtype, data, scheme).unwrap();
                let mut values = vec![0.0; shape[0] * shape[1]];
                expected.dequantise(0, &mut values);
                assert_eq!(floats(linear.weight.dequantise()), values, "{name} {dtype} {scheme}");
            });
            assert_eq!(report.quantization.unwrap().scheme, scheme);
        }
    }
}

#[test]
fn what_is_skipped_stays_dense_and_so_does_a_tied_head() {
    let count = |skip: &[&str]| names(&load_dir(&fixture("llama"), &packing(Scheme::Int8, skip)).0);
    assert_eq!(count(&["lm_head"]).len(), 14);
    assert!(count(&[]).contains(&"lm_head".to_owned()));
    assert_eq!(count(&["lm_head", "q_proj", "model.layers.1.mlp"]).len(), 14 - 2 - 3);
    assert_eq!(count(&["model", "lm_head"]).len(), 0);

    let (tied, report) = load_dir(&fixture("llama3"), &packing(Scheme::Int8, &[]));
    assert!(tied.is_tied() && report.packed_parameters > 0);
    assert!(!names(&tied).contains(&"lm_head".to_owned()));
}

#[test]
fn a_head_that_is_packed_predicts_what_its_numbers_say() {
    let (ids, _) = golden("llama");
    let logits = |options: &LoadOptions| {
        let (model, _) = load_dir(&fixture("llama"), options);
        logits(&model, &Input::unpacked(ROWS, SEQ, &ids, &model.device()).unwrap())
    };
    let (whole, most) = (logits(&packing(Scheme::Int8, &[])), logits(&packing(Scheme::Int8, &["lm_head"])));
    assert_close(&whole, &most, 0.1, "a head in 8 bits");
    assert_ne!(whole, most);
}

#[test]
fn nothing_of_a_packed_model_requires_a_gradient() {
    struct Check(usize);
    impl ModuleVisitor for Check {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            assert!(!param.is_require_grad() && !param.val().is_tracked());
            self.0 += 1;
        }
    }
    let (model, report) = CausalLm::load(&fixture("llama"), &nf4(), &Device::flex().autodiff()).unwrap();
    let mut check = Check(0);
    model.visit(&mut check);
    assert_eq!(check.0, report.tensors);
    model.train().visit(&mut check);
}

#[test]
fn every_family_packs_all_its_projections() {
    for name in FIXTURES {
        let (model, report) = load_dir(&fixture(name), &nf4());
        let mut projections = 0;
        model.projections(&mut |name, linear| {
            projections += usize::from(name != "lm_head");
            assert_eq!(linear.weight.as_packed().is_some(), name != "lm_head", "{name}");
        });
        assert_eq!(packed(&model).len(), projections, "{name}");
        assert!(report.packed_parameters > 0);
    }
}

/// A model of SmolLM2's widths with one block and few tokens.
fn smollm2() -> TempDir {
    let dir = directory(json!({
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 96, "tie_word_embeddings": true,
    }));
    let mut shapes: Vec<(String, Vec<usize>)> =
        vec![("model.embed_tokens.weight".into(), vec![96, 576]), ("model.norm.weight".into(), vec![576])];
    for (name, shape) in [
        ("self_attn.q_proj", vec![576, 576]),
        ("self_attn.k_proj", vec![192, 576]),
        ("self_attn.v_proj", vec![192, 576]),
        ("self_attn.o_proj", vec![576, 576]),
        ("mlp.gate_proj", vec![1536, 576]),
        ("mlp.up_proj", vec![1536, 576]),
        ("mlp.down_proj", vec![576, 1536]),
        ("input_layernorm", vec![576]),
        ("post_attention_layernorm", vec![576]),
    ] {
        shapes.push((format!("model.layers.0.{name}.weight"), shape));
    }
    let tensors: Tensors = shapes
        .into_iter()
        .map(|(name, shape)| {
            let numbers = (0..shape.iter().product::<usize>()).map(|i| ((i * 7919) as f32).sin() * 0.02);
            (name, Dtype::F32, shape, numbers.flat_map(f32::to_le_bytes).collect())
        })
        .collect();
    write(&dir.path().join("model.safetensors"), &tensors);
    dir
}

#[test]
fn a_weight_takes_the_bits_that_its_format_promises() {
    let dir = smollm2();
    for (scheme, bits) in [
        (scheme(QuantKind::Nf4, false), 4.5),
        (scheme(QuantKind::Fp4, false), 4.5),
        (scheme(QuantKind::Nf4, true), 4.127),
        (scheme(QuantKind::Fp4, true), 4.127),
        // A scale for each of 5,184 rows.
        (Scheme::Int8, 8.0 + 32.0 * 5184.0 / 3_538_944.0),
    ] {
        let (model, report) = load_dir(dir.path(), &packing(scheme, &[]));
        assert_eq!(report.packed_parameters, 3_538_944);
        let found = report.packed_bytes as f64 * 8.0 / report.packed_parameters as f64;
        assert!((found - bits).abs() < 1e-3, "{scheme}: {found} bits");
        let mut on_device = 0;
        model.projections(&mut |_, linear| on_device += linear.weight.as_packed().map_or(0, |packed| packed.bytes()));
        assert!((on_device as f64 / report.packed_bytes as f64 - 1.0).abs() < 1e-3, "{scheme}: {on_device} bytes");
    }
}

#[test]
fn numbers_that_cannot_be_packed_name_their_tensor() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for kind in [QuantKind::Nf4, QuantKind::Fp4, QuantKind::Int8] {
            let mut tensors = read_tensors(&fixture("llama").join("model.safetensors"));
            let name = "model.layers.1.mlp.up_proj.weight";
            find(&mut tensors, name).3[32 * 4 * 3 + 8..][..4].copy_from_slice(&bad.to_le_bytes());
            let dir = directory(json!({}));
            write(&dir.path().join("model.safetensors"), &tensors);
            let (error, text) = refused(dir.path(), &packing(scheme(kind, true), &["lm_head"]));
            assert!(matches!(error, LoadError::Pack { .. }), "{text}");
            assert!(text.contains("model.safetensors: `") && text.contains(name), "{text}");
            assert!(text.contains("[3, 2]"), "{text}");
            load_dir(dir.path(), &packing(scheme(kind, true), &["lm_head", "up_proj"]));
        }
    }
}
