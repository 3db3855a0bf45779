//! What becomes of the place where an adapter is written.

mod common;

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use common::saved::*;
use common::*;
use emberlora_lora::LoraOptions;
use emberlora_lora::peft::{self, PeftError};

#[test]
fn saving_replaces_an_adapter_and_keeps_other_files() {
    let mut saved = Saved::new(plain());
    fs::write(saved.path().join("README.md"), "mine").unwrap();
    fs::write(saved.path().join("adapter_model.bin"), "stale").unwrap();
    fill_b(&mut saved.model);
    peft::save(&saved.model, &saved.options, "tiny", Some("abc"), &saved.path()).unwrap();
    assert_eq!(saved.load().unwrap().revision.as_deref(), Some("abc"));
    assert_eq!(fs::read_to_string(saved.path().join("README.md")).unwrap(), "mine");
    let mut names: Vec<_> = fs::read_dir(saved.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["README.md", "adapter_config.json", "adapter_model.safetensors"]);
    assert_eq!(fs::read_dir(saved.dir.path()).unwrap().count(), 1, "something is left beside the adapter");
}

#[test]
fn saving_creates_the_directories_above() {
    let saved = Saved::new(plain());
    let deep = saved.dir.path().join("runs/one/adapter");
    peft::save(&saved.model, &saved.options, "", None, &deep).unwrap();
    assert_eq!(peft::load(&deep).unwrap().base_model_name, None);
}

#[test]
fn saving_leaves_alone_what_is_not_an_adapter() {
    let saved = Saved::new(plain());
    let save = |dir: &Path| peft::save(&saved.model, &saved.options, "tiny", None, dir);
    let (file, other) = (saved.dir.path().join("file"), saved.dir.path().join("other"));
    fs::write(&file, "precious").unwrap();
    fs::create_dir(&other).unwrap();
    fs::write(other.join("notes"), "precious").unwrap();
    for place in [&file, &other] {
        assert!(matches!(save(place), Err(PeftError::Occupied { .. })), "{}", place.display());
    }
    assert_eq!(fs::read_to_string(other.join("notes")).unwrap(), "precious");
    assert!(matches!(save(&file.join("below")), Err(PeftError::Io { .. })));
    assert_eq!(fs::read_dir(saved.dir.path()).unwrap().count(), 3);
}

#[test]
fn an_adapter_that_a_crash_left_aside_is_named() {
    let saved = Saved::new(plain());
    let aside = saved.dir.path().join(format!(".{}.old-7-0", saved.path().file_name().unwrap().display()));
    fs::rename(saved.path(), &aside).unwrap();
    let error = saved.load().unwrap_err();
    assert!(matches!(&error, PeftError::CutShort { aside: found, .. } if *found == aside), "{error}");
    assert!(error.to_string().contains("rename"), "{error}");
}

#[cfg(unix)]
#[test]
fn saving_through_a_link_replaces_what_it_points_to() {
    let saved = Saved::new(plain());
    let link = saved.dir.path().join("link");
    std::os::unix::fs::symlink(saved.path(), &link).unwrap();
    peft::save(&saved.model, &saved.options, "renamed", None, &link).unwrap();
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    assert_eq!(saved.load().unwrap().base_model_name.as_deref(), Some("renamed"));
}

#[test]
fn options_that_do_not_describe_the_adapters_are_refused() {
    let saved = Saved::new(plain());
    let check = |options: LoraOptions, part: &str| {
        let error = peft::save(&saved.model, &options, "tiny", None, &saved.path()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    check(LoraOptions { alpha: 1.0, ..plain() }, "scale 0.5");
    check(LoraOptions { r: 4, alpha: 8.0, ..plain() }, "rank 4");
    check(options(2, suffixes(&["up_proj"])), "the options say no adapter");
    check(options(2, suffixes(&["up_proj", "down_proj", "lm_head"])), "it has no adapter");
    let bare = Tiny::new(&Device::flex());
    assert!(matches!(peft::save(&bare, &plain(), "", None, &saved.path()), Err(PeftError::NoAdapter)));
    assert_eq!(factors(&saved.apply().unwrap()), factors(&saved.model));
}
