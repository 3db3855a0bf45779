//! Ten steps on the Llama and Qwen2 fixtures, with gradient checkpointing off and on, beside transformers and PEFT.

use std::path::Path;

use burn::tensor::Device;
use emberlora::data::Batch;
use emberlora::model::{AttentionKind, CausalLm, Checkpointing, LoadOptions};
use emberlora::quant::FloatDtype;

use crate::backends::{Drift, Tested, Tolerance};
use crate::parity::{
    Case, MicroBatch, QuantizationCase, Tensors, factors, first_gradients, fixtures, largest, largest_difference,
    read_case, read_tensors, state, with_adapter,
};

/// The model of `family`, packed as the case says, with a saved adapter.
pub fn adapted(
    tested: &Tested,
    family: &str,
    case: &Case,
    adapter: &Path,
    compute: FloatDtype,
    device: &Device,
) -> CausalLm {
    let quantization = case.quantization.as_ref().map(QuantizationCase::options);
    let options = LoadOptions { quantization, ..LoadOptions::new(tested.weights, compute, AttentionKind::Fused) };
    let (model, _) = CausalLm::load(&fixtures().join(family), &options, device).unwrap();
    with_adapter(model, adapter, device)
}

/// What training went through.
struct Trace {
    gradients: Tensors,
    losses: Vec<f64>,
    norms: Vec<f64>,
    /// The adapter after each step.
    factors: Vec<Tensors>,
}

fn train(tested: &Tested, family: &str, dir: &Path, compute: FloatDtype, recompute: bool) -> Trace {
    let case = read_case(dir);
    let device = tested.device.clone().autodiff();
    let device = if recompute { device.gradient_checkpointing() } else { device };
    let mut model = adapted(tested, family, &case, &dir.join("adapter_init"), compute, &device);
    model.set_checkpointing(Checkpointing::Block);
    let mut state = state(model, &case);
    let steps: Vec<Vec<Batch>> = case.steps.iter().map(|step| step.iter().map(MicroBatch::batch).collect()).collect();
    let (_, gradients) = first_gradients(&mut state, &steps[0]);
    let mut trace = Trace { gradients, losses: Vec::new(), norms: Vec::new(), factors: Vec::new() };
    for batches in &steps {
        let outcome = state.step(batches).unwrap().unwrap();
        trace.losses.push(outcome.loss);
        trace.norms.push(outcome.grad_norm);
        trace.factors.push(factors(state.model()));
    }
    trace
}

/// Compares a trace with PEFT's numbers, which are of the first gradient, every loss and norm, and the last adapter;
/// and with `beside`, another backend's, after every step.
fn check(trace: &Trace, beside: Option<&Trace>, dir: &Path, context: &str, tolerance: &Tolerance) {
    let case = read_case(dir);
    let mut drift = Drift::default();
    let expected = read_tensors(&dir.join("gradients.safetensors"));
    assert!(trace.gradients.keys().eq(expected.keys()), "{context}: other tensors than expected");
    for (name, expected) in &expected {
        let difference = largest_difference(&trace.gradients[name], expected) / largest(expected);
        drift.note("step 1", &format!("gradient of {name}"), difference, tolerance.gradient);
    }
    let last = read_tensors(&dir.join("adapter_final/adapter_model.safetensors"));
    for (index, (loss, norm)) in case.losses.iter().zip(&case.grad_norms).enumerate() {
        let step = format!("step {}", index + 1);
        drift.note(&step, "loss", (trace.losses[index] - loss).abs(), tolerance.loss);
        drift.note(&step, "gradient norm", (trace.norms[index] / norm - 1.0).abs(), tolerance.norm);
        let expected = match index + 1 == case.losses.len() {
            true => Some(&last),
            false => beside.map(|beside| &beside.factors[index]),
        };
        for (name, expected) in expected.into_iter().flatten() {
            let difference = largest_difference(&trace.factors[index][name], expected);
            drift.note(&step, name, difference, tolerance.factors);
        }
    }
    drift.check(context, tolerance);
}

fn follow(tested: &Tested, family: &str, dir: &Path) {
    let beside = beside(family, dir);
    for tolerance in tested.tolerances() {
        for recompute in [false, true] {
            let trace = train(tested, family, dir, tolerance.compute, recompute);
            let checkpointing = if recompute { "on" } else { "off" };
            let context = format!("ten steps of {family}, gradient checkpointing {checkpointing}");
            check(&trace, beside.as_ref(), dir, &context, tolerance);
        }
    }
}

pub fn ten_lora_steps_follow_peft(tested: &Tested) {
    for family in ["llama", "qwen2"] {
        follow(tested, family, &fixtures().join(family).join("train/default"));
    }
}

pub fn ten_qlora_steps_follow_peft_and_bitsandbytes(tested: &Tested) {
    for family in ["llama", "qwen2"] {
        follow(tested, family, &fixtures().join("quant").join(family).join("train/nf4"));
    }
}

/// What flex goes through in f32, where it is compiled in: PEFT's adapter is known after the last step only.
fn beside(family: &str, dir: &Path) -> Option<Trace> {
    let flex = Tested::all().into_iter().find(|tested| tested.name == "flex")?;
    Some(train(&flex, family, dir, FloatDtype::F32, false))
}
