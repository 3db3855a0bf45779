//! The files of a tokenizer's directory.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokenizers::AddedToken;

use super::TokenizerError;

pub(super) const TOKENIZER: &str = "tokenizer.json";
pub(super) const CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
const CHAT_TEMPLATE: &str = "chat_template.jinja";
const LEGACY_CHAT_TEMPLATE: &str = "chat_template.json";
const MORE_CHAT_TEMPLATES: &str = "additional_chat_templates";

/// The named special tokens, in the order in which transformers lists them.
const NAMES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The chat templates that come with a tokenizer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChatTemplates {
    /// The template that is used unless there is a reason for another.
    pub default: Option<String>,
    /// Further templates by name; `tool_use` is taken for conversations with tools.
    pub named: BTreeMap<String, String>,
}

/// What the directory says, before it is applied.
pub(super) struct Files {
    pub(super) tokenizer: Vec<u8>,
    pub(super) config: Config,
    pub(super) templates: ChatTemplates,
    pub(super) sha256: String,
}

/// The parts of `tokenizer_config.json` that matter here.
#[derive(Default)]
pub(super) struct Config {
    pub(super) named: Vec<(String, AddedToken)>,
    pub(super) extra: Vec<AddedToken>,
    /// `added_tokens_decoder`, in the order of the ids.
    pub(super) decoder: Vec<AddedToken>,
    pub(super) split_special_tokens: bool,
}

impl Files {
    pub(super) fn read(dir: &Path) -> Result<Self, TokenizerError> {
        let mut reader = Reader { dir, hash: Sha256::new() };
        let tokenizer = reader.optional(TOKENIZER)?.ok_or_else(|| TokenizerError::Missing { dir: dir.to_owned() })?;
        let raw_config = reader.object(CONFIG)?.unwrap_or_default();
        let map = reader.object(SPECIAL_TOKENS_MAP)?;
        let config = Config::parse(&raw_config, map.as_ref())
            .map_err(|reason| TokenizerError::Malformed { path: dir.join(CONFIG), reason })?;
        let templates = reader.templates(&raw_config)?;
        let digest = reader.hash.finalize();
        let sha256 = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { tokenizer, config, templates, sha256 })
    }
}

impl Config {
    fn parse(config: &Map<String, Value>, map: Option<&Map<String, Value>>) -> Result<Self, String> {
        let mut parsed = Self {
            split_special_tokens: config.get("split_special_tokens").and_then(Value::as_bool).unwrap_or(false),
            ..Self::default()
        };
        let decoder = config.get("added_tokens_decoder");
        if let Some(tokens) = decoder.and_then(Value::as_object) {
            let mut by_id = BTreeMap::new();
            for (id, token) in tokens {
                let index: u32 = id.parse().map_err(|_| format!("added_tokens_decoder: `{id}` is not a token id"))?;
                by_id.insert(index, added_token(token, &format!("added_tokens_decoder.{id}"), false)?);
            }
            parsed.decoder = by_id.into_values().collect();
        }
        let older_layout = decoder.is_none();
        let map = map.filter(|_| older_layout);
        let value =
            |key: &str| map.and_then(|map| map.get(key)).or_else(|| config.get(key)).filter(|value| !value.is_null());
        for name in NAMES {
            if let Some(token) = value(name) {
                let token = added_token(token, name, true)?;
                parsed.named.push((name.to_owned(), token));
            }
        }
        for key in ["extra_special_tokens", "additional_special_tokens"] {
            let tokens: Vec<&Value> = match value(key) {
                None => continue,
                Some(Value::Array(tokens)) => tokens.iter().collect(),
                Some(Value::Object(tokens)) => tokens.values().collect(),
                Some(_) => return Err(format!("{key}: expected a list of tokens")),
            };
            for token in tokens {
                parsed.extra.push(added_token(token, key, true)?);
            }
            if !parsed.extra.is_empty() {
                break;
            }
        }
        Ok(parsed)
    }
}

