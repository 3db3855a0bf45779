//! What is read from a tokenizer's directory, after transformers 5, and text from tokens.

use std::fs;
use std::path::Path;

use emberlora_config::ChatTemplateChoice;
use emberlora_data::{Tokenizer, TokenizerError};
use serde_json::{Value, json};
use tempfile::TempDir;

fn fixture(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/chat/tokenizer").join(name)).unwrap()
}

/// A directory with the fixture's `tokenizer.json` and the given files.
fn directory(files: &[(&str, Value)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), fixture("tokenizer.json")).unwrap();
    for (name, value) in files {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        fs::write(path, text).unwrap();
    }
    dir
}

fn load(files: &[(&str, Value)]) -> Tokenizer {
    Tokenizer::from_dir(directory(files).path()).unwrap()
}

fn named(tokenizer: &Tokenizer) -> Vec<(&str, &str, u32)> {
    tokenizer.special_tokens().map(|(name, token)| (name, token.text.as_str(), token.id)).collect()
}

#[test]
fn named_tokens_are_strings_or_objects() {
    let config = json!({
        "bos_token": { "__type": "AddedToken", "content": "<s>", "lstrip": false },
        "eos_token": "<|im_end|>",
        "pad_token": null,
        "add_bos_token": true,
        "add_eos_token": true,
    });
    let tokenizer = load(&[("tokenizer_config.json", config)]);
    assert_eq!(named(&tokenizer), [("bos_token", "<s>", 1), ("eos_token", "<|im_end|>", 5)]);
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_token(), tokenizer.pad_id()), (Some(1), Some("<|im_end|>"), None));
    // `tokenizer.json` has no post-processor that adds tokens, and transformers 5 asks nobody else.
    assert_eq!(tokenizer.encode("a", true).unwrap(), tokenizer.encode("a", false).unwrap());
}

#[test]
fn the_older_special_tokens_map_counts_only_without_added_tokens_decoder() {
    let map = json!({ "eos_token": { "content": "<|eot_id|>" }, "unk_token": "<unk>" });
    let config = json!({ "eos_token": "</s>", "bos_token": "<s>" });
    let older = load(&[("tokenizer_config.json", config.clone()), ("special_tokens_map.json", map.clone())]);
    assert_eq!(named(&older), [("bos_token", "<s>", 1), ("eos_token", "<|eot_id|>", 10), ("unk_token", "<unk>", 0)]);
    let mut newer = config;
    newer["added_tokens_decoder"] = json!({ "2": { "content": "</s>", "special": true, "normalized": false } });
    let newer = load(&[("tokenizer_config.json", newer), ("special_tokens_map.json", map)]);
    assert_eq!(named(&newer), [("bos_token", "<s>", 1), ("eos_token", "</s>", 2)]);
}

#[test]
fn tokens_that_the_vocabulary_lacks_are_added_and_named_ones_become_special() {
    let plain = load(&[]);
    let size = plain.vocab_size() as u32;
    let config = json!({
        "eos_token": "</think>",
        "pad_token": "[PAD]",
        "extra_special_tokens": ["[EXTRA]", "<s>"],
        "added_tokens_decoder": { "2000": { "content": "[OLD]", "special": false } },
    });
    let tokenizer = load(&[("tokenizer_config.json", config)]);
    assert_eq!(tokenizer.vocab_size() as u32, size + 3);
    assert_eq!(
        ["[OLD]", "[PAD]", "[EXTRA]"].map(|token| tokenizer.token_to_id(token)),
        [size, size + 1, size + 2].map(Some)
    );
    let ids = tokenizer.encode("[PAD]x</think>[EXTRA]", false).unwrap().ids;
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "x");
    let ids = plain.encode("x</think>", false).unwrap().ids;
    assert_eq!(plain.decode(&ids, true).unwrap(), "x</think>");
}

#[test]
fn template_files_come_before_the_config() {
    let config = json!({ "chat_template": "config" });
    let text = |files: &[(&str, Value)]| load(files).chat_templates().default.clone();
    assert_eq!(text(&[]), None);
    assert_eq!(text(&[("chat_template.json", json!({ "chat_template": "legacy" }))]).as_deref(), Some("legacy"));
    let mut files =
        vec![("chat_template.json", json!({ "chat_template": "legacy" })), ("tokenizer_config.json", config)];
    assert_eq!(text(&files).as_deref(), Some("config"));
    files.push(("chat_template.jinja", json!("file")));
    assert_eq!(text(&files).as_deref(), Some("file"));
}

