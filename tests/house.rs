//! The rules of the house that no compiler checks: which crate imports which, and where `unsafe` may stand.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// `unsafe` stands here and nowhere else.
const UNSAFE_ALLOWED: [&str; 2] = ["crates/kernels/src/", "crates/model/src/weights/file.rs"];

/// Tensors are read back from the device here and nowhere else in the crates that compute: the losses and norms of steps and
/// evaluations, scores of generation, adapters that are written, and layers that are wrapped. A step on one device reads
/// nothing; one that several devices share hands their gradients and the adapters on.
const READS_ALLOWED: [&str; 4] =
    ["crates/train/src/state.rs", "crates/model/src/generate.rs", "crates/lora/src/peft/", "crates/lora/src/linear.rs"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The rows of ARCHITECTURE.md's table, top to bottom: a crate's folder name and the ones that it imports.
fn documented_imports() -> Vec<(String, BTreeSet<String>)> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    text.lines()
        .filter_map(|line| line.strip_prefix("| `crates/"))
        .map(|row| {
            let name = row.split('`').next().unwrap().to_owned();
            let imports = row.trim_end_matches('|').rsplit('|').next().unwrap().trim();
            let imports = imports.split(", ").filter(|import| *import != "–").map(str::to_owned).collect();
            (name, imports)
        })
        .collect()
}

/// The crates of the house that a manifest depends on; with `dev`, those that only its tests use as well.
fn manifest_imports(name: &str, dev: bool) -> BTreeSet<String> {
    let text = fs::read_to_string(root().join("crates").join(name).join("Cargo.toml")).unwrap();
    let mut counts = false;
    let mut imports = BTreeSet::new();
    for line in text.lines() {
        if line.starts_with('[') {
            counts = line.contains("dependencies") && (dev || !line.contains("dev-dependencies"));
        } else if let Some(import) = line.strip_prefix("emberlora-").filter(|_| counts) {
            imports.insert(import.split(['.', ' ', '=']).next().unwrap().to_owned());
        }
    }
    imports
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for path in entries.map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

#[test]
fn the_table_names_every_crate() {
    let documented: BTreeSet<String> = documented_imports().into_iter().map(|(name, _)| name).collect();
    let present = fs::read_dir(root().join("crates")).unwrap();
    let present = present.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(documented, present);
}

#[test]
fn manifests_import_what_the_table_says() {
    for (name, documented) in documented_imports() {
        assert_eq!(manifest_imports(&name, false), documented, "crates/{name}/Cargo.toml");
    }
}

#[test]
fn no_crate_imports_upwards() {
    let mut above = BTreeSet::new();
    for (name, _) in documented_imports() {
        for import in manifest_imports(&name, true) {
            assert!(above.contains(&import), "crates/{name} imports {import}, which does not stand above it");
        }
        above.insert(name);
    }
}

#[test]
fn unsafe_code_stands_where_it_may() {
    let mut files = Vec::new();
    for folder in ["crates", "src", "tests", "examples", "benches"] {
        rust_files(&root().join(folder), &mut files);
    }
    assert!(!files.is_empty());
    for file in files {
        let name = file.strip_prefix(root()).unwrap().to_str().unwrap().replace('\\', "/");
        if UNSAFE_ALLOWED.iter().any(|allowed| name.starts_with(allowed)) {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap();
            let keyword = "unsafe";
            let found =
                ["{", "fn", "impl", "extern", "trait"].iter().any(|next| code.contains(&format!("{keyword} {next}")));
            assert!(!found, "{name}:{}: {line}", number + 1);
        }
    }
}

#[test]
fn a_step_reads_nothing_from_the_device() {
    let mut files = Vec::new();
    for name in ["kernels", "lora", "model", "train"] {
        rust_files(&root().join("crates").join(name).join("src"), &mut files);
    }
    for file in files {
        let name = file.strip_prefix(root()).unwrap().to_str().unwrap().replace('\\', "/");
        if READS_ALLOWED.iter().any(|allowed| name.starts_with(allowed)) {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        let text = text.split("#[cfg(test)]").next().unwrap();
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap();
            let found = ["into_data", "into_scalar", "to_data(", ".sync("].iter().find(|read| code.contains(**read));
            assert!(found.is_none(), "{name}:{}: {line}", number + 1);
        }
    }
}

#[test]
fn the_guide_quotes_the_example_as_it_is() {
    let guide = fs::read_to_string(root().join("docs/guide.md")).unwrap();
    let example = fs::read_to_string(root().join("examples/custom_trainer.rs")).unwrap();
    let quotes: Vec<&str> = guide.split("```rust\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(!quotes.is_empty());
    for quote in quotes {
        assert!(example.contains(quote), "docs/guide.md quotes what examples/custom_trainer.rs does not say:\n{quote}");
    }
}
