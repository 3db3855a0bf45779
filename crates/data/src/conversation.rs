//! What a row of data is before and after tokenisation.

use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

/// One turn of a conversation.
///
/// The keys keep the order of the row, and every key reaches the chat template (`reasoning_content`, `tool_calls`,
/// `name`, …). Keys whose value is null are dropped on the way to the template, as transformers does.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    fields: Map<String, Value>,
}

/// Why a JSON value is not a [`Message`].
#[derive(Debug, thiserror::Error, Clone, PartialEq, Eq)]
pub enum MessageError {
    /// The value is not an object.
    #[error("a message must be an object with `role` and `content`, found {0}")]
    NotAnObject(&'static str),
    /// `role` is missing or not a string.
    #[error("a message needs a `role` that is a string, found {0}")]
    Role(&'static str),
    /// `content` is neither a string, a list of parts, nor null.
    #[error("the `content` of a message must be a string, a list of parts or null, found {0}")]
    Content(&'static str),
}

impl Message {
    /// A message with text content.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let mut fields = Map::new();
        fields.insert("role".into(), Value::String(role.into()));
        fields.insert("content".into(), Value::String(content.into()));
        Self { fields }
    }

    /// Takes a message from a row.
    ///
    /// # Errors
    /// When the value is not an object, has no string `role`, or has a `content` that no template can read.
    pub fn from_json(value: Value) -> Result<Self, MessageError> {
        let Value::Object(fields) = value else {
            return Err(MessageError::NotAnObject(kind(Some(&value))));
        };
        match fields.get("role") {
            Some(Value::String(_)) => {}
            other => return Err(MessageError::Role(kind(other))),
        }
        match fields.get("content") {
            None | Some(Value::Null | Value::String(_) | Value::Array(_)) => Ok(Self { fields }),
            other => Err(MessageError::Content(kind(other))),
        }
    }

    /// Who speaks.
    pub fn role(&self) -> &str {
        self.fields.get("role").and_then(Value::as_str).unwrap_or_default()
    }

    /// What is said: a string, a list of parts, or nothing.
    pub fn content(&self) -> Option<&Value> {
        self.get("content")
    }

    /// Any field that is present and not null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.fields.get(key).filter(|value| !value.is_null())
    }

    /// Every field in the order of the row, `role` and `content` included.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    pub(crate) fn fields_mut(&mut self) -> &mut Map<String, Value> {
        &mut self.fields
    }
}

impl Serialize for Message {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.fields.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Message::from_json(Value::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

fn kind(value: Option<&Value>) -> &'static str {
    match value {
        None => "nothing",
        Some(Value::Null) => "null",
        Some(Value::Bool(_)) => "a boolean",
        Some(Value::Number(_)) => "a number",
        Some(Value::String(_)) => "a string",
        Some(Value::Array(_)) => "a list",
        Some(Value::Object(_)) => "an object",
    }
}

/// The turns of one row, and the tools that the row offers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, derive_new::new)]
pub struct Conversation {
    /// The turns in order.
    pub messages: Vec<Message>,
    /// Passed to the template as given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tools: Option<Value>,
}

/// Where a document came from.
#[derive(Debug, Clone, PartialEq, Eq, derive_new::new)]
pub struct RowRef {
    /// The file as named in the recipe.
    pub file: Arc<Path>,
    /// The line in the file, counted from 1.
    pub line: usize,
}

impl std::fmt::Display for RowRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file.display(), self.line)
    }
}

/// A tokenised row.
#[derive(Debug, Clone, PartialEq, derive_new::new)]
pub struct Document {
    /// Token ids.
    pub ids: Vec<u32>,
    /// `trained[i]` says whether token `i` is a label; as long as `ids`.
    pub trained: Vec<bool>,
    /// The row it came from.
    pub source: RowRef,
    /// The rendered text, kept only for inspection.
    pub text: Option<String>,
}
