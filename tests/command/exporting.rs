//! `quantize` and `merge`: what they write, and what they refuse.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::adapters::adapter;
use crate::{QUICKSTART, command, emberlora, finish, set};

const MODEL: &str = "examples/quickstart/model";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn loss(args: &[&str]) -> f64 {
    let found = emberlora(&[&["eval", QUICKSTART, "--json"], args].concat()).ok();
    serde_json::from_str::<Value>(&found).unwrap()["loss"].as_f64().unwrap()
}

/// Runs `args`, which are wrong, and expects `words` in the message and nothing in `folder` but what was there.
#[track_caller]
fn refused(folder: &Path, args: &[&str], words: &[&str]) {
    let names = || fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>();
    let before = names();
    let message = emberlora(args).fails(2);
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
    assert_eq!(names(), before);
}

/// The quickstart's model with other weights.
fn model_with(folder: &Path, weights: &[u8]) {
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join(MODEL).join(name), folder.join(name)).unwrap();
    }
    fs::write(folder.join("model.safetensors"), weights).unwrap();
}

fn weights() -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(MODEL).join("model.safetensors")).unwrap()
}

#[test]
fn a_quantised_directory_computes_what_the_model_does_when_it_is_packed_while_loading() {
    let folder = tempfile::tempdir().unwrap();
    for (kind, flags) in [
        ("nf4", &[][..]),
        ("fp4", &["--no-double-quant", "--block-size", "128", "--compute-dtype", "bf16"]),
        ("int8", &["--threshold", "0", "--skip", "down_proj"]),
    ] {
        let out = folder.path().join(kind);
        let args = [&["quantize", MODEL, text(&out), "--kind", kind], flags].concat();
        let said = emberlora(&args).ok();
        assert!(said.contains(&format!("in {kind}")) && said.contains(text(&out)), "{said}");
        let recipe = match kind {
            "nf4" => "quantization={kind: nf4}",
            "fp4" => "quantization={kind: fp4, double_quant: false, block_size: 128}",
            _ => "quantization={kind: int8, threshold: 0, skip: [down_proj]}",
        };
        let source = set("model.source", &out);
        assert_eq!(loss(&[&source]), loss(&[recipe]), "{kind}");
        assert_eq!(loss(&[&source, recipe]), loss(&[recipe]), "{kind}");
    }
}

#[test]
fn wrong_arguments_of_quantize_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let check = |args: &[&str], words: &[&str]| {
        refused(folder.path(), &[&["quantize", MODEL, text(&out)], args].concat(), words);
    };
    check(&[], &["--kind"]);
    check(&["--kind", "nf5"], &["nf5", "nf4, fp4 or int8"]);
    check(&["--kind", "nf4", "--block-size", "48"], &["48", "32, 64, 128, 256 or 512"]);
    check(&["--kind", "nf4", "--block-size", "1024"], &["1024", "32, 64, 128, 256 or 512"]);
    check(&["--kind", "int8", "--block-size", "64"], &["--block-size", "int8"]);
    check(&["--kind", "int8", "--no-double-quant"], &["--no-double-quant", "int8"]);
    check(&["--kind", "fp4", "--threshold", "6"], &["--threshold", "fp4"]);
    check(&["--kind", "int8", "--threshold", "-1"], &["--threshold"]);
    check(&["--kind", "nf4", "--skip", ""], &["--skip"]);
    check(&["--kind", "nf4", "--skip", "layers.*"], &["layers.*", "regular expression"]);
    check(&["--kind", "nf4", "--compute-dtype", "f64"], &["f64", "f32, bf16 or f16"]);
    check(&["--kind", "nf4", "--revision", "v1"], &["v1", MODEL]);
}

#[test]
fn a_place_that_is_taken_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("mine"), "mine").unwrap();
    let (taken, file) = (text(folder.path()).to_owned(), folder.path().join("mine"));
    refused(folder.path(), &["quantize", MODEL, &taken, "--kind", "nf4"], &[&taken, "not empty"]);
    refused(folder.path(), &["quantize", MODEL, text(&file), "--kind", "nf4"], &["mine is not a directory"]);
    let merge = ["merge", "--recipe", QUICKSTART, "--adapter", adapter(), "--out", &taken];
    refused(folder.path(), &merge, &[&taken, "not empty"]);
    assert_eq!(fs::read_to_string(file).unwrap(), "mine");
}

#[test]
fn weights_that_cannot_be_read_are_named_and_nothing_is_written() {
    let whole = weights();
    let cut = &whole[..whole.len() - 100];
    for (weights, says) in [(&b""[..], "header"), (cut, "truncated"), (b"{\"not\": \"a safetensors file\"}", "header")]
    {
        let folder = tempfile::tempdir().unwrap();
        model_with(folder.path(), weights);
        let (model, out) = (text(folder.path()).to_owned(), folder.path().join("out"));
        let words = ["model.safetensors", says];
        refused(folder.path(), &["quantize", &model, text(&out), "--kind", "nf4"], &words);
        let source = set("model.source", folder.path());
        let merge = ["merge", "--recipe", QUICKSTART, &source, "--adapter", adapter(), "--out", text(&out)];
        refused(folder.path(), &merge, &words);
    }
}

