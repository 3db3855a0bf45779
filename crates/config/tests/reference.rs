//! The reference page and the JSON Schema follow from the types.

use std::path::Path;

use emberlora_config::RunConfig;
use serde_json::Value;

#[test]
fn the_reference_page_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/recipe.md");
    let page = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        page == RunConfig::reference_docs(),
        "docs/recipe.md differs from what the types say; run `cargo run --release -- config docs > docs/recipe.md`"
    );
}

/// Every mapping with fixed keys in the schema, with its path.
fn visit<'s>(schema: &'s Value, path: &str, found: &mut Vec<(String, &'s Value)>) {
    if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
        found.push((path.to_owned(), schema));
        for (key, below) in properties {
            visit(below, &format!("{path}.{key}"), found);
        }
    }
    for key in ["anyOf", "items"] {
        match schema.get(key) {
            Some(Value::Array(choices)) => choices.iter().for_each(|choice| visit(choice, path, found)),
            Some(items) => visit(items, &format!("{path}[]"), found),
            None => {}
        }
    }
}

#[test]
fn the_schema_closes_every_section() {
    let schema = RunConfig::schema();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    let mut sections = Vec::new();
    visit(&schema, "", &mut sections);
    let paths: Vec<_> = sections.iter().map(|(path, _)| path.as_str()).collect();
    for path in [
        "",
        ".model",
        ".adapter",
        ".quantization",
        ".data",
        ".data.train[]",
        ".train",
        ".train.schedule",
        ".train.optimizer",
    ] {
        assert!(paths.contains(&path), "{path} is not among {paths:?}");
    }
    for (path, section) in sections {
        assert_eq!(section["additionalProperties"], false, "{path}");
    }
}

#[test]
fn the_schema_names_what_is_required() {
    let schema = RunConfig::schema();
    assert_eq!(schema["required"], serde_json::json!(["model", "data"]));
    assert_eq!(schema["properties"]["model"]["required"], serde_json::json!(["source"]));
    assert_eq!(schema["properties"]["data"]["required"], serde_json::json!(["train"]));
    assert_eq!(schema["properties"]["adapter"].get("required"), None);
}

#[test]
fn the_schema_states_defaults_and_ranges() {
    let schema = RunConfig::schema();
    let adapter = &schema["properties"]["adapter"]["properties"];
    assert_eq!(adapter["r"]["minimum"], 1);
    assert_eq!(adapter["r"]["maximum"], 65536);
    assert_eq!(adapter["rank_pattern"]["additionalProperties"]["maximum"], 65536);
    assert_eq!(schema["properties"]["train"]["properties"]["epochs"]["maximum"], 1e6);
    assert_eq!(adapter["r"]["default"], 16);
    assert_eq!(adapter["dropout"]["minimum"], 0.0);
    assert_eq!(adapter["dropout"]["exclusiveMaximum"], 1.0);
    let attention = &schema["properties"]["model"]["properties"]["attention"];
    assert_eq!(attention["enum"], serde_json::json!(["fused", "sdpa", "flash_attention_2", "eager"]));
    assert_eq!(schema["properties"]["seed"]["default"], 42);
    let quantization = &schema["properties"]["quantization"];
    assert_eq!(quantization["default"], Value::Null);
    assert_eq!(quantization["anyOf"][1], serde_json::json!({"type": "null"}));
    let packed = &quantization["anyOf"][0];
    assert_eq!(packed["required"], serde_json::json!(["kind"]));
    assert_eq!(packed["properties"]["kind"]["enum"], serde_json::json!(["nf4", "fp4", "int8"]));
    assert_eq!(packed["properties"]["block_size"]["enum"], serde_json::json!([32, 64, 128, 256, 512]));
    assert_eq!(packed["properties"]["threshold"]["minimum"], 0.0);
}

#[test]
fn every_key_of_the_schema_is_in_the_reference() {
    let schema = RunConfig::schema();
    let page = RunConfig::reference_docs();
    let mut sections = Vec::new();
    visit(&schema, "", &mut sections);
    for (path, section) in sections {
        // The one mapping that is a value and no section stands in the text of its key.
        if path == ".gradient_checkpointing" {
            continue;
        }
        for (key, field) in section["properties"].as_object().expect("a mapping") {
            assert!(page.contains(&format!("| `{key}` |")), "{path}.{key}");
            let text = field["description"].as_str().expect("documentation").replace('|', "\\|");
            assert!(!text.is_empty() && page.contains(&text), "{path}.{key}");
        }
    }
}

#[test]
fn the_overview_of_defaults_is_a_recipe() {
    let page = RunConfig::reference_docs();
    let yaml = page.split("```").nth(1).and_then(|block| block.strip_prefix("yaml\n")).expect("a block of YAML");
    let required = ["model.source=m".to_owned(), "data.train=d".to_owned(), "output=runs/a".to_owned()];
    let read = RunConfig::parse(yaml, "a.yaml", &required).unwrap_or_else(|error| panic!("{error}"));
    let default = RunConfig::parse("seed: 42", "a.yaml", &required).expect("all that is required");
    assert_eq!(read, default);
}
