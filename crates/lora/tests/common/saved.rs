//! An adapter directory, and ways to spoil it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use emberlora_lora::peft::{self, PeftError};
use emberlora_lora::{LoraOptions, Targets, attach};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use tempfile::TempDir;

use super::{Tiny, fill_b, options};

/// A saved adapter, and the model it came from.
pub struct Saved {
    pub dir: TempDir,
    pub model: Tiny,
    pub options: LoraOptions,
}

impl Saved {
    pub fn new(options: LoraOptions) -> Self {
        let (device, dir) = (Device::flex(), tempfile::tempdir().unwrap());
        let mut model = Tiny::new(&device);
        attach(&mut model, &options, &device).unwrap();
        fill_b(&mut model);
        peft::save(&model, &options, "tiny", None, &dir.path().join("adapter")).unwrap();
        Self { dir, model, options }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("adapter")
    }

    pub fn edit_config(&self, key: &str, value: Value) {
        let path = self.path().join(peft::CONFIG_FILE);
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config[key] = value;
        fs::write(path, config.to_string()).unwrap();
    }

    /// Rewrites the tensor file; `edit` maps name, shape and values to what is stored, or to nothing.
    pub fn edit_tensors(&self, edit: impl Fn(String, Vec<usize>, Vec<f32>) -> Option<Stored>) {
        let adapter = peft::load(&self.path()).unwrap();
        let stored: Vec<Stored> =
            adapter.tensors.into_iter().filter_map(|(name, t)| edit(name, t.shape, t.values)).collect();
        write_tensors(&self.path(), &stored);
    }

    pub fn load(&self) -> Result<peft::PeftAdapter, PeftError> {
        peft::load(&self.path())
    }

    /// Loads the adapter and applies it to a fresh model.
    pub fn apply(&self) -> Result<Tiny, PeftError> {
        let device = Device::flex();
        let mut model = Tiny::new(&device);
        peft::apply(&mut model, &self.load()?, &device)?;
        Ok(model)
    }

    pub fn refusal(&self) -> String {
        match self.apply() {
            Ok(_) => panic!("the adapter was accepted"),
            Err(error) => error.to_string(),
        }
    }
}

/// A tensor as it lies in a file.
pub struct Stored {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

impl Stored {
    pub fn f32(name: String, shape: Vec<usize>, values: &[f32]) -> Self {
        Self { name, dtype: Dtype::F32, shape, bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect() }
    }
}

pub fn write_tensors(dir: &Path, stored: &[Stored]) {
    let views = stored.iter().map(|s| (s.name.as_str(), TensorView::new(s.dtype, s.shape.clone(), &s.bytes).unwrap()));
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    fs::write(dir.join(peft::TENSORS_FILE), safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
}

pub fn plain() -> LoraOptions {
    options(2, Targets::AllLinear)
}
