//! What may stand at a key: reading, writing, JSON Schema and wording of one kind of value in one place.

mod containers;
mod reader;
mod scalars;

use serde_json::{Value as Json, json};

pub(crate) use self::containers::{list, mapping, optional, or_null, pair, section};
pub(crate) use self::reader::{Reader, join};
pub(crate) use self::scalars::{
    Choice, Variant, Whole, among, boolean, choice, number, or, path, read_text, text, whole,
};

use crate::node::Node;

/// A kind of value. `read` reports what is wrong to the reader and then gives `None`.
pub(crate) trait Spec {
    /// The type that is read.
    type Out;

    /// Reads a node, reporting every mistake in it.
    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<Self::Out>;

    /// The node that is read as `value`.
    fn write(&self, value: &Self::Out) -> Node;

    /// What is allowed, as it ends the sentence "allowed: …".
    fn allowed(&self) -> String;

    /// The JSON Schema of the value.
    fn schema(&self) -> Json;

    /// The keys below this one, when the value is a section or a list of sections.
    fn below(&self) -> Below {
        Below::Nothing
    }
}

/// [`Spec::write`], with the spec's open types following from the value.
pub(crate) fn write<T>(spec: &impl Spec<Out = T>, value: &T) -> Node {
    spec.write(value)
}

/// What stands below a key.
pub(crate) enum Below {
    Nothing,
    /// The keys of a section.
    Section(Vec<Field>),
    /// The keys of each item of a list.
    Items(Vec<Field>),
}

/// A mapping with a fixed set of keys; implemented by the `section!` macro.
pub(crate) trait Section: Sized {
    /// The lines of documentation of the section.
    const ABOUT: &'static [&'static str];

    /// Names of the keys, in order.
    const KEYS: &'static [&'static str];

    /// The keys with their documentation, in order.
    fn fields() -> Vec<Field>;

    /// Reads the section. A key with a mistake takes its fallback, so that the whole section is still checked.
    fn read(node: &Node, reader: &mut Reader<'_>) -> Option<Self>;

    /// The section as a mapping that holds every key.
    fn write(&self) -> Node;
}

/// What a key is when it is absent.
pub(crate) enum Fallback<T> {
    /// The key must be given; the value stands in for it while the rest is checked.
    Required(T),
    /// A default value.
    Value(T),
    /// A default that follows from the recipe's name, and how the reference describes it.
    Computed(&'static str, fn(&str) -> T),
    /// A section whose keys have defaults of their own.
    Nested,
}

pub(crate) fn required<T>(stand_in: T) -> Fallback<T> {
    Fallback::Required(stand_in)
}

pub(crate) fn nested<T>() -> Fallback<T> {
    Fallback::Nested
}

pub(crate) fn value<T>(value: T) -> Fallback<T> {
    Fallback::Value(value)
}

pub(crate) fn computed<T>(description: &'static str, compute: fn(&str) -> T) -> Fallback<T> {
    Fallback::Computed(description, compute)
}

/// One key, as the JSON Schema and the reference page see it.
pub(crate) struct Field {
    pub(crate) key: &'static str,
    pub(crate) doc: String,
    pub(crate) required: bool,
    /// The default as it could be written in a recipe.
    pub(crate) default: Option<String>,
    pub(crate) allowed: String,
    pub(crate) schema: Json,
    pub(crate) below: Below,
}

impl Field {
    pub(crate) fn of<T>(key: &'static str, doc: &[&str], fallback: &Fallback<T>, spec: &impl Spec<Out = T>) -> Self {
        let doc = paragraph(doc);
        let mut schema = spec.schema();
        schema["description"] = json!(doc);
        let default = match fallback {
            Fallback::Value(value) => {
                let node = spec.write(value);
                schema["default"] = json!(node);
                Some(node.inline())
            }
            Fallback::Computed(description, _) => Some((*description).to_owned()),
            Fallback::Required(_) | Fallback::Nested => None,
        };
        let below = spec.below();
        let required = match (fallback, &below) {
            (Fallback::Required(_), _) => true,
            (Fallback::Nested, Below::Section(fields)) => fields.iter().any(|field| field.required),
            _ => false,
        };
        Self { key, doc, required, default, allowed: spec.allowed(), schema, below }
    }
}

/// Lines of a doc comment as one paragraph.
pub(crate) fn paragraph(lines: &[&str]) -> String {
    let lines: Vec<_> = lines.iter().map(|line| line.trim()).collect();
    lines.join(" ")
}

/// The schema of a mapping with exactly these keys.
pub(crate) fn object_schema(fields: &[Field]) -> Json {
    let properties: serde_json::Map<String, Json> =
        fields.iter().map(|field| (field.key.to_owned(), field.schema.clone())).collect();
    let required: Vec<_> = fields.iter().filter(|field| field.required).map(|field| field.key).collect();
    let mut schema = json!({"type": "object", "properties": properties, "additionalProperties": false});
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    schema
}
