//! QLoRA in step with PEFT and bitsandbytes: `fixtures/quant/make_models.py` made the cases.

mod parity;

use burn::tensor::Device;
use emberlora::model::{AttentionKind, CausalLm, Checkpointing, LoadOptions};
use emberlora::quant::FloatDtype;
use parity::{Case, QuantizationCase, Tolerances, device, fixtures, follow, read_case, with_adapter};

const FAMILIES: [&str; 2] = ["llama", "qwen2"];

/// The family's dense model, packed while it is loaded.
fn packed(family: &str, case: &Case, device: &Device) -> CausalLm {
    let quantization = case.quantization.as_ref().map(QuantizationCase::options);
    assert!(quantization.is_some());
    let options = LoadOptions { quantization, ..LoadOptions::new(None, FloatDtype::F32, AttentionKind::Fused) };
    let (model, report) = CausalLm::load(&fixtures().join(family), &options, device).unwrap();
    assert!(report.packed_bytes > 0);
    model
}

/// Without gradient checkpointing, and with it.
fn check(family: &str, name: &str, allowed: impl Fn(&Case) -> Tolerances) {
    let dir = fixtures().join("quant").join(family).join("train").join(name);
    let case = read_case(&dir);
    for (how, device) in [("plain", device()), ("checkpointed", device().gradient_checkpointing())] {
        let mut model = with_adapter(packed(family, &case, &device), &dir.join("adapter_init"), &device);
        model.set_checkpointing(Checkpointing::Block);
        follow(&format!("{family}/{name}, {how}"), &dir, &case, model, &allowed(&case));
    }
}

#[test]
fn ten_steps_on_packed_weights_follow_peft_and_bitsandbytes() {
    let allowed =
        |case: &Case| Tolerances { losses: vec![1e-4; case.losses.len()], norm: 1e-3, gradients: 1e-5, factors: 1e-4 };
    for family in FAMILIES {
        for name in ["nf4", "nf4_double", "fp4", "int8"] {
            check(family, name, allowed);
        }
    }
}

/// A code of an activation jumps when the activation changes in its last bits, at another step in each implementation. Two
/// of them agree as far as one agrees with itself when it begins a millionth off.
#[test]
fn ten_steps_on_activations_in_eight_bits_follow_bitsandbytes_as_far_as_it_follows_itself() {
    let allowed = |case: &Case| {
        let limit = case.sensitivities.iter().flatten().fold(0.0, |most: f64, by| most.max(*by));
        assert!((1e-4..1e-3).contains(&limit));
        Tolerances { losses: vec![limit; case.losses.len()], norm: 1e-3, gradients: 1e-5, factors: 1e-3 }
    };
    for family in FAMILIES {
        check(family, "int8_activations", allowed);
    }
}
