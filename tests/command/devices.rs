//! `devices` and `--device`: what there is, and what is said about what there is not.

use std::fs;

use serde_json::Value;

use crate::{QUICKSTART, emberlora, json_lines, set};

/// The backends, and whether this build has them.
const BACKENDS: [(&str, bool); 4] = [
    ("flex", cfg!(feature = "flex")),
    ("ndarray", cfg!(feature = "ndarray")),
    ("wgpu", cfg!(feature = "wgpu")),
    ("cuda", cfg!(feature = "cuda")),
];

fn listed() -> Value {
    serde_json::from_str(&emberlora(&["devices", "--json"]).ok()).unwrap()
}

#[test]
fn what_is_compiled_in_is_listed_and_the_rest_says_how_to_get_it() {
    let (text, json) = (emberlora(&["devices"]).ok(), listed());
    let devices = json["devices"].as_array().unwrap();
    for (backend, compiled_in) in BACKENDS {
        let named = |list: &Value| list.as_array().unwrap().iter().any(|name| name == backend);
        assert_eq!(named(&json["compiled_in"]), compiled_in, "{backend}");
        let found = devices.iter().any(|device| device["backend"] == backend);
        assert_eq!(json["absent"].get(backend).is_none(), found, "{backend}");
        if !compiled_in {
            let hint = format!("cargo build --release --features {backend}");
            assert!(json["absent"][backend].as_str().unwrap().contains(&hint) && text.contains(&hint), "{text}");
        }
    }
    let remote =
        if cfg!(feature = "remote") { "remote://HOST:PORT" } else { "cargo build --release --features remote" };
    assert!(text.contains(remote) && json["absent"].get("remote").is_none() == cfg!(feature = "remote"), "{text}");
    for device in devices {
        assert!(text.contains(device["device"].as_str().unwrap()) && text.contains(device["name"].as_str().unwrap()));
        assert!(device["dtypes"].as_array().unwrap().iter().any(|dtype| dtype == "f32"), "{device}");
    }
}

#[test]
#[cfg(feature = "flex")]
fn auto_takes_a_gpu_or_flex_and_says_why() {
    let auto = &listed()["auto"];
    let device = auto["device"].as_str().unwrap();
    assert!(device == "flex" || device.starts_with("cuda:") || device.starts_with("wgpu:"), "{auto}");
    let reason = auto["reason"].as_str().unwrap();
    assert!(reason.starts_with("cuda ") && !reason.contains("ndarray"), "{reason}");

    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    let ran = emberlora(&[
        "train",
        QUICKSTART,
        "train.max_steps=1",
        "data.eval=null",
        "train.eval_every=null",
        &set("output", &output),
    ]);
    assert!(ran.stderr.contains(&format!("device auto: {device} ({reason})")), "{}", ran.stderr);
    ran.ok();
    let resolved = fs::read_to_string(output.join("config.yaml")).unwrap();
    assert!(resolved.contains(&format!("\ndevice: {device}")), "{resolved}");
}

#[test]
fn a_device_that_is_not_there_is_wrong_input() {
    for (backend, compiled_in) in BACKENDS {
        if !compiled_in {
            let message = emberlora(&["train", QUICKSTART, "--device", backend]).fails(2);
            assert!(message.contains(&format!("cargo build --release --features {backend}")), "{message}");
        }
    }
    #[cfg(not(feature = "remote"))]
    for args in [&["train", QUICKSTART, "--device", "remote://127.0.0.1:4000"][..], &["serve", "--device", "flex"]] {
        let message = emberlora(args).fails(2);
        assert!(message.contains("cargo build --release --features remote"), "{message}");
    }
    let message = emberlora(&["eval", QUICKSTART, "--device", "tpu"]).fails(2);
    assert!(message.contains("device") && message.contains("wgpu:N"), "{message}");
    #[cfg(feature = "wgpu")]
    {
        let message = emberlora(&["generate", "--recipe", QUICKSTART, "--device", "wgpu:99", "--prompt", "x"]).fails(2);
        assert!(message.contains("`wgpu:99` does not exist"), "{message}");
    }
}

/// Every device of the machine that is not too slow for this: two steps, an evaluation and a sample.
#[test]
fn a_recipe_runs_on_every_device_with_the_same_losses() {
    let folder = tempfile::tempdir().unwrap();
    let mut all: Vec<(String, Vec<f64>)> = Vec::new();
    for device in listed()["devices"].as_array().unwrap() {
        let name = device["device"].as_str().unwrap().to_owned();
        let output = folder.path().join(name.replace(':', "-"));
        let small = [
            "train.max_steps=2",
            "train.batch_size=1",
            "data.max_seq_len=64",
            "data.eval=null",
            "train.eval_every=null",
        ];
        let place = ["model.compute_dtype=f32", &set("output", &output), "--device", &name];
        emberlora(&[&["train", QUICKSTART][..], &small, &place.map(|text| text)].concat()).ok();
        let lines = json_lines(&fs::read_to_string(output.join("metrics.jsonl")).unwrap());
        all.push((name, lines.iter().map(|line| line["loss"].as_f64().unwrap()).collect()));
    }
    let (first, losses) = &all[0];
    for (name, others) in &all[1..] {
        for (a, b) in losses.iter().zip(others) {
            assert!((a - b).abs() < 1e-3, "{first}: {losses:?}, {name}: {others:?}");
        }
    }
}
