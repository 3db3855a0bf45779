//! A JSON object whose keys are taken one by one, so that what nobody took can be reported.

use std::path::Path;

use serde_json::{Map, Value};

use super::error::{ConfigError, shown};

/// The keys of one object that have not been read yet. `null` counts as absent, as in transformers.
pub(super) struct Fields<'a> {
    path: &'a Path,
    prefix: String,
    map: Map<String, Value>,
}

/// A type that a JSON value can be read as.
pub(super) trait Field: Sized {
    /// What the value must be, for the message.
    const EXPECTED: &'static str;
    /// The value, or `None` when it is of another type.
    fn read(value: &Value) -> Option<Self>;
}

impl Field for bool {
    const EXPECTED: &'static str = "true or false";
    fn read(value: &Value) -> Option<Self> {
        value.as_bool()
    }
}

impl Field for usize {
    const EXPECTED: &'static str = "a whole number, 0 or more";
    fn read(value: &Value) -> Option<Self> {
        let whole = value.as_f64().filter(|x| x.fract() == 0.0 && (0.0..9e15).contains(x));
        value.as_u64().or(whole.map(|x| x as u64)).and_then(|x| x.try_into().ok())
    }
}

impl Field for f64 {
    const EXPECTED: &'static str = "a finite number";
    fn read(value: &Value) -> Option<Self> {
        value.as_f64().filter(|x| x.is_finite())
    }
}

impl Field for String {
    const EXPECTED: &'static str = "a text";
    fn read(value: &Value) -> Option<Self> {
        value.as_str().map(str::to_owned)
    }
}

impl Field for Vec<String> {
    const EXPECTED: &'static str = "a list of texts";
    fn read(value: &Value) -> Option<Self> {
        value.as_array()?.iter().map(String::read).collect()
    }
}

impl Field for Map<String, Value> {
    const EXPECTED: &'static str = "an object";
    fn read(value: &Value) -> Option<Self> {
        value.as_object().cloned()
    }
}

/// One token id, or several: how `eos_token_id` is written.
pub(super) struct TokenIds(pub Vec<u32>);

impl Field for TokenIds {
    const EXPECTED: &'static str = "a token id or a list of them";
    fn read(value: &Value) -> Option<Self> {
        let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        match value {
            Value::Array(ids) => ids.iter().map(id).collect::<Option<_>>().map(Self),
            one => id(one).map(|id| Self(vec![id])),
        }
    }
}

impl<'a> Fields<'a> {
    pub(super) fn new(path: &'a Path, prefix: &str, map: Map<String, Value>) -> Self {
        Self { path, prefix: prefix.to_owned(), map }
    }

    pub(super) fn path(&self) -> &'a Path {
        self.path
    }

    /// The key with the objects that hold it, for messages.
    pub(super) fn full(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Whether the key is there and `null`, where that differs from its absence.
    pub(super) fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// Takes a raw value out; `null` is `None`.
    pub(super) fn take(&mut self, key: &str) -> Option<Value> {
        self.map.shift_remove(key).filter(|value| !value.is_null())
    }

    pub(super) fn optional<T: Field>(&mut self, key: &str) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match T::read(&value) {
            Some(read) => Ok(Some(read)),
            None => Err(ConfigError::WrongType {
                path: self.path.into(),
                key: self.full(key),
                found: shown(&value),
                expected: T::EXPECTED,
            }),
        }
    }

    pub(super) fn or<T: Field>(&mut self, key: &str, default: T) -> Result<T, ConfigError> {
        Ok(self.optional(key)?.unwrap_or(default))
    }

    pub(super) fn required<T: Field>(&mut self, key: &str) -> Result<T, ConfigError> {
        self.optional(key)?.ok_or_else(|| ConfigError::Missing { path: self.path.into(), key: self.full(key) })
    }

    /// A required count from 1 to `most`. Zero makes no model, and a number beyond all reason must not decide about
    /// memory before it is compared with the weights.
    pub(super) fn count(&mut self, key: &str, most: usize) -> Result<usize, ConfigError> {
        match self.required(key)? {
            0 => Err(self.unsupported(key, &Value::from(0), "must be at least 1")),
            n if n > most => Err(self.unsupported(key, &Value::from(n), format!("must be at most {most}"))),
            n => Ok(n),
        }
    }

    pub(super) fn unsupported(&self, key: &str, found: &Value, reason: impl Into<String>) -> ConfigError {
        ConfigError::unsupported(self.path, &self.full(key), found, reason)
    }

    /// What was not taken, without `null`, `false` and the `harmless` keys.
    pub(super) fn unread(self, harmless: &[&str]) -> Vec<(String, String)> {
        let prefix = self.prefix;
        self.map
            .into_iter()
            .filter(|(key, value)| {
                !harmless.contains(&key.as_str()) && !value.is_null() && *value != Value::Bool(false)
            })
            .map(|(key, value)| (format!("{prefix}{key}"), shown(&value)))
            .collect()
    }
}
