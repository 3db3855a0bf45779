//! Recipes over a tiny model with its own tokenizer and rows.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use emberlora_config::RunConfig;
use emberlora_train::{Event, PrepareError, Run, Trained};
use serde_json::{Value, json};

use super::{VOCABULARY, tiny_model};

/// A directory with the tiny model, a tokenizer of the words t0 to t95, and rows of such words.
pub struct Site(tempfile::TempDir);

impl Site {
    pub fn new() -> Self {
        Self::of(&tiny_model())
    }

    /// The same with the model of another directory.
    pub fn of(base: &Path) -> Self {
        let site = Self(tempfile::tempdir().unwrap());
        let model = site.path("model");
        fs::create_dir(&model).unwrap();
        for name in ["config.json", "model.safetensors"] {
            fs::copy(base.join(name), model.join(name)).unwrap();
        }
        let vocabulary: serde_json::Map<String, Value> =
            (0..VOCABULARY).map(|id| (format!("t{id}"), json!(id))).collect();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
        });
        fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        fs::write(model.join("tokenizer_config.json"), "{}").unwrap();
        site.rows("train.jsonl", 0..12);
        site.rows("eval.jsonl", 20..23);
        site
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn rows(&self, name: &str, lines: std::ops::Range<u32>) {
        let word = |line: u32, i: u32| format!("t{}", (line * 11 + i * 5) % VOCABULARY);
        let text = |line: u32| (0..8 + line % 5).map(|i| word(line, i)).collect::<Vec<_>>().join(" ");
        let rows: Vec<String> = lines.map(|line| json!({"text": text(line)}).to_string()).collect();
        fs::write(self.path(name), rows.join("\n")).unwrap();
    }

    pub fn config(&self, overrides: &[&str]) -> RunConfig {
        let recipe = json!({
            "model": {"source": self.path("model")},
            "adapter": {"r": 4, "alpha": 8},
            "data": {"train": self.path("train.jsonl"), "eval": self.path("eval.jsonl"), "max_seq_len": 32},
            "train": {"epochs": 2, "batch_size": 2, "learning_rate": 0.01},
            "output": self.path("run"),
        });
        let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
        RunConfig::parse(&recipe.to_string(), "recipe.yaml", &overrides).unwrap()
    }
}

pub fn train(config: &RunConfig) -> (Vec<Event>, Trained) {
    let mut run = Run::prepare(config, &()).unwrap();
    let mut events = Vec::new();
    let mut listener = |event: &Event| events.push(event.clone());
    let trained = run.train(&mut [&mut listener], &AtomicBool::new(false)).unwrap();
    (events, trained)
}

pub fn prepare_error(config: &RunConfig) -> PrepareError {
    match Run::prepare(config, &()) {
        Ok(_) => panic!("the recipe was accepted"),
        Err(error) => error,
    }
}

pub fn metrics(dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
