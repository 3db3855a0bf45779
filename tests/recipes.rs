//! Every recipe of the repository is valid and says how to run it.

use std::fs;
use std::path::{Path, PathBuf};

use emberlora::config::RunConfig;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every YAML file below `folder`, sorted.
fn recipes(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(recipes(&path));
        } else if path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml") {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn every_recipe_is_valid() {
    let recipes = recipes(&root().join("recipes"));
    assert!(recipes.iter().any(|recipe| recipe.ends_with("quickstart.yaml")), "{recipes:?}");
    for recipe in recipes {
        if let Err(error) = RunConfig::load(&recipe, &[]) {
            panic!("{error}");
        }
    }
}

#[test]
fn every_recipe_resolves_to_itself() {
    for recipe in recipes(&root().join("recipes")) {
        let resolved = RunConfig::load(&recipe, &[]).unwrap().to_yaml();
        let again = RunConfig::parse(&resolved, "resolved", &[]).unwrap_or_else(|error| panic!("{error}\n{resolved}"));
        assert_eq!(again.to_yaml(), resolved, "{}", recipe.display());
    }
}

#[test]
fn every_recipe_opens_with_the_command_that_runs_it() {
    for recipe in recipes(&root().join("recipes")) {
        let name = recipe.strip_prefix(root()).unwrap().to_str().unwrap().replace('\\', "/");
        let text = fs::read_to_string(&recipe).unwrap();
        let first = text.lines().next().unwrap_or_default();
        let command = first.strip_prefix("# cargo run --release -- ").unwrap_or_else(|| panic!("{name}: {first}"));
        assert!(command.split(' ').any(|word| word == name), "{name}: {first}");
    }
}

#[test]
fn no_two_recipes_write_to_the_same_place() {
    let mut outputs = std::collections::HashMap::new();
    for recipe in recipes(&root().join("recipes")) {
        let output = RunConfig::load(&recipe, &[]).unwrap().output;
        if let Some(other) = outputs.insert(output.clone(), recipe.clone()) {
            panic!("{} and {} both write to {}", recipe.display(), other.display(), output.display());
        }
    }
}