/// A token as a string or as the object that transformers writes for an `AddedToken`.
fn added_token(value: &Value, key: &str, special: bool) -> Result<AddedToken, String> {
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let content = value.as_str().or_else(|| value.get("content")?.as_str());
    let Some(content) = content else {
        return Err(format!("{key}: expected a string or an object with `content`, found {value}"));
    };
    let special = flag("special").unwrap_or(special);
    Ok(AddedToken::from(content, special)
        .single_word(flag("single_word").unwrap_or(false))
        .lstrip(flag("lstrip").unwrap_or(false))
        .rstrip(flag("rstrip").unwrap_or(false))
        .normalized(flag("normalized").unwrap_or(!special)))
}

/// Reads files of a directory and hashes them on the way.
struct Reader<'d> {
    dir: &'d Path,
    hash: Sha256,
}

impl Reader<'_> {
    fn optional(&mut self, name: &str) -> Result<Option<Vec<u8>>, TokenizerError> {
        let path = self.dir.join(name);
        match fs::read(&path) {
            Ok(bytes) => {
                self.hash.update(name.as_bytes());
                self.hash.update([0]);
                self.hash.update((bytes.len() as u64).to_le_bytes());
                self.hash.update(&bytes);
                Ok(Some(bytes))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(source) => Err(TokenizerError::Read { path, source }),
        }
    }

    fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, TokenizerError> {
        let Some(bytes) = self.optional(name)? else {
            return Ok(None);
        };
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(object)) => Ok(Some(object)),
            Ok(_) => Err(self.malformed(name, "expected a JSON object".into())),
            Err(error) => Err(self.malformed(name, error.to_string())),
        }
    }

    fn text(&mut self, name: &str) -> Result<Option<String>, TokenizerError> {
        let Some(bytes) = self.optional(name)? else {
            return Ok(None);
        };
        String::from_utf8(bytes).map(Some).map_err(|error| self.malformed(name, error.to_string()))
    }

    /// Template files take the place of everything that `tokenizer_config.json` says; `chat_template.json`, which
    /// only processors of multi-modal models write, is read when there is nothing else.
    fn templates(&mut self, config: &Map<String, Value>) -> Result<ChatTemplates, TokenizerError> {
        let mut templates = ChatTemplates { default: self.text(CHAT_TEMPLATE)?, named: BTreeMap::new() };
        for name in self.more_templates()? {
            let file = format!("{MORE_CHAT_TEMPLATES}/{name}.jinja");
            if let Some(text) = self.text(&file)? {
                templates.insert(name, text);
            }
        }
        if templates != ChatTemplates::default() {
            return Ok(templates);
        }
        match config.get("chat_template") {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => templates.default = Some(text.clone()),
            Some(Value::Array(list)) => {
                for entry in list {
                    let field = |key: &str| entry.get(key).and_then(Value::as_str);
                    let (Some(name), Some(text)) = (field("name"), field("template")) else {
                        let reason = "chat_template: expected entries with `name` and `template`";
                        return Err(self.malformed(CONFIG, reason.into()));
                    };
                    templates.insert(name.to_owned(), text.to_owned());
                }
            }
            Some(_) => {
                let reason = "chat_template: expected a string or a list of named templates";
                return Err(self.malformed(CONFIG, reason.into()));
            }
        }
        if templates == ChatTemplates::default()
            && let Some(legacy) = self.object(LEGACY_CHAT_TEMPLATE)?
        {
            match legacy.get("chat_template").and_then(Value::as_str) {
                Some(text) => templates.default = Some(text.to_owned()),
                None => {
                    let reason = "expected `chat_template` with a string";
                    return Err(self.malformed(LEGACY_CHAT_TEMPLATE, reason.into()));
                }
            }
        }
        Ok(templates)
    }

    fn more_templates(&self) -> Result<Vec<String>, TokenizerError> {
        let dir = self.dir.join(MORE_CHAT_TEMPLATES);
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(TokenizerError::Read { path: dir, source }),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|source| TokenizerError::Read { path: dir.clone(), source })?;
            let file = entry.file_name();
            if let Some(name) = file.to_str().and_then(|file| file.strip_suffix(".jinja")) {
                names.push(name.to_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    fn malformed(&self, name: &str, reason: String) -> TokenizerError {
        TokenizerError::Malformed { path: self.dir.join(name), reason }
    }
}

impl ChatTemplates {
    fn insert(&mut self, name: String, text: String) {
        if name == "default" {
            self.default = Some(text);
        } else {
            self.named.insert(name, text);
        }
    }
}
