//! Numbers, strings, paths and names.

use std::fmt::Display;
use std::marker::PhantomData;
use std::path::PathBuf;

use serde_json::{Value as Json, json};

use crate::node::{Content, Node};
use crate::spec::{Reader, Spec};

/// An enum spelled as a string; implemented by the `choice!` macro.
pub(crate) trait Choice: Copy + 'static {
    /// The variants in order.
    const VARIANTS: &'static [Variant<Self>];

    /// The spelling used when writing.
    fn spelling(&self) -> &'static str;
}

/// One variant of a [`Choice`].
pub(crate) struct Variant<T> {
    pub(crate) value: T,
    /// The spelling, then other spellings that are accepted.
    pub(crate) names: &'static [&'static str],
}

/// `a, b or c`.
pub(crate) fn or(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [only] => (*only).to_owned(),
        [rest @ .., last] => format!("{} or {last}", rest.join(", ")),
    }
}

pub(crate) struct ChoiceSpec<T>(PhantomData<T>);

/// One of the names of `T`.
pub(crate) fn choice<T: Choice>() -> ChoiceSpec<T> {
    ChoiceSpec(PhantomData)
}

impl<T: Choice> Spec for ChoiceSpec<T> {
    type Out = T;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<T> {
        let Content::Text(text) = &node.content else {
            return reader.wrong_type(node, self.allowed());
        };
        match T::VARIANTS.iter().find(|variant| variant.names.contains(&text.as_str())) {
            Some(variant) => Some(variant.value),
            None => {
                let names: Vec<_> = T::VARIANTS.iter().flat_map(|v| v.names).copied().collect();
                reader.unknown_name(node, text, &names, self.allowed())
            }
        }
    }

    fn write(&self, value: &T) -> Node {
        Node::text(value.spelling())
    }

    fn allowed(&self) -> String {
        let names: Vec<_> = T::VARIANTS.iter().map(|variant| variant.names[0]).collect();
        or(&names)
    }

    fn schema(&self) -> Json {
        let names: Vec<_> = T::VARIANTS.iter().flat_map(|variant| variant.names).collect();
        json!({"enum": names})
    }
}

pub(crate) struct Boolean;

/// `true` or `false`.
pub(crate) fn boolean() -> Boolean {
    Boolean
}

impl Spec for Boolean {
    type Out = bool;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<bool> {
        match node.content {
            Content::Bool(value) => Some(value),
            _ => reader.wrong_type(node, self.allowed()),
        }
    }

    fn write(&self, value: &bool) -> Node {
        Node::made(Content::Bool(*value))
    }

    fn allowed(&self) -> String {
        "true or false".to_owned()
    }

    fn schema(&self) -> Json {
        json!({"type": "boolean"})
    }
}

/// A string that is not blank. YAML reads `1234567` and `4e10` as numbers, also where a commit is meant.
pub(crate) fn read_text<'n>(node: &'n Node, reader: &mut Reader<'_>, allowed: &str) -> Option<&'n str> {
    match &node.content {
        Content::Text(text) if text.trim().is_empty() => reader.refuse(node, "is empty", allowed),
        Content::Text(text) => Some(text),
        Content::Bool(_) | Content::Int(_) | Content::Float(_) => {
            reader.wrong_type(node, format!("{allowed}, in quotes if it looks like a number"))
        }
        _ => reader.wrong_type(node, allowed),
    }
}

pub(crate) struct Text;

/// A string with something in it.
pub(crate) fn text() -> Text {
    Text
}

impl Spec for Text {
    type Out = String;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<String> {
        read_text(node, reader, "a string").map(str::to_owned)
    }

    fn write(&self, value: &String) -> Node {
        Node::text(value)
    }

    fn allowed(&self) -> String {
        "a string".to_owned()
    }

    fn schema(&self) -> Json {
        json!({"type": "string", "pattern": "\\S"})
    }
}

pub(crate) struct PathSpec;

/// A path.
pub(crate) fn path() -> PathSpec {
    PathSpec
}

impl Spec for PathSpec {
    type Out = PathBuf;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<PathBuf> {
        read_text(node, reader, "a path").map(PathBuf::from)
    }

    fn write(&self, value: &PathBuf) -> Node {
        Node::text(value.to_string_lossy())
    }

    fn allowed(&self) -> String {
        "a path".to_owned()
    }

    fn schema(&self) -> Json {
        json!({"type": "string", "pattern": "\\S"})
    }
}

/// An end of an interval, itself in it or not.
#[derive(Clone, Copy)]
struct Bound {
    at: f64,
    included: bool,
}

impl Bound {
    fn as_low(self) -> String {
        let word = if self.included { "of at least" } else { "above" };
        format!("{word} {}", self.at)
    }

    fn as_high(self) -> String {
        let word = if self.included { "of at most" } else { "below" };
        format!("{word} {}", self.at)
    }
}

/// A number in an interval. It is used in f32, so its value there must be finite and in the interval as well, and 0 only
/// if it is 0 here.
#[derive(Clone, Copy)]
pub(crate) struct Number {
    low: Option<Bound>,
    high: Option<Bound>,
}

/// Any number.
pub(crate) fn number() -> Number {
    Number { low: None, high: None }
}

impl Number {
    pub(crate) fn at_least(self, at: f64) -> Self {
        let low = Some(Bound { at, included: true });
        Self { low, ..self }
    }

    pub(crate) fn above(self, at: f64) -> Self {
        let low = Some(Bound { at, included: false });
        Self { low, ..self }
    }

