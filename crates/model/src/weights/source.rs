//! All weight files of a model directory behind one lookup by name.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::error::LoadError;
use super::file::{Entry, WeightFile};

pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// The files of a model and which of them holds each tensor.
#[derive(Debug)]
pub(super) struct WeightSource {
    pub files: Vec<WeightFile>,
    place: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl WeightSource {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names; the single file wins where
    /// both are there, as in transformers.
    pub(super) fn open(dir: &Path) -> Result<Self, LoadError> {
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        if single.exists() {
            let file = WeightFile::open(&single)?;
            let place = file.names().into_iter().map(|name| (name, 0)).collect();
            return Ok(Self { files: vec![file], place });
        }
        if index.exists() {
            return Self::open_shards(dir, &index);
        }
        let hint = match dir.join("pytorch_model.bin").exists() || dir.join("pytorch_model.bin.index.json").exists() {
            true => "; there are PyTorch weights, which have to be saved as safetensors first",
            false => "",
        };
        Err(LoadError::NoWeights { dir: dir.to_owned(), hint: hint.to_owned() })
    }

    fn open_shards(dir: &Path, index: &Path) -> Result<Self, LoadError> {
        let wrong = |reason: String| LoadError::Index { path: index.to_owned(), reason };
        let weight_map = read_index(index)?;
        if weight_map.is_empty() {
            return Err(wrong("its weight_map is empty".into()));
        }
        let roots = allowed_roots(dir)?;
        let mut numbers: BTreeMap<&str, usize> = BTreeMap::new();
        let mut files: Vec<WeightFile> = Vec::new();
        let mut place = HashMap::with_capacity(weight_map.len());
        for (tensor, shard) in &weight_map {
            let number = match numbers.get(shard.as_str()) {
                Some(&number) => number,
                None => {
                    files.push(WeightFile::open(&shard_path(dir, index, &roots, tensor, shard)?)?);
                    numbers.insert(shard, files.len() - 1);
                    files.len() - 1
                }
            };
            if !files[number].contains(tensor) {
                return Err(wrong(format!("it says that `{tensor}` is in {shard}, which has no such tensor")));
            }
            place.insert(tensor.clone(), number);
        }
        // Tensors that the index does not list are still there, and are judged like all others.
        for (number, file) in files.iter().enumerate() {
            for name in file.names() {
                place.entry(name).or_insert(number);
            }
        }
        Ok(Self { files, place })
    }

    pub(super) fn names(&self) -> BTreeSet<&str> {
        self.place.keys().map(String::as_str).collect()
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.place.contains_key(name)
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.file_of(name)?.shape(name)
    }

    /// The file that holds the tensor.
    pub(super) fn file_of(&self, name: &str) -> Option<&WeightFile> {
        Some(&self.files[*self.place.get(name)?])
    }

    /// The path of that file, for messages; empty where no file has it.
    pub(super) fn path_of(&self, name: &str) -> PathBuf {
        self.file_of(name).map(|file| file.path.clone()).unwrap_or_default()
    }

    pub(super) fn entry(&self, name: &str) -> Result<Option<(&WeightFile, Entry)>, LoadError> {
        let Some(file) = self.file_of(name) else { return Ok(None) };
        Ok(file.entry(name)?.map(|entry| (file, entry)))
    }
}

/// The index's map from tensor to file name.
fn read_index(index: &Path) -> Result<BTreeMap<String, String>, LoadError> {
    let text = std::fs::read_to_string(index).map_err(|source| LoadError::Io { path: index.to_owned(), source })?;
    match serde_json::from_str::<ShardIndex>(&text) {
        Ok(index) => Ok(index.weight_map),
        Err(error) => {
            let reason = format!("not an index of shards (an object with a weight_map): {error}");
            Err(LoadError::Index { path: index.to_owned(), reason })
        }
    }
}

/// The files that an index names, each once.
pub(crate) fn shards(index: &Path) -> Result<Vec<String>, LoadError> {
    let map = read_index(index)?;
    if let Some((tensor, shard)) = map.iter().find(|(_, shard)| !is_inside(shard)) {
        return Err(LoadError::ShardOutside { path: index.to_owned(), tensor: tensor.clone(), shard: shard.clone() });
    }
    let mut shards: Vec<String> = map.into_values().collect();
    shards.sort();
    shards.dedup();
    Ok(shards)
}

/// Whether a shard's name stays below the directory it is joined to.
fn is_inside(shard: &str) -> bool {
    !shard.is_empty()
        && !shard.contains('\\')
        && Path::new(shard).components().all(|part| matches!(part, Component::Normal(_)))
}

/// Directories in which a shard may lie once links are followed: the model's own, and, for a snapshot in the hub's
/// cache (`models--org--name/snapshots/<commit>`), the `blobs` directory that its links point into.
fn allowed_roots(dir: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let io = |source| LoadError::Io { path: dir.to_owned(), source };
    let dir = dir.canonicalize().map_err(io)?;
    let blobs = dir
        .parent()
        .filter(|snapshots| snapshots.file_name().is_some_and(|name| name == "snapshots"))
        .and_then(Path::parent)
        .and_then(|repository| repository.join("blobs").canonicalize().ok());
    Ok(std::iter::once(dir).chain(blobs).collect())
}

fn shard_path(dir: &Path, index: &Path, roots: &[PathBuf], tensor: &str, shard: &str) -> Result<PathBuf, LoadError> {
    let outside =
        || LoadError::ShardOutside { path: index.to_owned(), tensor: tensor.to_owned(), shard: shard.to_owned() };
    if !is_inside(shard) {
        return Err(outside());
    }
    let path = dir.join(shard);
    let real = path.canonicalize().map_err(|source| LoadError::Io { path: path.clone(), source })?;
    if roots.iter().any(|root| real.starts_with(root)) { Ok(path) } else { Err(outside()) }
}
