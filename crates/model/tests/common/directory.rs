//! Model directories that a test has changed.

use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::fixture;

/// Name, format, shape and bytes.
pub type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

/// The tensors of a file by name.
pub fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let copy = |(name, view): (&str, TensorView<'_>)| {
        (name.to_owned(), view.dtype(), view.shape().to_vec(), view.data().to_vec())
    };
    let mut all: Tensors = file.iter().map(copy).collect();
    all.sort();
    all
}

pub fn write(path: &Path, tensors: &[(String, Dtype, Vec<usize>, Vec<u8>)]) {
    let views =
        tensors.iter().map(|(name, dtype, shape, data)| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    fs::write(path, serialize(views, None).unwrap()).unwrap();
}

/// A directory with the llama fixture's config, changed, and no weights.
pub fn directory(changes: Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(fixture("llama").join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

pub fn find<'a>(tensors: &'a mut Tensors, name: &str) -> &'a mut (String, Dtype, Vec<usize>, Vec<u8>) {
    tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap()
}

/// A fixture and, in `adapter`, the adapter that its default training case begins with, made `layers` blocks deep: the two
/// blocks of the fixture by turns.
pub fn deeper(name: &str, layers: usize) -> TempDir {
    const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];
    let (dir, from) = (tempfile::tempdir().unwrap(), fixture(name));
    let repeat = |from: &Path, to: &Path| {
        let mut all = Tensors::new();
        for (name, dtype, shape, data) in read_tensors(from) {
            let Some((block, place)) = [0, 1]
                .map(|block| (block, format!(".layers.{block}.")))
                .into_iter()
                .find(|(_, place)| name.contains(place))
            else {
                all.push((name, dtype, shape, data));
                continue;
            };
            for layer in (block..layers).step_by(2) {
                all.push((name.replace(&place, &format!(".layers.{layer}.")), dtype, shape.clone(), data.clone()));
            }
        }
        write(to, &all);
    };
    let change = |from: &Path, to: &Path, change: &dyn Fn(&mut Value)| {
        let mut config = serde_json::from_str(&fs::read_to_string(from).unwrap()).unwrap();
        change(&mut config);
        fs::write(to, config.to_string()).unwrap();
    };
    change(&from.join("config.json"), &dir.path().join("config.json"), &|config| {
        config["num_hidden_layers"] = json!(layers)
    });
    repeat(&from.join("model.safetensors"), &dir.path().join("model.safetensors"));

    let (from, to) = (from.join("train/default/adapter_init"), dir.path().join("adapter"));
    fs::create_dir(&to).unwrap();
    change(&from.join(ADAPTER[0]), &to.join(ADAPTER[0]), &|config| {
        // The targets are those of two blocks, in full: their last part alone names them in every block.
        let last = |target: &Value| json!(target.as_str().unwrap().rsplit('.').next());
        config["target_modules"] = config["target_modules"].as_array().unwrap().iter().map(last).collect();
    });
    repeat(&from.join(ADAPTER[1]), &to.join(ADAPTER[1]));
    dir
}
