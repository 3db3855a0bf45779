//! `eval` and `generate`, with and without the adapter that `train` wrote.

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use serde_json::Value;

use crate::{QUICKSTART, command, emberlora, finish, set};

/// An adapter of a few steps, trained once for all tests.
static ADAPTER: LazyLock<(tempfile::TempDir, PathBuf)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    let overrides = ["train.max_steps=5", "data.eval=null", "train.eval_every=null", &set("output", &output)];
    let mut train = command(&["train", QUICKSTART]);
    train.args(overrides);
    finish(train, "").ok();
    let adapter = output.join("adapter");
    (folder, adapter)
});

pub(crate) fn adapter() -> &'static str {
    ADAPTER.1.to_str().unwrap()
}

fn evaluation(args: &[&str]) -> (f64, u64) {
    let args = [&["eval", QUICKSTART, "--json"], args].concat();
    let found: Value = serde_json::from_str(&emberlora(&args).ok()).unwrap();
    let [loss, perplexity] = ["loss", "perplexity"].map(|key| found[key].as_f64().unwrap());
    assert!((perplexity / loss.exp() - 1.0).abs() < 1e-12, "{found}");
    (loss, found["tokens"].as_u64().unwrap())
}

fn generated(args: &[&str]) -> String {
    emberlora(&[&["generate", "--recipe", QUICKSTART, "--max-new-tokens", "12"], args].concat()).ok()
}

#[test]
fn an_adapter_changes_the_loss_and_not_the_tokens() {
    let (base, tokens) = evaluation(&[]);
    let (adapted, same_tokens) = evaluation(&["--adapter", adapter()]);
    assert_eq!(tokens, same_tokens);
    assert!(adapted < base, "{adapted} < {base}");
    assert_eq!(evaluation(&["--adapter", adapter()]).0, adapted, "the same twice");
}

#[test]
fn evaluation_takes_other_rows() {
    let folder = tempfile::tempdir().unwrap();
    let rows = folder.path().join("rows.jsonl");
    fs::write(&rows, "{\"prompt\": \"a b c\", \"completion\": \" d e f\"}\n").unwrap();
    let (_, tokens) = evaluation(&["data.format=auto", "--data", rows.to_str().unwrap()]);
    assert!((1..20).contains(&tokens), "{tokens}");
    let text = emberlora(&["eval", QUICKSTART, "--data", rows.to_str().unwrap()]).ok();
    for word in ["loss", "perplexity", "tokens"] {
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn greedy_text_is_the_same_each_time() {
    let once = generated(&["--prompt", "Once"]);
    assert!(!once.trim().is_empty());
    assert_eq!(generated(&["--prompt", "Once"]), once);
}

#[test]
fn a_prompt_may_begin_with_a_hyphen() {
    assert!(!generated(&["--prompt", "-5 plus 3 is"]).is_empty());
}

#[test]
fn settings_of_the_model_that_are_not_applied_are_warned_of() {
    let model = tempfile::tempdir().unwrap();
    for file in fs::read_dir("examples/quickstart/model").unwrap().map(Result::unwrap) {
        fs::copy(file.path(), model.path().join(file.file_name())).unwrap();
    }
    let settings = r#"{"repetition_penalty": 1.1, "no_repeat_ngram_size": 0, "temperature": 0.6}"#;
    fs::write(model.path().join("generation_config.json"), settings).unwrap();
    let source = set("model.source", model.path());
    let ran = emberlora(&["generate", "--recipe", QUICKSTART, &source, "--max-new-tokens", "1", "--prompt", "a"]);
    assert!(ran.stderr.contains("repetition_penalty: 1.1 is not applied"), "{}", ran.stderr);
    assert!(!ran.stderr.contains("ngram") && !ran.stderr.contains("temperature"), "{}", ran.stderr);
    ran.ok();
}

#[test]
fn a_seed_fixes_what_is_sampled() {
    let sampled = |seed: &str| generated(&["--prompt", "Once", "--temperature", "1.5", "--seed", seed]);
    assert_eq!(sampled("1"), sampled("1"));
    assert!((2..8).any(|seed: u64| sampled(&seed.to_string()) != sampled("1")));
}

#[test]
fn an_adapter_is_loaded_and_a_base_needs_none() {
    generated(&["--adapter", adapter(), "--chat", "Hello"]);
    generated(&["adapter.kind=none", "--chat", "Hello"]);
}

#[test]
fn a_conversation_is_held_over_lines() {
    let mut chat = command(&["generate", "--recipe", QUICKSTART, "--max-new-tokens", "4", "--chat"]);
    chat.args(["--adapter", adapter()]);
    let two = finish(chat, "Hello\nAnd then?\n").ok();
    let one = emberlora(&[
        "generate",
        "--recipe",
        QUICKSTART,
        "--max-new-tokens",
        "4",
        "--adapter",
        adapter(),
        "--chat",
        "Hello",
    ])
    .ok();
    assert!(two.starts_with(&one), "{two:?} starts with {one:?}");
    assert!(two.len() > one.len());
}
