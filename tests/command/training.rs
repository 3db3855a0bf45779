//! `train` writes what it says, and stops when it is asked to.

use std::fs;

use crate::{QUICKSTART, emberlora, json_lines, set};

#[test]
fn a_run_ends_with_figures_samples_and_files() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    let ran = emberlora(&["train", QUICKSTART, "train.max_steps=3", &set("output", &output)]);
    assert!(ran.stderr.contains("step 3/3"), "{}", ran.stderr);
    let shown = ran.ok();
    for word in ["before", "after", "adapter", "metrics.jsonl", "config.yaml"] {
        assert!(shown.contains(word), "{word} is not in: {shown}");
    }
    assert!(!shown.contains('\x1b'), "no colour in a pipe");

    for file in ["config.yaml", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"] {
        assert!(output.join(file).is_file(), "{file}");
    }
    let lines = json_lines(&fs::read_to_string(output.join("metrics.jsonl")).unwrap());
    let (evals, steps): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line["split"] == "eval");
    assert_eq!(evals.len(), 2);
    assert_eq!(steps.iter().map(|line| line["step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 3]);
    for key in ["epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "tokens_per_second", "step_seconds"] {
        assert!(steps.iter().all(|line| line[key].is_number()), "{key}");
    }
}

#[test]
fn steps_that_are_not_shown_are_in_the_metrics() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    let overrides = ["train.max_steps=4", "train.log_every=10", "data.eval=null", "train.eval_every=null"];
    let ran = emberlora(&[&["train", QUICKSTART, &set("output", &output)], &overrides[..]].concat());
    assert!(ran.stderr.contains("step 4/4") && !ran.stderr.contains("step 2/4"), "{}", ran.stderr);
    ran.ok();
    assert_eq!(json_lines(&fs::read_to_string(output.join("metrics.jsonl")).unwrap()).len(), 4);
}

#[test]
fn a_run_whose_numbers_go_wrong_says_which_adapter_it_wrote() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    let overrides = ["train.learning_rate=1e30", "train.max_grad_norm=null", "train.schedule.warmup_ratio=0.0"];
    let message = emberlora(&[&["train", QUICKSTART, &set("output", &output)], &overrides[..]].concat()).fails(1);
    assert!(message.contains("stopped after step 1 of 60") && message.contains("before the first step"), "{message}");
    assert!(output.join("adapter/adapter_model.safetensors").is_file());
}

#[test]
fn the_resolved_recipe_repeats_the_run() {
    let folder = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(name));
    emberlora(&["train", QUICKSTART, "train.max_steps=2", &set("output", &first)]).ok();
    let resolved = first.join("config.yaml");
    emberlora(&["train", resolved.to_str().unwrap(), &set("output", &second)]).ok();
    let [first, second] = [first, second].map(|run| {
        let lines = json_lines(&fs::read_to_string(run.join("metrics.jsonl")).unwrap());
        lines.into_iter().map(|line| (line["step"].clone(), line["loss"].clone())).collect::<Vec<_>>()
    });
    assert_eq!(first, second);
}

#[test]
#[cfg(unix)]
fn an_interruption_finishes_the_step_and_writes_the_adapter() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    let overrides = ["train.max_steps=100000", "data.eval=null", "train.eval_every=null", &set("output", &output)];
    let mut child = crate::command(&["train", QUICKSTART])
        .args(overrides)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.starts_with("step 1/")), "it began");
    // Every shell has `kill`; as a program of its own not every system has it.
    assert!(Command::new("sh").args(["-c", &format!("kill -INT {}", child.id())]).status().unwrap().success());
    let rest: Vec<String> = lines.collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    let stopped = rest.iter().find(|line| line.starts_with("stopped after step ")).unwrap();
    assert!(stopped.contains("the adapter is written as it was after step "), "{stopped}");
    assert!(output.join("adapter/adapter_model.safetensors").is_file());
}
