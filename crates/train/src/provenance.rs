//! What exactly was run: versions, and hashes of everything that was read.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use emberlora_data::DataReport;
use emberlora_lora::peft;
use emberlora_model::LoadReport;
use serde::Serialize;
use sha2::{Digest, Sha256};

/// The version of Burn that this crate is pinned to.
const BURN: &str = "0.22.1";

/// The machine-readable companion of a resolved recipe: what its values meant when it was run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Provenance {
    /// Versions of the code.
    pub versions: Versions,
    /// The device, as recipes name it.
    pub device: String,
    /// The seed of the run.
    pub seed: u64,
    /// The base model.
    pub model: ModelProvenance,
    /// SHA-256 of the tokenizer's files.
    pub tokenizer_sha256: String,
    /// SHA-256 of the chat template, where one was used.
    pub chat_template_sha256: Option<String>,
    /// The adapter that training started from.
    pub init_from: Option<AdapterProvenance>,
    /// Numbers that are trained.
    pub trainable_parameters: usize,
    /// The rows that were trained on, with a hash of each file.
    pub train: DataReport,
    /// The rows that were evaluated on.
    pub eval: Option<DataReport>,
}

/// Versions of the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Versions {
    /// This crate's.
    pub emberlora: &'static str,
    /// Burn's.
    pub burn: &'static str,
}

/// The base model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ModelProvenance {
    /// As the recipe names it.
    pub source: String,
    /// The commit, for a model of the hub.
    pub commit: Option<String>,
    /// SHA-256 of configuration and weights, for a model in a local directory.
    pub files: BTreeMap<String, String>,
    /// How the weights that are not packed were stored in memory; `auto` where not all alike.
    pub dtype: String,
    /// How the others were.
    pub packed: Option<PackedProvenance>,
    /// The format of activations.
    pub compute_dtype: String,
}

/// The packed weights of a base model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PackedProvenance {
    /// Their format, as in `nf4 in blocks of 64, double quantised`.
    pub format: String,
    /// Parameters that they hold.
    pub parameters: usize,
    /// Bytes of their codes and scales.
    pub bytes: usize,
}

/// An adapter that was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AdapterProvenance {
    /// Its directory, as the recipe names it.
    pub path: PathBuf,
    /// SHA-256 of its files.
    pub files: BTreeMap<String, String>,
}

impl Default for Versions {
    fn default() -> Self {
        Self { emberlora: env!("CARGO_PKG_VERSION"), burn: BURN }
    }
}

impl PackedProvenance {
    /// What was packed; `None` where nothing is.
    pub fn of(report: &LoadReport) -> Option<Self> {
        let format = report.quantization.as_ref()?.scheme.to_string();
        let (parameters, bytes) = (report.packed_parameters, report.packed_bytes);
        (parameters > 0).then_some(Self { format, parameters, bytes })
    }
}

impl fmt::Display for PackedProvenance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} parameters in {}: {} bytes", self.parameters, self.format, self.bytes)
    }
}

impl Provenance {
    /// The resolved recipe `config`, with everything that identifies what it read in comments above it.
    pub fn annotate(&self, config: &str) -> String {
        let mut lines = vec![
            "The recipe of this run, every value resolved; to run it again, give it another output=.".into(),
            "provenance.json says more.".into(),
            format!("emberlora: {}", self.versions.emberlora),
            format!("burn: {}", self.versions.burn),
            format!("device: {}", self.device),
            format!("seed: {}", self.seed),
        ];
        lines.extend(self.model.commit.iter().map(|commit| format!("model commit: {commit}")));
        lines.extend(self.model.files.iter().map(|(name, hash)| format!("model {name}: sha256 {hash}")));
        lines.extend(self.model.packed.iter().map(|packed| format!("model weights: {packed}")));
        lines.push(format!("tokenizer: sha256 {}", self.tokenizer_sha256));
        lines.extend(self.chat_template_sha256.iter().map(|hash| format!("chat template: sha256 {hash}")));
        let adapter = self.init_from.iter().flat_map(|adapter| &adapter.files);
        lines.extend(adapter.map(|(name, hash)| format!("init_from {name}: sha256 {hash}")));
        for (split, report) in [("train", Some(&self.train)), ("eval", self.eval.as_ref())] {
            for file in report.iter().flat_map(|report| &report.files) {
                lines.push(format!("{split} {}: sha256 {}", file.path.display(), file.sha256));
            }
        }
        // A name with a line break in it must not end the comment.
        let comments = lines.iter().map(|line| format!("# {}\n", line.replace(['\n', '\r'], " ")));
        comments.chain([config.to_owned()]).collect()
    }
}

impl AdapterProvenance {
    /// Hashes the files of the adapter in `dir`.
    pub(crate) fn of(dir: &Path) -> io::Result<Self> {
        let mut files = BTreeMap::new();
        for name in [peft::CONFIG_FILE, peft::TENSORS_FILE] {
            let hash = Sha256::digest(fs::read(dir.join(name))?);
            files.insert(name.to_owned(), hash.iter().map(|byte| format!("{byte:02x}")).collect());
        }
        Ok(Self { path: dir.to_owned(), files })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_burn_is_the_one_that_is_pinned() {
        let manifest = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.toml")).unwrap();
        assert!(manifest.contains(&format!("burn = {{ version = \"={BURN}\"")));
    }

    #[test]
    fn the_files_of_an_adapter_are_hashed() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(peft::CONFIG_FILE), "abc").unwrap();
        fs::write(dir.path().join(peft::TENSORS_FILE), "").unwrap();
        let files = AdapterProvenance::of(dir.path()).unwrap().files;
        assert_eq!(files[peft::CONFIG_FILE], "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(files.len(), 2);
    }
}
