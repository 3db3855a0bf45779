//! The reference page, `docs/recipe.md`, made from the same table as the reader.

use std::fmt::Write;

use crate::run::RunConfig;
use crate::spec::{Below, Field, Section, join, or_null};

const INTRODUCTION: &str = "\
# The recipe

<!-- Generated from crates/config by `cargo run --release -- config docs > docs/recipe.md`; do not edit. -->

A run is described by one YAML file. This page lists every key; `emberlora config schema` prints the same as a JSON
Schema, with which editors complete and check recipes.

* Only `model.source` and `data.train` are required; every other key has a default.
* Unknown keys, wrong types, values out of range and combinations that make no sense are errors. All mistakes of a recipe
  are reported in one go, each with its line, its key, the value found and what is allowed.
* Paths are relative to the directory in which the command is run, not to the recipe.
* Numbers are used in single precision: one that becomes infinite, 0 or another that is not allowed there is an error.
* Arguments of the form `key.path=value` after the recipe override it: `train.learning_rate=1e-4`,
  `adapter.targets='[q_proj, v_proj]'`, `data.train.0.weight=2` where `data.train` is a list. The value is read as YAML
  and replaces what stood there, also a whole section. The last one counts. A string with ` #` in it needs YAML's quotes,
  as in `'output=\"a #b\"'`; a name with dots in it is set with its mapping, as in
  `'adapter.rank_pattern={layers.0.self_attn.q_proj: 4}'`.
* `train.max_steps` overrides `train.epochs`, as in transformers.
* The output directory of a run holds `config.yaml`, the recipe with every value filled in.

";

/// The whole page.
pub(crate) fn page() -> String {
    let fields = RunConfig::fields();
    let mut page = INTRODUCTION.to_owned();
    page.push_str("## All keys with their defaults\n\n```yaml\n");
    overview(&mut page, &fields, 0);
    page.push_str("```\n\n## Top level\n\n");
    table(&mut page, &fields);
    sections(&mut page, &fields, "");
    page.truncate(page.trim_end().len());
    page.push('\n');
    page
}

fn overview(page: &mut String, fields: &[Field], depth: usize) {
    for field in fields {
        let indent = "  ".repeat(depth);
        let line = match (&field.below, &field.default) {
            (Below::Section(below), None) => {
                page.push_str(&format!("{indent}{}:\n", field.key));
                overview(page, below, depth + 1);
                continue;
            }
            (_, Some(default)) => format!("{indent}{}: {default}\n", field.key),
            (_, None) => format!("{indent}{}:  # required: {}\n", field.key, field.allowed),
        };
        page.push_str(&line);
    }
}

fn sections(page: &mut String, fields: &[Field], above: &str) {
    for field in fields {
        let path = join(above, field.key);
        let (below, title) = match &field.below {
            Below::Nothing => continue,
            Below::Section(below) => (below, path.clone()),
            Below::Items(below) => (below, format!("{path}[]")),
        };
        write_heading(page, &title, &field.doc);
        table(page, below);
        sections(page, below, &title);
    }
}

fn write_heading(page: &mut String, title: &str, doc: &str) {
    let level = if title.contains(['.', '[']) { "###" } else { "##" };
    writeln!(page, "\n{level} `{title}`\n\n{doc}\n").expect("writing to a string cannot fail");
}

fn table(page: &mut String, fields: &[Field]) {
    page.push_str("| key | default | allowed | meaning |\n|---|---|---|---|\n");
    for field in fields {
        let default = match (&field.default, field.required) {
            (Some(default), _) => format!("`{default}`"),
            (None, true) => "required".to_owned(),
            (None, false) => "see below".to_owned(),
        };
        let allowed = match field.below {
            Below::Section(_) if field.default.is_some() => or_null("a section"),
            Below::Section(_) => "a section".to_owned(),
            _ => field.allowed.clone(),
        };
        let cells = [format!("`{}`", field.key), default, allowed, field.doc.clone()];
        let cells = cells.map(|cell| cell.replace('|', "\\|"));
        page.push_str(&format!("| {} |\n", cells.join(" | ")));
    }
}
