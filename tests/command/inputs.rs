//! Wrong arguments, recipes and inputs end with exit code 2 and say what is wrong.

use std::fs;

use crate::{QUICKSTART, emberlora, finish, set};

/// Runs `args`, which are wrong, and expects every one of `words` in the message.
fn check(args: &[&str], words: &[&str]) {
    let message = emberlora(args).fails(2);
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

#[test]
fn all_mistakes_of_a_recipe_are_reported_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("wrong.yaml");
    fs::write(&recipe, "model: {sorce: x}\ndata: {train: a.jsonl, max_seq_len: soon}\ntrain: {epochs: -1}\n").unwrap();
    let recipe = recipe.to_str().unwrap();
    for command in [&["config", "check", recipe][..], &["train", recipe], &["eval", recipe], &["inspect", recipe]] {
        check(command, &["sorce", "source", "data.max_seq_len", "soon", "train.epochs", "-1"]);
    }
}

#[test]
fn a_wrong_override_is_a_mistake_like_any_other() {
    check(&["config", "check", QUICKSTART, "train.epoch=2"], &["train.epoch", "epochs"]);
    check(&["config", "check", QUICKSTART, "train.epochs"], &["train.epochs"]);
    check(&["generate", "--recipe", QUICKSTART, "sede=1", "--prompt", "x"], &["sede", "seed"]);
}

#[test]
fn a_missing_file_is_named() {
    check(&["train", "no/such.yaml"], &["no/such.yaml"]);
    let folder = tempfile::tempdir().unwrap();
    let output = set("output", &folder.path().join("run"));
    check(&["train", QUICKSTART, "data.train=no/such.jsonl", &output], &["no/such.jsonl"]);
    check(&["inspect", QUICKSTART, "data.train=no/such.jsonl"], &["no/such.jsonl"]);
    check(&["eval", QUICKSTART, "--data", "no/such.jsonl"], &["no/such.jsonl"]);
    check(&["eval", QUICKSTART, "--adapter", "no/such/adapter"], &["no/such/adapter"]);
    check(&["eval", QUICKSTART, "model.source=./no/such/model"], &["no/such/model"]);
    assert!(!folder.path().join("run").exists(), "a refused run leaves nothing behind");
}

#[test]
fn a_row_that_does_not_fit_is_named_by_file_and_line() {
    let folder = tempfile::tempdir().unwrap();
    let rows = folder.path().join("rows.jsonl");
    fs::write(&rows, "{\"prompt\": \"a\", \"completion\": \" b\"}\n{\"prompt\": 1, \"completion\": \"b\"}\n").unwrap();
    check(&["inspect", QUICKSTART, &set("data.train", &rows)], &["rows.jsonl:2", "prompt"]);
}

#[test]
fn a_backend_that_is_not_compiled_in_says_how_to_get_it() {
    if cfg!(feature = "cuda") {
        return;
    }
    check(&["eval", QUICKSTART, "device=cuda"], &["cuda", "--features cuda"]);
}

#[test]
fn wrong_arguments_are_refused() {
    check(&["generate", "--recipe", QUICKSTART], &["--prompt", "--chat"]);
    check(&["generate", "--recipe", QUICKSTART, "--prompt", "a", "--top-p", "2"], &["--top-p"]);
    check(&["trian", QUICKSTART], &["trian", "train"]);
}

#[test]
fn evaluation_without_rows_says_where_to_name_them() {
    check(&["eval", QUICKSTART, "data.eval=null", "train.eval_every=null"], &["data.eval", "--data"]);
}

#[test]
fn an_output_that_cannot_be_written_is_refused_before_anything_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let taken = folder.path().join("taken");
    fs::write(&taken, "").unwrap();
    let output = set("output", &taken.join("run"));
    check(&["train", QUICKSTART, "model.source=./no/such/model", &output], &["taken", "is not a directory"]);
}

#[test]
fn a_model_directory_that_is_missing_is_not_only_looked_for_on_the_hub() {
    let mut eval = crate::command(&["eval", QUICKSTART, "model.source=models/no-such-model"]);
    // Nobody listens on the port of the discard service.
    eval.env("HF_ENDPOINT", "http://127.0.0.1:9");
    let message = finish(eval, "").fails(1);
    assert!(message.contains("there is no directory `models/no-such-model` here: fetch the model"), "{message}");
}

#[test]
fn a_revision_of_a_local_directory_is_refused() {
    check(&["eval", QUICKSTART, "model.revision=v2"], &["model.revision", "v2", "examples/quickstart/model"]);
}

#[test]
fn a_resolved_recipe_resolves_to_itself() {
    let folder = tempfile::tempdir().unwrap();
    let resolved = emberlora(&["config", "show", QUICKSTART, "seed=7"]).ok();
    let recipe = folder.path().join("resolved.yaml");
    fs::write(&recipe, &resolved).unwrap();
    assert_eq!(emberlora(&["config", "show", recipe.to_str().unwrap()]).ok(), resolved);
    assert!(resolved.contains("seed: 7"), "{resolved}");
}

#[test]
#[cfg(unix)]
fn a_conversation_that_is_not_text_is_refused() {
    let mut chat = std::process::Command::new("sh");
    chat.args(["-c", r"printf '\377\n' | $0 generate --recipe $1 --chat", env!("CARGO_BIN_EXE_emberlora"), QUICKSTART]);
    chat.current_dir(env!("CARGO_MANIFEST_DIR"));
    assert!(finish(chat, "").fails(2).contains("standard input"));
}

#[test]
fn schema_and_reference_are_printed() {
    let schema: serde_json::Value = serde_json::from_str(&emberlora(&["config", "schema"]).ok()).unwrap();
    assert!(schema["properties"]["gradient_checkpointing"].is_object(), "{schema}");
    assert!(emberlora(&["config", "docs"]).ok().contains("grad_accumulation"));
}