#[test]
fn models_that_are_missing_or_quantised_already_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let check = |model: &str, words: &[&str]| {
        refused(folder.path(), &["quantize", model, text(&out), "--kind", "nf4"], words);
    };
    check("./no/such/model", &["./no/such/model"]);
    check("tests/fixtures/quant/llama_fp4", &["llama_fp4", "already quantised (fp4)"]);
    check("tests/fixtures/chat", &["config.json"]);
}

#[test]
#[cfg(unix)]
fn a_disk_that_is_full_is_a_failure_that_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    // A file may not grow beyond 64 blocks; without its signal the write fails as it does on a full disk.
    let mut limited = std::process::Command::new("sh");
    let script = r#"trap "" XFSZ; ulimit -f 64; exec "$0" quantize "$1" "$2" --kind nf4"#;
    limited.args(["-c", script, env!("CARGO_BIN_EXE_emberlora"), MODEL, text(&out)]);
    limited.current_dir(env!("CARGO_MANIFEST_DIR"));
    let message = finish(limited, "").fails(1);
    assert!(message.contains("model.safetensors: cannot write"), "{message}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// Merges the quickstart's adapter and returns what was printed.
fn merge(out: &Path, args: &[&str]) -> String {
    let mut merge = command(&["merge", "--recipe", QUICKSTART, "--adapter", adapter(), "--out", text(out)]);
    merge.args(args);
    finish(merge, "").ok()
}

/// The numbers behind `max` and `mean` on the line that begins with `what`.
fn distance(printed: &str, what: &str) -> [f64; 2] {
    let line = printed.lines().find(|line| line.trim_start().starts_with(what)).unwrap_or_else(|| panic!("{printed}"));
    let number = |name: &str| line.split(name).nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap();
    [number("max "), number("mean ")]
}

#[test]
fn a_merged_model_computes_what_base_and_adapter_do() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("merged");
    let printed = merge(&out, &["--dtype", "f32"]);
    let [max, mean] = distance(&printed, "merged ");
    assert!(max < 1e-3 && mean < max, "{printed}");
    assert!(printed.contains("tokens of the first 4 rows") && !printed.contains("again"), "{printed}");

    let adapted = loss(&["--adapter", adapter()]);
    let merged = loss(&["adapter.kind=none", &set("model.source", &out)]);
    assert!((adapted - merged).abs() < 1e-4, "{adapted} {merged}");
    assert!((adapted - loss(&[])).abs() > 1e-2);
    assert!(out.join("tokenizer.json").exists());
}

#[test]
fn an_adapter_of_a_packed_base_is_merged_into_the_dequantised_one() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("merged");
    let quantization = "quantization={kind: nf4}";
    let printed = merge(&out, &[quantization, "--dtype", "f32"]);
    let ([merged, _], [again, _]) = (distance(&printed, "merged "), distance(&printed, "merged, again nf4"));
    assert!(merged < 1e-3 && again > 10.0 * merged, "{printed}");
    let adapted = loss(&[quantization, "--adapter", adapter()]);
    let merged = loss(&["adapter.kind=none", &set("model.source", &out)]);
    assert!((adapted - merged).abs() < 1e-4, "{adapted} {merged}");
}

#[test]
fn rows_that_are_not_here_are_no_reason_not_to_merge() {
    let folder = tempfile::tempdir().unwrap();
    let printed = merge(&folder.path().join("merged"), &["data.train=no/such.jsonl", "data.eval=no/such.jsonl"]);
    assert!(printed.contains("a fixed text, as the recipe's rows are not here"), "{printed}");
}

#[test]
fn an_adapter_that_is_missing_or_another_models_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let check = |adapter: &str, words: &[&str]| {
        let args = ["merge", "--recipe", QUICKSTART, "--adapter", adapter, "--out", text(&out)];
        refused(folder.path(), &args, words);
    };
    check("no/such/adapter", &["no/such/adapter"]);
    check("tests/fixtures/llama/train/default/adapter_final", &["llama/train/default/adapter_final", "lora_"]);
    refused(folder.path(), &["merge", "--recipe", QUICKSTART, "--adapter", adapter()], &["--out"]);
}

#[test]
fn what_the_comparison_needs_is_looked_at_before_anything_is_merged() {
    let folder = tempfile::tempdir().unwrap();
    let (out, rows) = (folder.path().join("out"), folder.path().join("rows.jsonl"));
    fs::write(&rows, "{\"prompt\": 1}\n").unwrap();
    let (broken, out) = (set("data.eval", &rows), text(&out));
    let args = ["merge", "--recipe", QUICKSTART, &broken, "data.format=auto", "--adapter", adapter(), "--out", out];
    refused(folder.path(), &args, &["rows.jsonl:1"]);
}