#[test]
fn conversations_with_tools_take_the_template_for_them() {
    let list = json!([{ "name": "default", "template": "plain" }, { "name": "tool_use", "template": "tools" }]);
    let in_config = load(&[("tokenizer_config.json", json!({ "chat_template": list }))]);
    let in_files =
        load(&[("chat_template.jinja", json!("plain")), ("additional_chat_templates/tool_use.jinja", json!("tools"))]);
    for tokenizer in [in_config, in_files] {
        let template = tokenizer.chat_template(&ChatTemplateChoice::Auto).unwrap().unwrap();
        for (tools, expected) in [(Value::Null, "plain"), (json!([{}]), "tools")] {
            let row = json!({ "messages": [{ "role": "user", "content": "a" }], "tools": tools });
            let row = serde_json::from_value(row).unwrap();
            assert_eq!(template.render(&row, &Default::default()).unwrap(), expected);
        }
    }
    let nameless = load(&[("additional_chat_templates/rag.jinja", json!("rag"))]);
    let error = nameless.chat_template(&ChatTemplateChoice::Auto).unwrap_err().to_string();
    assert!(error.contains("named rag but no default one"), "{error}");
}

#[test]
fn the_hash_covers_every_file() {
    let base = load(&[]).sha256().to_owned();
    assert_eq!(base.len(), 64);
    assert_eq!(load(&[]).sha256(), base);
    for (name, value) in [
        ("tokenizer_config.json", json!({})),
        ("special_tokens_map.json", json!({})),
        ("chat_template.jinja", json!("")),
        ("additional_chat_templates/x.jinja", json!("")),
    ] {
        assert_ne!(load(&[(name, value)]).sha256(), base, "{name}");
    }
}

#[test]
fn broken_directories_are_errors_that_name_the_file() {
    let empty = tempfile::tempdir().unwrap();
    let error = Tokenizer::from_dir(empty.path()).unwrap_err();
    assert!(matches!(error, TokenizerError::Missing { .. }), "{error}");
    for (name, value, reason) in [
        ("tokenizer.json", json!("{"), "tokenizer.json: "),
        ("tokenizer.json", json!({ "model": {} }), "tokenizer.json: "),
        ("tokenizer_config.json", json!("[]"), "expected a JSON object"),
        ("tokenizer_config.json", json!({ "eos_token": 3 }), "eos_token: expected a string or an object"),
        ("tokenizer_config.json", json!({ "added_tokens_decoder": { "x": "a" } }), "`x` is not a token id"),
        ("tokenizer_config.json", json!({ "chat_template": 1 }), "chat_template: expected"),
        ("tokenizer_config.json", json!({ "chat_template": ["a"] }), "entries with `name` and `template`"),
        ("chat_template.json", json!({}), "expected `chat_template`"),
    ] {
        let error = Tokenizer::from_dir(directory(&[(name, value)]).path()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(reason), "{error}");
    }
}

#[test]
fn offsets_are_bytes_and_cover_white_space() {
    let mut trimming: Value = serde_json::from_slice(&fixture("tokenizer.json")).unwrap();
    trimming["post_processor"] =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    for tokenizer in [load(&[]), load(&[("tokenizer.json", trimming)])] {
        let text = " é  你好\n\n<s> 🙂 a\n";
        let encoding = tokenizer.encode(text, false).unwrap();
        let mut covered = 0;
        for range in &encoding.offsets {
            assert!(range.start <= covered && text.is_char_boundary(range.start), "{range:?}");
            covered = covered.max(range.end);
        }
        assert_eq!(covered, text.len());
    }
}

#[test]
fn streamed_text_is_the_decoded_text_in_whole_characters() {
    let tokenizer = load(&[]);
    for text in ["Hello, world.", "🙂👩‍👩‍👧 你好 é", "<s>a</s> b", " x"] {
        let ids = tokenizer.encode(text, false).unwrap().ids;
        let mut stream = tokenizer.decode_stream(false);
        let pieces: Vec<_> = ids.iter().map(|&id| stream.step(id).unwrap().unwrap_or_default()).collect();
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
        assert_eq!(stream.finish().unwrap(), None);
    }
    let ids = tokenizer.encode("🙂", false).unwrap().ids;
    assert!(ids.len() > 1);
    let mut stream = tokenizer.decode_stream(false);
    assert_eq!(stream.step(ids[0]).unwrap(), None);
    assert_eq!(stream.finish().unwrap().as_deref(), Some("\u{fffd}"));
}
