//! A YAML document as a tree that remembers which line each part stands on.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, SerializeSeq, Serializer};
use serde_saphyr::Spanned;
use serde_saphyr::options::{DuplicateKeyPolicy, NonFiniteFloatPolicy};

use crate::error::Place;

/// A value and where it was written.
#[derive(Clone, Debug, PartialEq, derive_new::new)]
pub(crate) struct Node {
    pub(crate) content: Content,
    pub(crate) place: Place,
}

/// What a node holds. A mapping keeps repeated keys: they are reported together with all other mistakes.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Content {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// One `key: value` of a mapping.
#[derive(Clone, Debug, PartialEq, derive_new::new)]
pub(crate) struct Entry {
    pub(crate) key: String,
    pub(crate) place: Place,
    pub(crate) value: Node,
}

impl Node {
    /// A node that was made here rather than read.
    pub(crate) fn made(content: Content) -> Self {
        Self::new(content, Place::Nowhere)
    }

    pub(crate) fn text(text: impl Into<String>) -> Self {
        Self::made(Content::Text(text.into()))
    }

    pub(crate) fn map<K: Into<String>>(entries: impl IntoIterator<Item = (K, Node)>) -> Self {
        let entries = entries.into_iter().map(|(key, value)| Entry::new(key.into(), Place::Nowhere, value));
        Self::made(Content::Map(entries.collect()))
    }

    pub(crate) fn list(items: impl IntoIterator<Item = Node>) -> Self {
        Self::made(Content::List(items.into_iter().collect()))
    }

    /// The value of `key`, if this is a mapping that has it.
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        match &self.content {
            Content::Map(entries) => {
                let entry = entries.iter().find(|entry| entry.key == key)?;
                Some(&entry.value)
            }
            _ => None,
        }
    }

    /// The same mapping without these keys.
    pub(crate) fn without(mut self, keys: &[&str]) -> Self {
        if let Content::Map(entries) = &mut self.content {
            entries.retain(|entry| !keys.contains(&entry.key.as_str()));
        }
        self
    }

    pub(crate) fn is_null(&self) -> bool {
        self.content == Content::Null
    }

    pub(crate) fn is_empty_list(&self) -> bool {
        matches!(&self.content, Content::List(items) if items.is_empty())
    }

    /// Reads one YAML document. Every value is placed at its line, or at `place` when that is given.
    pub(crate) fn from_yaml(yaml: &str, place: Option<&Place>) -> Result<Self, serde_saphyr::Error> {
        let options = serde_saphyr::options! {
            duplicate_keys: DuplicateKeyPolicy::PassThrough,
            non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
            strict_booleans: true,
            leading_zero_numbers_as_strings: true,
            reject_unsupported_tags: true,
            with_snippet: false,
        };
        let Located(mut node) = serde_saphyr::from_str_with_options(yaml, options)?;
        if let Some(place) = place {
            node.set_place(place);
        }
        Ok(node)
    }

    fn set_place(&mut self, place: &Place) {
        self.place = place.clone();
        match &mut self.content {
            Content::List(items) => items.iter_mut().for_each(|item| item.set_place(place)),
            Content::Map(entries) => entries.iter_mut().for_each(|entry| {
                entry.place = place.clone();
                entry.value.set_place(place);
            }),
            _ => {}
        }
    }

    /// The document that [`Node::from_yaml`] reads as this tree, floats bit by bit.
    pub(crate) fn to_yaml(&self) -> String {
        let options = serde_saphyr::ser_options! {
            compact_list_indent: false,
            prefer_block_scalars: false,
        };
        serde_saphyr::to_string_with_options(self, options)
            .expect("nulls, booleans, numbers, strings, lists and string-keyed mappings all have a YAML form")
    }

    /// The value on one line, as it could be written in a recipe.
    pub(crate) fn inline(&self) -> String {
        match &self.content {
            Content::Null => "null".to_owned(),
            Content::Bool(value) => value.to_string(),
            Content::Int(value) => value.to_string(),
            Content::Float(value) => inline_float(*value),
            Content::Text(text) => inline_text(text),
            Content::List(items) => {
                let items: Vec<_> = items.iter().map(Node::inline).collect();
                format!("[{}]", items.join(", "))
            }
            Content::Map(entries) => {
                let entries: Vec<_> = entries
                    .iter()
                    .map(|entry| format!("{}: {}", inline_text(&entry.key), entry.value.inline()))
                    .collect();
                format!("{{{}}}", entries.join(", "))
            }
        }
    }
}

fn inline_float(value: f64) -> String {
    if value.is_nan() {
        ".nan".to_owned()
    } else if value.is_infinite() {
        if value > 0.0 { ".inf" } else { "-.inf" }.to_owned()
    } else {
        format!("{value:?}")
    }
}

/// Plain where that is plainly a string, quoted otherwise.
fn inline_text(text: &str) -> String {
    let plain = text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-./:".contains(c))
        && !text.ends_with(':')
        && !["true", "false", "null"].contains(&text.to_ascii_lowercase().as_str());
    if plain { text.to_owned() } else { format!("{text:?}") }
}

/// A node together with the line that the YAML reader saw it on.
struct Located(Node);

impl<'de> Deserialize<'de> for Located {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<ContentOf>::deserialize(deserializer)?;
        let place = Place::Line(spanned.referenced.line());
        Ok(Self(Node::new(spanned.value.0, place)))
    }
}

struct ContentOf(Content);

impl<'de> Deserialize<'de> for ContentOf {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor).map(Self)
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Content, E> {
        Ok(Content::Null)
    }

    fn visit_none<E: de::Error>(self) -> Result<Content, E> {
        Ok(Content::Null)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Content, E> {
        Ok(Content::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Content, E> {
        Ok(Content::Int(value.into()))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Content, E> {
        Ok(Content::Int(value.into()))
    }

    fn visit_i128<E: de::Error>(self, value: i128) -> Result<Content, E> {
        Ok(Content::Int(value))
    }

    fn visit_u128<E: de::Error>(self, value: u128) -> Result<Content, E> {
        Ok(Content::Int(value.try_into().unwrap_or(i128::MAX)))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Content, E> {
        Ok(Content::Float(value))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Content, E> {
        Ok(Content::Text(value.to_owned()))
    }

    fn visit_string<E: de::Error>(self, value: String) -> Result<Content, E> {
        Ok(Content::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
        let mut items = Vec::new();
        while let Some(Located(item)) = seq.next_element()? {
            items.push(item);
        }
        Ok(Content::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Content, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            let place = Place::Line(key.referenced.line());
            let Located(value) = map.next_value()?;
            entries.push(Entry::new(key.value, place, value));
        }
        Ok(Content::Map(entries))
    }
}

impl Serialize for Node {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.content {
            Content::Null => serializer.serialize_unit(),
            Content::Bool(value) => serializer.serialize_bool(*value),
            Content::Int(value) => serializer.serialize_i128(*value),
            Content::Float(value) => serializer.serialize_f64(*value),
            Content::Text(text) => serializer.serialize_str(text),
            Content::List(items) => {
                let mut seq = serializer.serialize_seq(Some(items.len()))?;
                for item in items {
                    seq.serialize_element(item)?;
                }
                seq.end()
            }
            Content::Map(entries) => {
                let mut map = serializer.serialize_map(Some(entries.len()))?;
                for entry in entries {
                    map.serialize_entry(&entry.key, &entry.value)?;
                }
                map.end()
            }
        }
    }
}
