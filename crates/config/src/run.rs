//! The recipe as a whole.

use std::path::PathBuf;

use crate::adapter::AdapterSection;
use crate::choices::{CheckpointingSpec, GradientCheckpointing};
use crate::data::DataSection;
use crate::device::{DeviceChoice, Devices, DevicesSpec};
use crate::model::ModelSection;
use crate::node::Node;
use crate::quantization::{QuantizationSection, QuantizationSpec};
use crate::spec::{Below, Field, Reader, Section, computed, join, nested, optional, path, section, value, whole};
use crate::train::TrainSection;

section! {
    /// One run: what a recipe says, checked as a whole.
    pub struct RunConfig {
        /// The base model. Its weights are never changed.
        model: ModelSection = nested() => section();
        /// The LoRA adapters.
        adapter: AdapterSection = nested() => section();
        /// Packed storage of the frozen weights: QLoRA. Embeddings and norms are never packed, nor is a head that is tied to
        /// the embedding; a model that is already quantised must have been quantised like this. `null` keeps the weights as
        /// `model.dtype` says.
        quantization: Option<QuantizationSection> = value(None) => optional(QuantizationSpec);
        /// Recompute activations in the backward pass to save memory: `none`, every `block`, groups of about `sqrt` of
        /// their number, or of `{every: n}` blocks, the last of which is kept. `true` means `block` and `false` means
        /// `none`. The gradients are the same.
        gradient_checkpointing: GradientCheckpointing = value(GradientCheckpointing::None) => CheckpointingSpec;
        /// The rows to train and evaluate on.
        data: DataSection = nested() => section();
        /// The training loop.
        train: TrainSection = nested() => section();
        /// Directory that the run writes to: `config.yaml`, `metrics.jsonl`, `adapter/`.
        output: PathBuf = computed("runs/<name of the recipe file>", |name| PathBuf::from("runs").join(name)) => path();
        /// Where tensors live, among what `emberlora devices` lists. `auto` is the first CUDA device, else the first wgpu
        /// adapter with a GPU behind it, else flex; never a software adapter and never ndarray. `wgpu:1` and `cuda:0` pick
        /// one of several. What is not compiled in or not found is an error that says which feature or driver is missing.
        /// `remote://HOST:PORT` is the device that an `emberlora serve` elsewhere hosts, `remote://HOST:PORT/1` its second
        /// one. The micro-batches of a step are divided among the devices of a list, which changes its numbers by rounding
        /// only; the first one also updates the adapters, evaluates and generates.
        device: Devices = value(DeviceChoice::Auto.into()) => DevicesSpec;
        /// Every random number of the run follows from it.
        seed: u64 = value(42) => whole();
    }
    check check_run;
}

fn check_run(run: &mut RunConfig, node: &Node, reader: &mut Reader<'_>) {
    check_evaluation(run, node, reader);
    check_devices(run, node, reader);
}

fn check_devices(run: &RunConfig, node: &Node, reader: &mut Reader<'_>) {
    let (devices, micro_batches) = (run.device.all().len(), run.train.grad_accumulation);
    if devices > micro_batches {
        reader.conflict(
            node,
            "train.grad_accumulation",
            &format!("{devices} devices share the {micro_batches} of a step's micro-batches, so some would have none"),
            &format!("{devices} or more, best a multiple of it; lower `train.batch_size` to keep the batch of a step"),
        );
    }
}

fn check_evaluation(run: &RunConfig, node: &Node, reader: &mut Reader<'_>) {
    // A list with a mistake in it reads as no rows at all, so what was written decides.
    let eval = node.get("data").and_then(|data| data.get("eval"));
    if run.train.eval_every.is_some() && eval.is_none_or(|eval| eval.is_null() || eval.is_empty_list()) {
        reader.conflict(
            node,
            "train.eval_every",
            "there is nothing to evaluate on: `data.eval` is null or empty",
            "null, or rows in `data.eval`",
        );
    }
}

/// The path of a key that stands somewhere else than where it was written, if exactly one has this name.
pub(crate) fn path_of_key(key: &str) -> Option<String> {
    let mut paths = Vec::new();
    collect_paths(&RunConfig::fields(), "", key, &mut paths);
    match paths.as_slice() {
        [only] => Some(only.clone()),
        _ => None,
    }
}

fn collect_paths(fields: &[Field], above: &str, key: &str, paths: &mut Vec<String>) {
    for field in fields {
        let path = join(above, field.key);
        if let Below::Section(below) = &field.below {
            collect_paths(below, &path, key, paths);
        }
        if field.key == key {
            paths.push(path);
        }
    }
}
