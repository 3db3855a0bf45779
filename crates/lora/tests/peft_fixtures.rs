//! Adapters that PEFT wrote, read and written back: the tensors byte for byte, the configuration value for value.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use emberlora_lora::{LoraLinear, Projections, Targets, attach, peft};
use serde_json::Value;

/// Projections with the names and shapes of a fixture's model, without the rest of it.
struct Skeleton(Vec<(String, LoraLinear)>);

impl Skeleton {
    fn new(family: &str, device: &Device) -> Self {
        let block: &[(&str, [usize; 2])] = match family {
            "phi3" => &[
                ("self_attn.qkv_proj", [64, 32]),
                ("self_attn.o_proj", [32, 32]),
                ("mlp.gate_up_proj", [128, 32]),
                ("mlp.down_proj", [32, 64]),
            ],
            _ => &[
                ("self_attn.q_proj", [32, 32]),
                ("self_attn.k_proj", [16, 32]),
                ("self_attn.v_proj", [16, 32]),
                ("self_attn.o_proj", [32, 32]),
                ("mlp.gate_proj", [64, 32]),
                ("mlp.up_proj", [64, 32]),
                ("mlp.down_proj", [32, 64]),
            ],
        };
        let linear = |shape: [usize; 2]| LoraLinear::new(Tensor::zeros(shape, device), None);
        let mut all = Vec::new();
        for layer in 0..2 {
            all.extend(block.iter().map(|(name, shape)| (format!("model.layers.{layer}.{name}"), linear(*shape))));
        }
        all.push(("lm_head".to_owned(), linear([96, 32])));
        Self(all)
    }
}

impl Projections for Skeleton {
    fn projections(&self, f: &mut dyn FnMut(&str, &LoraLinear)) {
        self.0.iter().for_each(|(name, linear)| f(name, linear));
    }

    fn visit_projections(&mut self, f: &mut dyn FnMut(&str, &mut LoraLinear)) {
        self.0.iter_mut().for_each(|(name, linear)| f(name, linear));
    }
}

fn fixture(family: &str, case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(family).join("train").join(case)
}

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("adapter_config.json")).unwrap()).unwrap()
}

fn check_round_trip(family: &str, case: &str) {
    let device = Device::flex();
    for stage in ["adapter_init", "adapter_final"] {
        let source = fixture(family, case).join(stage);
        let adapter = peft::load(&source).unwrap();
        assert!(adapter.warnings.is_empty(), "{:?}", adapter.warnings);
        let mut model = Skeleton::new(family, &device);
        let report = peft::apply(&mut model, &adapter, &device).unwrap();
        let stored: usize = adapter.tensors.values().map(|tensor| tensor.values.len()).sum();
        assert_eq!(report.trainable_parameters, stored, "{family} {case}");

        let dir = tempfile::tempdir().unwrap();
        let copy = dir.path().join("adapter");
        let name = adapter.base_model_name.as_deref().unwrap();
        peft::save(&model, &adapter.options, name, adapter.revision.as_deref(), &copy).unwrap();
        assert_eq!(config(&copy), config(&source), "{family} {case}");
        let bytes = |dir: &Path| fs::read(dir.join("adapter_model.safetensors")).unwrap();
        assert!(bytes(&copy) == bytes(&source), "{family} {case}: the tensor files differ");
    }
}

#[test]
fn adapters_of_every_kind_come_back_as_peft_wrote_them() {
    for case in ["default", "rslora", "patterns", "layers", "weight_decay"] {
        check_round_trip("llama", case);
    }
    check_round_trip("phi3", "default");
}

#[test]
fn the_file_has_the_keys_of_peft_in_its_order() {
    let device = Device::flex();
    let dir = tempfile::tempdir().unwrap();
    let mut model = Skeleton::new("llama", &device);
    let options = common::options(4, Targets::AllLinear);
    attach(&mut model, &options, &device).unwrap();
    peft::save(&model, &options, "some/model", Some("main"), &dir.path().join("a")).unwrap();
    let (ours, theirs) = (config(&dir.path().join("a")), config(&fixture("llama", "default").join("adapter_init")));
    let keys = |config: &Value| config.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&ours), keys(&theirs));
    let all = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"];
    assert_eq!(ours["target_modules"], serde_json::json!(all));
    assert_eq!(ours["revision"], "main");
    assert_eq!(ours["base_model_name_or_path"], "some/model");
}

#[test]
fn scales_follow_the_patterns_as_in_peft() {
    let device = Device::flex();
    let mut model = Skeleton::new("llama", &device);
    let adapter = peft::load(&fixture("llama", "patterns").join("adapter_init")).unwrap();
    let report = peft::apply(&mut model, &adapter, &device).unwrap();
    let found: Vec<(&str, usize, f32)> =
        report.modules.iter().map(|m| (m.name.trim_start_matches("model.layers."), m.rank, m.scale)).collect();
    let expected = [
        ("0.self_attn.q_proj", 4, 4.0),
        ("0.self_attn.v_proj", 3, 8.0 / 3.0),
        ("0.mlp.down_proj", 6, 5.0 / 6.0),
        ("1.self_attn.q_proj", 4, 2.0),
        ("1.self_attn.v_proj", 3, 8.0 / 3.0),
        ("1.mlp.down_proj", 2, 2.5),
    ];
    assert_eq!(found, expected);
}
