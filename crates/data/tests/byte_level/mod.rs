//! A tokenizer that a test can compute by hand: one token per byte, but for the pair `lo`.

use std::fs;
use std::path::Path;

use emberlora_data::Tokenizer;
use serde_json::{Map, Value, json};

/// The merged pair, the only token of two bytes.
pub const LO: u32 = 256;
pub const BOS: u32 = 257;
pub const EOS: u32 = 258;
pub const IM_START: u32 = 259;
pub const IM_END: u32 = 260;

/// The tokens of a text in which `lo` does not occur.
pub fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}

/// Writes the tokenizer's files and reads them. Texts begin with `<s>`; there is no chat template.
pub fn tokenizer() -> Tokenizer {
    let directory = tempfile::tempdir().unwrap();
    write(directory.path());
    Tokenizer::from_dir(directory.path()).unwrap()
}

fn write(directory: &Path) {
    // The printable alphabet of GPT-2's byte-level BPE: bytes without a printable character get those from U+0100 on.
    let mut vocab = Map::new();
    let mut shifted = 0;
    for byte in 0..=255u8 {
        let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let character = if printable {
            char::from(byte)
        } else {
            shifted += 1;
            char::from_u32(255 + shifted).unwrap()
        };
        vocab.insert(character.to_string(), json!(byte));
    }
    vocab.insert("lo".to_owned(), json!(LO));
    let special = |(id, content): (u32, &str)| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let added: Vec<Value> = [(BOS, "<s>"), (EOS, "</s>"), (IM_START, "<|im_start|>"), (IM_END, "<|im_end|>")]
        .into_iter()
        .map(special)
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}}
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": [["l", "o"]]}
    });
    let config = json!({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"});
    fs::write(directory.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(directory.join("tokenizer_config.json"), config.to_string()).unwrap();
}
