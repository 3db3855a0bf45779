//! Going through a model's shards and writing what takes the place of each tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use emberlora_quant::bnb::Part;
use serde_json::{Map, Value, json};

use super::directory::Staging;
use super::error::ExportError;
use super::shard::ShardWriter;
use crate::weights::file::WeightFile;
use crate::weights::source::WeightSource;
use crate::weights::{INDEX, SINGLE};

/// Told how far a model has been written, and asked whether to go on.
pub trait ExportProgress {
    /// This many bytes of weights are about to be read.
    fn started(&mut self, bytes: u64);
    /// So many more have been read and what takes their place written.
    fn advanced(&mut self, bytes: u64);
    /// Everything is written.
    fn finished(&mut self);
    /// Whether to give up. Asked before every tensor.
    fn is_cancelled(&self) -> bool;
}

/// Tells nobody and never gives up.
impl ExportProgress for () {
    fn started(&mut self, _bytes: u64) {}
    fn advanced(&mut self, _bytes: u64) {}
    fn finished(&mut self) {}
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportReport {
    /// Bytes of tensors that were read.
    pub bytes_read: u64,
    /// Bytes of tensors that were written.
    pub bytes_written: u64,
    /// Projections whose weights are others than before.
    pub projections: usize,
    /// Files with weights, by their names in the directory.
    pub files: Vec<PathBuf>,
}

/// What becomes of the tensors of a model.
pub(super) trait Rewrite {
    /// The tensors that take the place of `name`; they are written to the same shard.
    fn parts(&self, name: &str, file: &WeightFile) -> Result<Vec<Part>, ExportError>;

    /// Writes them.
    fn write(&mut self, name: &str, file: &WeightFile, shard: &mut ShardWriter) -> Result<(), ExportError>;
}

/// Where from and where to.
pub(super) struct Job<'a> {
    pub dir: &'a Path,
    pub source: &'a WeightSource,
    /// The tensors that are rewritten; all others are left out.
    pub tensors: BTreeSet<&'a str>,
    /// What `config.json` will hold.
    pub config: Map<String, Value>,
    pub out: &'a Path,
}

impl Job<'_> {
    /// Writes the directory.
    pub(super) fn run(
        self,
        rewrite: &mut dyn Rewrite,
        progress: &mut dyn ExportProgress,
    ) -> Result<ExportReport, ExportError> {
        let staging = Staging::create(self.out)?;
        let length = |name: &&str| self.source.file_of(name).map_or(0, |file| file.length(name)) as u64;
        let mut report = ExportReport { bytes_read: self.tensors.iter().map(length).sum(), ..ExportReport::default() };
        progress.started(report.bytes_read);

        let mut weight_map = BTreeMap::new();
        for file in &self.source.files {
            let names: Vec<String> = file.names().into_iter().filter(|name| self.is_rewritten(name, file)).collect();
            if names.is_empty() {
                continue;
            }
            let shard_name = file.path.strip_prefix(self.dir).unwrap_or(&file.path).to_owned();
            let mut parts = Vec::new();
            for name in &names {
                parts.extend(rewrite.parts(name, file)?);
            }
            let mut shard = ShardWriter::create(staging.file(&shard_name)?, parts)?;
            for name in &names {
                if progress.is_cancelled() {
                    return Err(ExportError::Interrupted { out: self.out.to_owned() });
                }
                rewrite.write(name, file, &mut shard)?;
                progress.advanced(file.length(name) as u64);
            }
            let place = shard_name.to_string_lossy().into_owned();
            weight_map.extend(shard.names().map(|name| (name.to_owned(), place.clone())));
            report.bytes_written += shard.finish()? as u64;
            report.files.push(shard_name);
        }

        if report.files != [Path::new(SINGLE)] {
            let index = json!({"metadata": {"total_size": report.bytes_written}, "weight_map": weight_map});
            staging.write(INDEX, &pretty(&index))?;
        }
        staging.write("config.json", &pretty(&Value::Object(self.config)))?;
        staging.copy_companions(self.dir)?;
        staging.commit()?;
        progress.finished();
        Ok(report)
    }

    /// A tensor that two shards hold is that of the one which the index names.
    fn is_rewritten(&self, name: &str, file: &WeightFile) -> bool {
        self.tensors.contains(name) && self.source.file_of(name).is_some_and(|holder| std::ptr::eq(holder, file))
    }
}

/// JSON as transformers lays it out.
fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}
