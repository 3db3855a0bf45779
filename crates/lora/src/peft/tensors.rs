//! `adapter_model.safetensors`, on the host.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use emberlora_quant::{FloatDtype, convert};
use safetensors::tensor::View;
use safetensors::{Dtype, SafeTensors};

use super::PeftError;

/// What PEFT puts before the name of a module.
const PREFIX: &str = "base_model.model.";

/// A tensor of an adapter file, in f32.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, row-major.
    pub values: Vec<f32>,
}

/// The key of A of a module: `base_model.model.<module>.lora_A.weight`.
pub(super) fn key_a(module: &str) -> String {
    format!("{PREFIX}{module}.lora_A.weight")
}

/// The key of B of a module: `base_model.model.<module>.lora_B.weight`.
pub(super) fn key_b(module: &str) -> String {
    format!("{PREFIX}{module}.lora_B.weight")
}

/// The key under which PEFT also stores the base weight of an adapted head.
pub(super) fn key_base_weight(module: &str) -> String {
    format!("{PREFIX}{module}.base_layer.weight")
}

/// Reads a file; f16 and bf16 become f32, which is exact.
pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<BTreeMap<String, HostTensor>, PeftError> {
    let file =
        SafeTensors::deserialize(bytes).map_err(|source| PeftError::Malformed { path: path.to_owned(), source })?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        let refuse =
            |reason: String| PeftError::UnsupportedTensor { path: path.to_owned(), tensor: name.to_owned(), reason };
        check_name(name).map_err(|reason| refuse(reason.to_owned()))?;
        let dtype = match view.dtype() {
            Dtype::F32 => FloatDtype::F32,
            Dtype::F16 => FloatDtype::F16,
            Dtype::BF16 => FloatDtype::Bf16,
            other => return Err(refuse(format!("it is stored as {other:?}; expected F32, F16 or BF16"))),
        };
        let data = convert(view.data(), dtype, FloatDtype::F32).map_err(|error| refuse(error.to_string()))?;
        let values = data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        tensors.insert(name.to_owned(), HostTensor { shape: view.shape().to_vec(), values });
    }
    Ok(tensors)
}

/// Tensors of other kinds of adapters, recognised to say what they are.
fn check_name(name: &str) -> Result<(), &'static str> {
    const FOREIGN: &[(&str, &str)] = &[
        (".lora_embedding_", "it adapts an embedding; only linear layers can be adapted"),
        (".lora_magnitude_vector", "it is the magnitude of DoRA, which is not supported"),
        (".lora_B.bias", "it is a bias of the adapter (`lora_bias`), which is not supported"),
        (".modules_to_save.", "it replaces a module of the base model (`modules_to_save`), which is not supported"),
    ];
    match FOREIGN.iter().find(|(part, _)| name.contains(part)) {
        Some((_, reason)) => Err(reason),
        None => Ok(()),
    }
}

/// The bytes of a file, with the metadata that PEFT writes.
pub(super) fn render(tensors: &BTreeMap<String, HostTensor>, path: &Path) -> Result<Vec<u8>, PeftError> {
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(tensors, Some(metadata))
        .map_err(|source| PeftError::Malformed { path: path.to_owned(), source })
}

impl View for &HostTensor {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>().into()
    }

    fn data_len(&self) -> usize {
        self.values.len() * size_of::<f32>()
    }
}
