//! What the tests of training in step with PEFT share: the layout of the cases, and ten steps along one of them.

#![allow(dead_code, reason = "no test file uses all of it")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor};
use emberlora::data::{Batch, Document, RowRef};
use emberlora::lora::{Exclude, LoraOptions, Projections, Targets, peft};
use emberlora::model::{CausalLm, QuantizationOptions};
use emberlora::quant::{BlockSize, Scheme};
use emberlora::train::{AdamW, Decay, LrSchedule, StepGradients, TrainState};
use safetensors::SafeTensors;
use serde::Deserialize;

#[derive(Deserialize)]
pub struct Case {
    pub lora: Lora,
    pub optimizer: OptimizerCase,
    pub schedule: ScheduleCase,
    pub trainable_parameters: usize,
    pub losses: Vec<f64>,
    pub grad_norms: Vec<f64>,
    pub lrs: Vec<f64>,
    pub steps: Vec<Vec<MicroBatch>>,
    /// How the base is packed.
    pub quantization: Option<QuantizationCase>,
    /// How far the loss of each step moves when the adapter begins a millionth off, where that matters.
    pub sensitivities: Option<Vec<f64>>,
}

#[derive(Deserialize)]
pub struct QuantizationCase {
    pub kind: String,
    #[serde(default)]
    pub double_quant: bool,
    #[serde(default)]
    pub threshold: f32,
}

#[derive(Deserialize)]
pub struct Lora {
    r: usize,
    alpha: f64,
    targets: TargetsCase,
    rslora: bool,
    rank_pattern: serde_json::Map<String, serde_json::Value>,
    alpha_pattern: serde_json::Map<String, serde_json::Value>,
    layers: Option<Vec<usize>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
pub enum TargetsCase {
    Text(String),
    List(Vec<String>),
}

#[derive(Deserialize)]
pub struct OptimizerCase {
    lr: f64,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    max_grad_norm: Option<f64>,
}

#[derive(Deserialize)]
pub struct ScheduleCase {
    kind: String,
    warmup_steps: usize,
    min_ratio: f64,
    total_steps: usize,
}

#[derive(Deserialize)]
pub struct MicroBatch {
    input_ids: Vec<Vec<u32>>,
    labels: Vec<Vec<i64>>,
}

impl QuantizationCase {
    pub fn options(&self) -> QuantizationOptions {
        let scheme = Scheme::new(self.kind.parse().unwrap(), BlockSize::default(), self.double_quant);
        QuantizationOptions::new(scheme, vec!["lm_head".to_owned()], self.threshold)
    }
}

impl Lora {
    pub fn options(&self) -> LoraOptions {
        LoraOptions {
            r: self.r,
            alpha: self.alpha,
            dropout: 0.0,
            targets: match &self.targets {
                TargetsCase::Text(text) if text == "all-linear" => Targets::AllLinear,
                TargetsCase::Text(pattern) => Targets::Regex(pattern.clone()),
                TargetsCase::List(names) => Targets::Suffixes(names.clone()),
            },
            exclude: Exclude::default(),
            layers: self.layers.clone(),
            layers_pattern: Vec::new(),
            rank_pattern: self.rank_pattern.iter().map(|(k, v)| (k.clone(), v.as_u64().unwrap() as usize)).collect(),
            alpha_pattern: self.alpha_pattern.iter().map(|(k, v)| (k.clone(), v.as_f64().unwrap())).collect(),
            rslora: self.rslora,
            seed: 0,
        }
    }
}

impl MicroBatch {
    pub fn documents(&self) -> Vec<Document> {
        let rows = self.input_ids.iter().zip(&self.labels).enumerate();
        rows.map(|(line, (ids, labels))| {
            let trained = labels.iter().map(|&label| label != -100).collect();
            Document::new(ids.clone(), trained, RowRef::new(Arc::from(Path::new("case.json")), line + 1), None)
        })
        .collect()
    }

    pub fn batch(&self) -> Batch {
        batch_of(&self.documents())
    }
}

pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The case of a directory.
pub fn read_case(dir: &Path) -> Case {
    serde_json::from_str(&fs::read_to_string(dir.join("case.json")).unwrap()).unwrap()
}

pub fn device() -> Device {
    Device::flex().autodiff()
}

/// Puts the saved adapter of `dir` on a model.
pub fn with_adapter(mut model: CausalLm, dir: &Path, device: &Device) -> CausalLm {
    peft::apply(&mut model, &peft::load(dir).unwrap(), device).unwrap();
    model
}

pub fn state(model: CausalLm, case: &Case) -> TrainState {
    let OptimizerCase { lr, betas, eps, weight_decay, max_grad_norm } = case.optimizer;
    let ScheduleCase { kind, warmup_steps, min_ratio, total_steps } = &case.schedule;
    let decay = match kind.as_str() {
        "constant" => Decay::Constant,
        "linear" => Decay::Linear,
        "cosine" => Decay::Cosine,
        other => panic!("unknown schedule {other}"),
    };
    let schedule = LrSchedule::new(lr, decay, *warmup_steps, *total_steps, *min_ratio);
    TrainState::new(model, AdamW { betas, eps, weight_decay }, schedule, max_grad_norm, 0).unwrap()
}

/// One document per row.
pub fn batch_of(documents: &[Document]) -> Batch {
    Batch::new(&documents.iter().map(|document| vec![document]).collect::<Vec<_>>(), 0)
}

pub type Tensors = BTreeMap<String, Vec<f32>>;

pub fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let numbers = |data: &[u8]| data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    tensors.iter().map(|(name, view)| (name.to_owned(), numbers(view.data()))).collect()
}

fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

/// A number for each A and B, under PEFT's names.
fn by_peft_name(model: &CausalLm, of: impl Fn(&Param<Tensor<2>>) -> Vec<f32>) -> Tensors {
    let mut tensors = Tensors::new();
    model.projections(&mut |name, linear| {
        if let Some(adapter) = &linear.adapter {
            for (factor, param) in [("lora_A", &adapter.a), ("lora_B", &adapter.b)] {
                tensors.insert(format!("base_model.model.{name}.{factor}.weight"), of(param));
            }
        }
    });
    tensors
}

pub fn factors(model: &CausalLm) -> Tensors {
    by_peft_name(model, |param| values(param.val().inner()))
}

fn gradients(model: &CausalLm, grads: &GradientsParams) -> Tensors {
    by_peft_name(model, |param| values(grads.get::<2>(param.id).expect("every factor has a gradient")))
}

/// The bits of every parameter that is not trained, and there is nothing else than these and the factors.
fn frozen_bits(model: &CausalLm) -> Vec<Vec<u8>> {
    struct Frozen(Vec<Vec<u8>>);
    impl ModuleVisitor for Frozen {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if !param.is_require_grad() {
                self.0.push(param.val().into_data().as_bytes().to_vec());
            }
        }

        fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
            self.0.push(param.val().into_data().as_bytes().to_vec());
        }
    }
    let mut frozen = Frozen(Vec::new());
    model.visit(&mut frozen);
    frozen.0
}

pub fn largest(values: &[f32]) -> f64 {
    values.iter().fold(0.0, |most, value| most.max(f64::from(value.abs())))
}

pub fn largest_difference(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    // `max` alone would pass over what is not a number.
    let differences = a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs()));
    differences.fold(0.0, |most, difference| if difference.is_nan() { f64::INFINITY } else { most.max(difference) })
}

/// The largest difference between tensors of the same names; `relative` measures it in the tensor's largest element.
pub fn compare(context: &str, found: &Tensors, expected: &Tensors, relative: bool, tolerance: f64) -> f64 {
    assert!(found.keys().eq(expected.keys()), "{context}: other tensors than expected");
    let mut most = 0f64;
    for (name, expected) in expected {
        let scale = if relative { largest(expected) } else { 1.0 };
        let difference = largest_difference(&found[name], expected) / scale;
        assert!(difference <= tolerance, "{context}: {name} is off by {difference:.2e}, allowed {tolerance:.0e}");
        most = most.max(difference);
    }
    most
}

pub fn first_gradients(state: &mut TrainState, batches: &[Batch]) -> (f64, Tensors) {
    let StepGradients { losses, grads } = state.gradients(batches).unwrap().unwrap();
    let losses: Vec<f32> = losses.into_data().try_to_vec().unwrap();
    (losses.into_iter().map(f64::from).sum(), gradients(state.model(), &grads))
}

/// How far a run may be from PEFT's.
pub struct Tolerances {
    /// Of the loss, at each step.
    pub losses: Vec<f64>,
    /// Of the gradient's norm, relative.
    pub norm: f64,
    /// Of the first step's gradients, relative to the largest element of each.
    pub gradients: f64,
    /// Of A and B after the last step.
    pub factors: f64,
}

/// Takes the ten steps of the case in `dir` with a model that carries the adapter it begins with.
pub fn follow(context: &str, dir: &Path, case: &Case, model: CausalLm, allowed: &Tolerances) {
    let started = read_tensors(&dir.join("adapter_init/adapter_model.safetensors"));
    compare(context, &factors(&model), &started, false, 0.0);
    let frozen = frozen_bits(&model);
    assert!(frozen.len() > 10, "{context}: {} frozen tensors", frozen.len());
    let mut state = state(model, case);

    let steps: Vec<Vec<Batch>> = case.steps.iter().map(|step| step.iter().map(MicroBatch::batch).collect()).collect();
    let (_, found) = first_gradients(&mut state, &steps[0]);
    let expected = read_tensors(&dir.join("gradients.safetensors"));
    let gradient = compare(context, &found, &expected, true, allowed.gradients);

    let (mut loss, mut norm) = (0f64, 0f64);
    for (index, batches) in steps.iter().enumerate() {
        let outcome = state.step(batches).unwrap().unwrap();
        let off = [
            ("loss", (outcome.loss - case.losses[index]).abs(), allowed.losses[index]),
            ("norm", (outcome.grad_norm / case.grad_norms[index] - 1.0).abs(), allowed.norm),
            ("rate", (outcome.lr - case.lrs[index]).abs(), 1e-12),
        ];
        for (what, off, tolerance) in off {
            assert!(off <= tolerance, "{context} step {}: the {what} is off by {off:.2e}", index + 1);
        }
        (loss, norm) = (loss.max(off[0].1), norm.max(off[1].1));
    }
    let expected = read_tensors(&dir.join("adapter_final/adapter_model.safetensors"));
    let factor = compare(context, &factors(state.model()), &expected, false, allowed.factors);
    assert!(frozen_bits(state.model()) == frozen, "{context}: training changed a frozen weight");
    println!("{context}: loss {loss:.1e}, norm {norm:.1e}, gradient {gradient:.1e}, factors {factor:.1e}");
}