    pub(crate) fn at_most(self, at: f64) -> Self {
        let high = Some(Bound { at, included: true });
        Self { high, ..self }
    }

    pub(crate) fn below(self, at: f64) -> Self {
        let high = Some(Bound { at, included: false });
        Self { high, ..self }
    }

    fn contains(self, value: f64) -> bool {
        let above = self.low.is_none_or(|low| value > low.at || (low.included && value == low.at));
        let below = self.high.is_none_or(|high| value < high.at || (high.included && value == high.at));
        above && below
    }
}

impl Spec for Number {
    type Out = f64;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<f64> {
        let value = match node.content {
            // Recipes hold small whole numbers; a large one is rounded as every reader of decimal numbers does.
            Content::Int(value) => value as f64,
            Content::Float(value) => value,
            _ => return reader.wrong_type(node, self.allowed()),
        };
        if !value.is_finite() {
            return reader.refuse(node, "is not finite", self.allowed());
        }
        if !self.contains(value) {
            return reader.refuse(node, "out of range", self.allowed());
        }
        let narrow = value as f32;
        let vanished = narrow == 0.0 && value != 0.0;
        if vanished || !narrow.is_finite() || !self.contains(narrow.into()) {
            let message = format!("out of range in single precision, where it is {narrow}");
            return reader.refuse(node, message, self.allowed());
        }
        Some(value)
    }

    fn write(&self, value: &f64) -> Node {
        Node::made(Content::Float(*value))
    }

    fn allowed(&self) -> String {
        match (self.low, self.high) {
            (None, None) => "a number".to_owned(),
            (Some(low), None) => format!("a number {}", low.as_low()),
            (None, Some(high)) => format!("a number {}", high.as_high()),
            (Some(low), Some(high)) if low.included && high.included => {
                format!("a number from {} to {}", low.at, high.at)
            }
            (Some(low), Some(high)) => format!("a number {} and {}", low.as_low(), high.as_high()),
        }
    }

    fn schema(&self) -> Json {
        let mut schema = json!({"type": "number"});
        if let Some(low) = self.low {
            schema[if low.included { "minimum" } else { "exclusiveMinimum" }] = json!(low.at);
        }
        if let Some(high) = self.high {
            schema[if high.included { "maximum" } else { "exclusiveMaximum" }] = json!(high.at);
        }
        schema
    }
}

/// A whole number that fits `T`.
#[derive(Clone, Copy)]
pub(crate) struct Whole<T> {
    low: T,
    high: Option<T>,
}

/// A whole number from 0.
pub(crate) fn whole<T: Default>() -> Whole<T> {
    Whole { low: T::default(), high: None }
}

impl<T> Whole<T> {
    pub(crate) fn at_least(self, low: T) -> Self {
        Self { low, ..self }
    }

    pub(crate) fn at_most(self, high: T) -> Self {
        Self { high: Some(high), ..self }
    }
}

impl<T> Spec for Whole<T>
where
    T: Copy + Display + PartialOrd + TryFrom<i128> + TryInto<i128> + serde::Serialize,
{
    type Out = T;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<T> {
        let value = match node.content {
            Content::Int(value) => value,
            // As in JSON Schema, 16.0 is a whole number. What `as` saturates is too large for every `T`.
            Content::Float(value) if value.fract() == 0.0 => value as i128,
            _ => return reader.wrong_type(node, self.allowed()),
        };
        match T::try_from(value) {
            Ok(value) if self.high.is_some_and(|high| value > high) => {
                reader.refuse(node, "is too large", self.allowed())
            }
            Ok(value) if value >= self.low => Some(value),
            Err(_) if value > 0 => reader.refuse(node, "is too large", self.allowed()),
            _ => reader.refuse(node, "out of range", self.allowed()),
        }
    }

    fn write(&self, value: &T) -> Node {
        let value = (*value).try_into();
        Node::made(Content::Int(value.unwrap_or_else(|_| unreachable!("no wider integer is read"))))
    }

    fn allowed(&self) -> String {
        match self.high {
            None => format!("a whole number of at least {}", self.low),
            Some(high) => format!("a whole number from {} to {high}", self.low),
        }
    }

    fn schema(&self) -> Json {
        let mut schema = json!({"type": "integer", "minimum": self.low});
        if let Some(high) = self.high {
            schema["maximum"] = json!(high);
        }
        schema
    }
}

pub(crate) struct Among(&'static [usize]);

/// One of these whole numbers.
pub(crate) fn among(numbers: &'static [usize]) -> Among {
    Among(numbers)
}

impl Spec for Among {
    type Out = usize;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<usize> {
        let found = match node.content {
            Content::Int(value) => usize::try_from(value).ok(),
            // As in JSON Schema, 64.0 is a whole number. What `as` saturates is none of the numbers.
            Content::Float(value) => (value.fract() == 0.0).then_some(value as usize),
            _ => return reader.wrong_type(node, self.allowed()),
        };
        match found.filter(|value| self.0.contains(value)) {
            Some(value) => Some(value),
            None => reader.refuse(node, "out of range", self.allowed()),
        }
    }

    fn write(&self, value: &usize) -> Node {
        whole().write(value)
    }

    fn allowed(&self) -> String {
        let names: Vec<_> = self.0.iter().map(usize::to_string).collect();
        or(&names.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn schema(&self) -> Json {
        json!({"enum": self.0})
    }
}
