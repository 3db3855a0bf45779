//! Specs made of other specs: nullable values, lists, mappings, sections.

use std::marker::PhantomData;

use indexmap::IndexMap;
use serde_json::{Value as Json, json};

use crate::node::{Content, Node};
use crate::spec::{Below, Reader, Section, Spec, object_schema};

pub(crate) struct Optional<S>(S);

/// The value or `null`.
pub(crate) fn optional<S: Spec>(spec: S) -> Optional<S> {
    Optional(spec)
}

impl<S: Spec> Spec for Optional<S> {
    type Out = Option<S::Out>;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<Self::Out> {
        if node.is_null() {
            return Some(None);
        }
        let before = reader.count();
        let value = self.0.read(node, reader);
        reader.allow_also_null(before);
        value.map(Some)
    }

    fn write(&self, value: &Self::Out) -> Node {
        match value {
            None => Node::made(Content::Null),
            Some(value) => self.0.write(value),
        }
    }

    fn allowed(&self) -> String {
        or_null(&self.0.allowed())
    }

    fn schema(&self) -> Json {
        json!({"anyOf": [self.0.schema(), {"type": "null"}]})
    }

    fn below(&self) -> Below {
        self.0.below()
    }
}

/// `allowed`, or `null`; the comma keeps `null` apart from the items of a list.
pub(crate) fn or_null(allowed: &str) -> String {
    let comma = if allowed.contains(',') { "," } else { "" };
    format!("{allowed}{comma} or null")
}

pub(crate) struct List<S> {
    item: S,
    non_empty: bool,
}

/// A list of values.
pub(crate) fn list<S: Spec>(item: S) -> List<S> {
    List { item, non_empty: false }
}

impl<S> List<S> {
    pub(crate) fn non_empty(self) -> Self {
        Self { non_empty: true, ..self }
    }
}

impl<S: Spec> Spec for List<S> {
    type Out = Vec<S::Out>;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<Self::Out> {
        let Content::List(items) = &node.content else {
            return reader.wrong_type(node, self.allowed());
        };
        if self.non_empty && items.is_empty() {
            return reader.refuse(node, "is empty", self.allowed());
        }
        let read: Vec<_> = items
            .iter()
            .enumerate()
            .map(|(index, item)| reader.item(index, |reader| self.item.read(item, reader)))
            .collect();
        read.into_iter().collect()
    }

    fn write(&self, value: &Self::Out) -> Node {
        Node::list(value.iter().map(|item| self.item.write(item)))
    }

    fn allowed(&self) -> String {
        let some = if self.non_empty { "one or more items" } else { "items" };
        format!("a list of {some}, each {}", self.item.allowed())
    }

    fn schema(&self) -> Json {
        let mut schema = json!({"type": "array", "items": self.item.schema()});
        if self.non_empty {
            schema["minItems"] = json!(1);
        }
        schema
    }
}

pub(crate) struct Pair<S>(S);

/// A list of exactly two values.
pub(crate) fn pair<S: Spec>(item: S) -> Pair<S> {
    Pair(item)
}

impl<S: Spec> Spec for Pair<S> {
    type Out = [S::Out; 2];

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<Self::Out> {
        match &node.content {
            Content::List(items) => match items.as_slice() {
                [first, second] => {
                    let first = reader.item(0, |reader| self.0.read(first, reader));
                    let second = reader.item(1, |reader| self.0.read(second, reader));
                    Some([first?, second?])
                }
                _ => reader.refuse(node, "does not have two items", self.allowed()),
            },
            _ => reader.wrong_type(node, self.allowed()),
        }
    }

    fn write(&self, value: &Self::Out) -> Node {
        Node::list(value.iter().map(|item| self.0.write(item)))
    }

    fn allowed(&self) -> String {
        format!("a list of two items, each {}", self.0.allowed())
    }

    fn schema(&self) -> Json {
        json!({"type": "array", "items": self.0.schema(), "minItems": 2, "maxItems": 2})
    }
}

pub(crate) struct Mapping<S> {
    key: &'static str,
    value: S,
}

/// A mapping with free keys; `key` says what they are. The order of the file is kept.
pub(crate) fn mapping<S: Spec>(key: &'static str, value: S) -> Mapping<S> {
    Mapping { key, value }
}

impl<S: Spec> Spec for Mapping<S> {
    type Out = IndexMap<String, S::Out>;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<Self::Out> {
        let Content::Map(entries) = &node.content else {
            return reader.wrong_type(node, self.allowed());
        };
        reader.report_duplicates(entries);
        let mut read = Some(IndexMap::new());
        for entry in entries {
            let value = reader.below(&entry.key, |reader| {
                if entry.key.trim().is_empty() {
                    return reader.refuse(&entry.value, "has an empty name", self.allowed());
                }
                self.value.read(&entry.value, reader)
            });
            match (value, &mut read) {
                (Some(value), Some(read)) => {
                    read.insert(entry.key.clone(), value);
                }
                _ => read = None,
            }
        }
        read
    }

    fn write(&self, value: &Self::Out) -> Node {
        Node::map(value.iter().map(|(key, value)| (key.as_str(), self.value.write(value))))
    }

    fn allowed(&self) -> String {
        format!("a mapping from {} to {}", self.key, self.value.allowed())
    }

    fn schema(&self) -> Json {
        json!({
            "type": "object",
            "propertyNames": {"pattern": "\\S"},
            "additionalProperties": self.value.schema(),
        })
    }
}

pub(crate) struct SectionSpec<T>(PhantomData<T>);

/// A section. Nothing written under it means the defaults of all its keys.
pub(crate) fn section<T: Section>() -> SectionSpec<T> {
    SectionSpec(PhantomData)
}

impl<T: Section> Spec for SectionSpec<T> {
    type Out = T;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<T> {
        T::read(node, reader)
    }

    fn write(&self, value: &T) -> Node {
        value.write()
    }

    fn allowed(&self) -> String {
        format!("a mapping with the keys {}", T::KEYS.join(", "))
    }

    fn schema(&self) -> Json {
        let fields = T::fields();
        let optional = fields.iter().all(|field| !field.required);
        let mut schema = object_schema(&fields);
        if optional {
            schema["type"] = json!(["object", "null"]);
        }
        schema
    }

    fn below(&self) -> Below {
        Below::Section(T::fields())
    }
}
