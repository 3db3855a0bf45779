//! Training in step with transformers and PEFT: `fixtures/make_families.py` made the models, the batches and the numbers.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use emberlora::data::{Batch, Document, RowRef};
use emberlora::lora::{Exclude, LoraOptions, Projections, Targets, attach, peft};
use emberlora::model::{AttentionKind, CausalLm, Checkpointing, LoadOptions};
use emberlora::quant::FloatDtype;
use emberlora::train::{AdamW, Decay, LrSchedule, StepGradients, TrainState};
use safetensors::SafeTensors;
use serde::Deserialize;

const FAMILIES: [&str; 7] = ["llama", "llama3", "qwen2", "qwen3", "mistral", "olmo2", "phi3"];

#[derive(Deserialize)]
struct Case {
    lora: Lora,
    optimizer: OptimizerCase,
    schedule: ScheduleCase,
    trainable_parameters: usize,
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
    lrs: Vec<f64>,
    steps: Vec<Vec<MicroBatch>>,
}

#[derive(Deserialize)]
struct Lora {
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
enum TargetsCase {
    Text(String),
    List(Vec<String>),
}

#[derive(Deserialize)]
struct OptimizerCase {
    lr: f64,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
    max_grad_norm: Option<f64>,
}

#[derive(Deserialize)]
struct ScheduleCase {
    kind: String,
    warmup_steps: usize,
    min_ratio: f64,
    total_steps: usize,
}

#[derive(Deserialize)]
struct MicroBatch {
    input_ids: Vec<Vec<u32>>,
    labels: Vec<Vec<i64>>,
}

impl Lora {
    fn options(&self) -> LoraOptions {
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
    fn documents(&self) -> Vec<Document> {
        let rows = self.input_ids.iter().zip(&self.labels).enumerate();
        rows.map(|(line, (ids, labels))| {
            let trained = labels.iter().map(|&label| label != -100).collect();
            Document::new(ids.clone(), trained, RowRef::new(Arc::from(Path::new("case.json")), line + 1), None)
        })
        .collect()
    }

    fn batch(&self) -> Batch {
        batch_of(&self.documents())
    }
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn case(family: &str, name: &str) -> (PathBuf, Case) {
    let dir = fixtures().join(family).join("train").join(name);
    let case = serde_json::from_str(&fs::read_to_string(dir.join("case.json")).unwrap()).unwrap();
    (dir, case)
}

fn device() -> Device {
    Device::flex().autodiff()
}

fn model(family: &str, attention: AttentionKind) -> CausalLm {
    let options = LoadOptions { dtype: None, compute_dtype: FloatDtype::F32, attention };
    CausalLm::load(&fixtures().join(family), &options, &device()).unwrap().0
}

fn adapted(family: &str, adapter: &Path, attention: AttentionKind) -> CausalLm {
    adapted_on(family, adapter, attention, &device())
}

fn adapted_on(family: &str, adapter: &Path, attention: AttentionKind, device: &Device) -> CausalLm {
    let mut model = model(family, attention);
    peft::apply(&mut model, &peft::load(adapter).unwrap(), device).unwrap();
    model
}

fn state(model: CausalLm, case: &Case) -> TrainState {
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
fn batch_of(documents: &[Document]) -> Batch {
    Batch::new(&documents.iter().map(|document| vec![document]).collect::<Vec<_>>(), 0)
}

type Tensors = BTreeMap<String, Vec<f32>>;

fn read_tensors(path: &Path) -> Tensors {
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

fn factors(model: &CausalLm) -> Tensors {
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
    }
    let mut frozen = Frozen(Vec::new());
    model.visit(&mut frozen);
    frozen.0
}

fn largest(values: &[f32]) -> f64 {
    values.iter().fold(0.0, |most, value| most.max(f64::from(value.abs())))
}

fn largest_difference(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    // `max` alone would pass over what is not a number.
    let differences = a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs()));
    differences.fold(0.0, |most, difference| if difference.is_nan() { f64::INFINITY } else { most.max(difference) })
}

/// The largest difference between tensors of the same names; `relative` measures it in the tensor's largest element.
fn compare(context: &str, found: &Tensors, expected: &Tensors, relative: bool, tolerance: f64) -> f64 {
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

fn first_gradients(state: &mut TrainState, batches: &[Batch]) -> (f64, Tensors) {
    let StepGradients { losses, grads } = state.gradients(batches).unwrap().unwrap();
    let losses: Vec<f32> = losses.into_data().try_to_vec().unwrap();
    (losses.into_iter().map(f64::from).sum(), gradients(state.model(), &grads))
}

fn check(family: &str, name: &str, attention: AttentionKind) {
    let context = format!("{family}/{name}");
    let (dir, case) = case(family, name);
    let model = adapted(family, &dir.join("adapter_init"), attention);
    compare(&context, &factors(&model), &read_tensors(&dir.join("adapter_init/adapter_model.safetensors")), false, 0.0);
    let frozen = frozen_bits(&model);
    assert!(frozen.len() > 10, "{context}: {} frozen tensors", frozen.len());
    let mut state = state(model, &case);

    let steps: Vec<Vec<Batch>> = case.steps.iter().map(|step| step.iter().map(MicroBatch::batch).collect()).collect();
    let (_, found) = first_gradients(&mut state, &steps[0]);
    let gradient = compare(&context, &found, &read_tensors(&dir.join("gradients.safetensors")), true, 1e-5);

    let (mut loss, mut norm) = (0f64, 0f64);
    for (index, batches) in steps.iter().enumerate() {
        let outcome = state.step(batches).unwrap().unwrap();
        let off = [
            (outcome.loss - case.losses[index]).abs(),
            (outcome.grad_norm / case.grad_norms[index] - 1.0).abs(),
            (outcome.lr - case.lrs[index]).abs(),
        ];
        for (what, off, tolerance) in [("loss", off[0], 1e-4), ("norm", off[1], 1e-3), ("rate", off[2], 1e-12)] {
            assert!(off <= tolerance, "{context} step {}: the {what} is off by {off:.2e}", index + 1);
        }
        (loss, norm) = (loss.max(off[0]), norm.max(off[1]));
    }
    let expected = read_tensors(&dir.join("adapter_final/adapter_model.safetensors"));
    let factor = compare(&context, &factors(state.model()), &expected, false, 1e-4);
    assert!(frozen_bits(state.model()) == frozen, "{context}: training changed a frozen weight");
    println!("{context}: loss {loss:.1e}, norm {norm:.1e}, gradient {gradient:.1e}, factors {factor:.1e}");
}

fn cases(family: &str) -> Vec<String> {
    let entries = fs::read_dir(fixtures().join(family).join("train")).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn ten_steps_of_every_family_follow_peft() {
    for family in FAMILIES {
        check(family, "default", AttentionKind::Fused);
    }
}

#[test]
fn ten_steps_with_eager_attention_follow_peft() {
    for family in FAMILIES {
        check(family, "default", AttentionKind::Eager);
    }
}

#[test]
fn ten_steps_of_every_llama_case_follow_peft() {
    let names = cases("llama");
    assert!(names.len() >= 9, "{names:?}");
    for name in names {
        check("llama", &name, AttentionKind::Fused);
    }
}

#[test]
fn the_rules_of_a_case_choose_what_peft_chose() {
    for family in FAMILIES {
        for name in cases(family) {
            let (dir, case) = case(family, &name);
            let mut fresh = model(family, AttentionKind::Fused);
            let report = attach(&mut fresh, &case.lora.options(), &device()).unwrap();
            assert_eq!(report.trainable_parameters, case.trainable_parameters, "{family}/{name}");
            let mut saved = model(family, AttentionKind::Fused);
            let loaded = peft::apply(&mut saved, &peft::load(&dir.join("adapter_init")).unwrap(), &device()).unwrap();
            assert_eq!(report.modules, loaded.modules, "{family}/{name}");
        }
    }
}

/// Documents of 24, 9, 9, 15, 15 and 15 tokens.
fn documents() -> Vec<Document> {
    let (_, case) = case("llama", "accumulation");
    case.steps[0].iter().flat_map(MicroBatch::documents).collect()
}

/// A llama adapter fits every model of llama's shape.
fn with_llama_adapter(family: &str) -> TrainState {
    let adapter = if family.starts_with("llama") { "llama" } else { family };
    let (dir, case) = case(adapter, "default");
    state(adapted(family, &dir.join("adapter_init"), AttentionKind::Fused), &case)
}

fn check_equal_gradients(context: &str, a: (f64, Tensors), b: (f64, Tensors)) {
    assert!((a.0 - b.0).abs() < 1e-5, "{context}: loss {} and {}", a.0, b.0);
    compare(context, &a.1, &b.1, true, 1e-5);
}

#[test]
fn packed_equals_unpacked() {
    let documents = documents();
    let [a, b, c, d, e, f] = &documents[..] else { panic!("six documents") };
    for family in FAMILIES.into_iter().chain(["llama_linear", "llama_dynamic", "llama_yarn"]) {
        let mut state = with_llama_adapter(family);
        let packed = Batch::new(&[vec![a, b, d], vec![e, c, f]], 0);
        let packed = first_gradients(&mut state, &[packed]);
        let unpacked = first_gradients(&mut state, &[batch_of(&documents)]);
        check_equal_gradients(family, packed, unpacked);
    }
}

#[test]
fn accumulation_equals_one_large_batch() {
    let documents = documents();
    for family in FAMILIES {
        let mut state = with_llama_adapter(family);
        let large = first_gradients(&mut state, &[batch_of(&documents)]);
        let parts = [batch_of(&documents[..1]), batch_of(&documents[1..5]), batch_of(&documents[5..])];
        let parts = first_gradients(&mut state, &parts);
        check_equal_gradients(family, large, parts);
    }
}

#[test]
fn gradient_checkpointing_changes_no_gradient() {
    let documents = documents();
    for family in FAMILIES {
        let (dir, case) = case(family, "default");
        let run = |device: Device, checkpointing| {
            let mut model = adapted_on(family, &dir.join("adapter_init"), AttentionKind::Fused, &device);
            model.set_checkpointing(checkpointing);
            first_gradients(&mut state(model, &case), &[batch_of(&documents)])
        };
        for checkpointing in [Checkpointing::Block, Checkpointing::Sqrt] {
            let recomputed = run(device().gradient_checkpointing(), checkpointing);
            check_equal_gradients(family, recomputed, run(device(), checkpointing));
        }
    }
}
