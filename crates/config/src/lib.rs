//! The run as data: a YAML recipe read into a typed [`RunConfig`] that is checked as a whole.
//!
//! ```text
//! recipe.yaml ─▶ node       tree of values, each with its line
//! key=value   ─▶ overrides  laid over the tree
//!             ─▶ spec       every key read by its spec; all mistakes collected
//!             ─▶ RunConfig  every value typed, no default left open
//! ```
//!
//! A key is written down once, in a `section!`: its name, type, default, allowed values and documentation. The reader,
//! [`RunConfig::to_yaml`], [`RunConfig::schema`] and [`RunConfig::reference_docs`] all follow from that line. This crate
//! knows no tensors, opens no file but the recipe, and does not look whether a path exists.
//!
//! ```
//! use emberlora_config::RunConfig;
//!
//! let recipe = "model: {source: models/smollm2}\ndata: {train: data/train.jsonl}\n";
//! let config = RunConfig::parse(recipe, "recipe.yaml", &["adapter.r=8".to_owned()])?;
//! assert_eq!(config.adapter.r, 8);
//!
//! let error = RunConfig::parse(recipe, "recipe.yaml", &["adapter.rang=8".to_owned()]).unwrap_err();
//! assert_eq!(error.problems()[0].key, "adapter.rang");
//! # Ok::<(), emberlora_config::ConfigError>(())
//! ```

#[macro_use]
mod macros;

mod adapter;
mod choices;
mod data;
mod device;
mod error;
mod model;
mod node;
mod overrides;
mod quantization;
mod reference;
mod run;
mod spec;
mod train;

use std::path::Path;

use serde_json::json;

pub use self::adapter::{AdapterKind, AdapterSection, Exclude, Targets, TaskType};
pub use self::choices::GradientCheckpointing;
pub use self::data::{ChatTemplateChoice, DataFormat, DataSection, DataSource, LossOn, Overflow, SharePrefix};
pub use self::device::{DeviceChoice, DeviceChoiceError, Devices, RemoteAddress};
pub use self::error::{ConfigError, Place, Problem};
pub use self::model::{Attention, Dtype, ModelSection};
pub use self::quantization::{QuantizationKind, QuantizationSection};
pub use self::run::RunConfig;
pub use self::train::{Optimizer, OptimizerKind, Schedule, ScheduleKind, TrainSection, Warmup};

use self::node::{Content, Node};
use self::spec::{Reader, Section};

impl RunConfig {
    /// Reads the recipe at `path` with `key.path=value` arguments laid over it.
    ///
    /// # Errors
    /// The file cannot be read, or it is wrong: then the error holds every mistake.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, &path.display().to_string(), overrides)
    }

    /// Reads a recipe from its text. `name` is its file name, which errors mention and from which the default of
    /// `output` follows.
    ///
    /// # Errors
    /// The recipe is wrong; the error holds every mistake.
    pub fn parse(text: &str, name: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        let invalid = |problems| ConfigError::Invalid { name: name.to_owned(), problems };
        let mut root = root(text).map_err(|problem| invalid(vec![*problem]))?;
        let stem = Path::new(name).file_stem().map(|stem| stem.to_string_lossy());
        let mut reader = Reader::new(stem.as_deref().unwrap_or("run"));
        overrides::apply(&mut root, overrides, &mut reader);
        let config = Self::read(&root, &mut reader);
        match (config, reader.into_problems()) {
            (Some(config), problems) if problems.is_empty() => Ok(config),
            (_, problems) => Err(invalid(problems)),
        }
    }

    /// The recipe that holds every value of this run; [`RunConfig::parse`] reads it back as an equal one.
    pub fn to_yaml(&self) -> String {
        self.write().to_yaml()
    }

    /// The JSON Schema (draft 2020-12) of recipes, for editors that complete and check YAML.
    pub fn schema() -> serde_json::Value {
        let mut schema = spec::object_schema(&Self::fields());
        schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
        schema["title"] = json!("emberlora recipe");
        schema["description"] = json!(spec::paragraph(Self::ABOUT));
        schema
    }

    /// The reference of all keys, in Markdown.
    pub fn reference_docs() -> String {
        reference::page()
    }
}

/// The recipe as a tree whose root is a mapping.
fn root(text: &str) -> Result<Node, Box<Problem>> {
    let root = Node::from_yaml(text, None).map_err(|error| syntax_problem(text, &error))?;
    let problem = match root.content {
        Content::Map(_) => return Ok(root),
        Content::Null => Problem::new("", &Place::Nowhere, "the recipe is empty"),
        _ => Problem::new("", &root.place, "the recipe is not a mapping").found(&root.inline()),
    };
    Err(Box::new(problem.allowed(format!("a mapping with the keys {}", RunConfig::KEYS.join(", ")))))
}

fn syntax_problem(text: &str, error: &serde_saphyr::Error) -> Problem {
    let line = error.location().map(|location| location.line());
    let place = line.map_or(Place::Nowhere, Place::Line);
    let problem = Problem::new("", &place, format!("not valid YAML: {error}"));
    let indented_by_tab = |line: &str| {
        let indent = &line[..line.len() - line.trim_start().len()];
        indent.contains('\t') && indent.len() < line.len()
    };
    match text.lines().position(indented_by_tab) {
        Some(index) => {
            problem.allowed(format!("indentation by spaces only; line {} is indented with a tab", index + 1))
        }
        None => problem,
    }
}
