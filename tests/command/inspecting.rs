//! `inspect` shows what will be trained, to people and to programs.

use std::fs;
use std::process::Stdio;

use serde_json::Value;

use crate::{QUICKSTART, command, emberlora, finish, json_lines, set};

#[test]
fn labels_are_tokens_or_not_trained() {
    let rows = json_lines(&emberlora(&["inspect", QUICKSTART, "--json", "--rows", "5"]).ok());
    assert_eq!(rows.len(), 5);
    for row in rows {
        let [ids, labels] = ["input_ids", "labels"].map(|key| row[key].as_array().unwrap());
        assert_eq!(ids.len(), labels.len());
        assert!(ids.iter().zip(labels).all(|(id, label)| label == id || *label == -100));
        assert!(labels.iter().any(|label| *label != -100), "something is trained");
        assert!(!row["text"].as_str().unwrap().is_empty());
    }
}

#[test]
fn what_inspect_prints_can_be_trained_on() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens.jsonl");
    let rows = emberlora(&["inspect", QUICKSTART, "--json"]).ok();
    fs::write(&tokens, &rows).unwrap();
    let again = emberlora(&["inspect", QUICKSTART, &set("data.train", &tokens), "data.format=tokens", "--json"]).ok();
    let tokens = |text: &str| -> Vec<[Value; 2]> {
        json_lines(text).into_iter().map(|row| ["input_ids", "labels"].map(|key| row[key].clone())).collect()
    };
    assert_eq!(tokens(&rows), tokens(&again));
}

#[test]
fn trained_tokens_are_marked_without_colour() {
    let shown = emberlora(&["inspect", QUICKSTART, "--rows", "1"]).ok();
    assert!(shown.contains('⟦') && shown.contains('⟧'), "{shown}");
    assert!(!shown.contains('\x1b'), "no colour in a pipe");
}

#[test]
fn colour_can_be_asked_for_and_switched_off() {
    let coloured = |preferences: &[(&str, &str)]| {
        let mut command = command(&["inspect", QUICKSTART, "--rows", "1"]);
        command.envs(preferences.iter().copied());
        finish(command, "").ok().contains("\x1b[")
    };
    assert!(coloured(&[("CLICOLOR_FORCE", "1")]));
    assert!(!coloured(&[("NO_COLOR", "1")]));
}

#[test]
fn packed_rows_show_where_documents_begin() {
    let documents = |packing: &str| {
        let packing = format!("data.packing={packing}");
        let shown = emberlora(&["inspect", QUICKSTART, &packing, "data.max_seq_len=256", "--rows", "1"]).ok();
        shown.lines().filter(|line| line.contains("document ")).count()
    };
    assert!(documents("true") > 1);
    assert_eq!(documents("false"), 1);
}

#[test]
fn what_documents_begin_with_alike_is_shown_once() {
    let shown = |sharing: &str| {
        let sharing = format!("data.share_prefix={sharing}");
        emberlora(&["inspect", QUICKSTART, &sharing, "data.max_seq_len=256", "--rows", "1"]).ok()
    };
    let (shared, apart) = (shown("auto"), shown("off"));
    assert!(shared.contains("shared prefixes save") && shared.contains("computed"), "{shared}");
    let heading = shared.lines().position(|line| line.contains("shared by ")).unwrap();
    let beginning = shared.lines().nth(heading + 1).unwrap();
    let below_headings = |shown: &str| {
        let lines: Vec<&str> = shown.lines().collect();
        lines.windows(2).filter(|pair| pair[0].starts_with('─') && pair[1] == beginning).count()
    };
    assert_eq!(below_headings(&shared), 1, "{shared}");
    assert!(apart.contains("(data.share_prefix: off)") && !apart.contains("shared by "), "{apart}");
}

#[test]
fn why_nothing_is_shared_is_said() {
    let dropout = emberlora(&["inspect", QUICKSTART, "adapter.dropout=0.1", "--rows", "1"]).ok();
    assert!(dropout.contains("prefixes are not shared (adapter.dropout is above 0)"), "{dropout}");
    let packing = emberlora(&["inspect", QUICKSTART, "data.packing=false", "--rows", "1"]).ok();
    assert!(packing.contains("prefixes are not shared (data.packing: false)"), "{packing}");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let mut child =
        command(&["inspect", QUICKSTART, "--json"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8(output.stderr).unwrap().matches("error").count(), 0);
}
