//! Where in the recipe a value is being read, and the mistakes found so far.

use crate::error::{Place, Problem};
use crate::node::{Content, Entry, Node};
use crate::spec::{Fallback, Section, Spec, or_null};

/// Walks the tree, knows the key path and collects problems.
pub(crate) struct Reader<'a> {
    /// Name of the recipe, from which the default of `output` follows.
    recipe: &'a str,
    path: String,
    problems: Vec<Problem>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(recipe: &'a str) -> Self {
        Self { recipe, path: String::new(), problems: Vec::new() }
    }

    /// The mistakes in the order of the input.
    pub(crate) fn into_problems(mut self) -> Vec<Problem> {
        self.problems.sort_by(|a, b| a.place.cmp(&b.place));
        self.problems
    }

    pub(crate) fn push(&mut self, problem: Problem) {
        self.problems.push(problem);
    }

    /// How many mistakes have been found.
    pub(crate) fn count(&self) -> usize {
        self.problems.len()
    }

    /// Adds `null` to what the reports about the current key, from the `first` on, say is allowed.
    pub(crate) fn allow_also_null(&mut self, first: usize) {
        for problem in &mut self.problems[first..] {
            if let (true, Some(allowed)) = (problem.key == self.path, &mut problem.allowed) {
                *allowed = or_null(allowed);
            }
        }
    }

    /// Reports a mistake at the current key; the result is always `None`, for use as a return value.
    pub(crate) fn refuse<T>(
        &mut self,
        node: &Node,
        message: impl Into<String>,
        allowed: impl Into<String>,
    ) -> Option<T> {
        let problem = Problem::new(&self.path, &node.place, message).found(&node.inline()).allowed(allowed);
        self.push(problem);
        None
    }

    /// Reports a value of the wrong type.
    pub(crate) fn wrong_type<T>(&mut self, node: &Node, allowed: impl Into<String>) -> Option<T> {
        self.refuse(node, format!("cannot be {}", kind(&node.content)), allowed)
    }

    /// Reports a string that is none of `names`.
    pub(crate) fn unknown_name<T>(
        &mut self,
        node: &Node,
        text: &str,
        names: &[&str],
        allowed: impl Into<String>,
    ) -> Option<T> {
        let problem = Problem::new(&self.path, &node.place, "unknown value")
            .found(&node.inline())
            .nearest(nearest(text, names).map(str::to_owned))
            .allowed(allowed);
        self.push(problem);
        None
    }

    /// Reports a combination of keys that makes no sense.
    ///
    /// `section` is the section being read, `key` the path of the key below it that is reported.
    pub(crate) fn conflict(&mut self, section: &Node, key: &str, message: &str, allowed: &str) {
        let node = key.split('.').try_fold(section, |node, key| node.get(key)).unwrap_or(section);
        let problem = Problem::new(join(&self.path, key), &node.place, message).found(&node.inline()).allowed(allowed);
        self.push(problem);
    }

    /// Reads something one key further down.
    pub(crate) fn below<T>(&mut self, key: &str, read: impl FnOnce(&mut Self) -> T) -> T {
        self.step(join(&self.path, key), read)
    }

    /// Reads an item of a list.
    pub(crate) fn item<T>(&mut self, index: usize, read: impl FnOnce(&mut Self) -> T) -> T {
        self.step(format!("{}[{index}]", self.path), read)
    }

    fn step<T>(&mut self, path: String, read: impl FnOnce(&mut Self) -> T) -> T {
        let outer = std::mem::replace(&mut self.path, path);
        let result = read(self);
        self.path = outer;
        result
    }

    /// Opens a mapping as section `T`, reporting keys that `T` does not have and keys given twice.
    pub(crate) fn keys<'n, T: Section>(&mut self, node: &'n Node) -> Option<&'n [Entry]> {
        let entries: &[Entry] = match &node.content {
            Content::Map(entries) => entries,
            Content::Null => &[],
            _ => return self.wrong_type(node, format!("a mapping with the keys {}", T::KEYS.join(", "))),
        };
        self.report_duplicates(entries);
        for entry in entries {
            if !T::KEYS.contains(&entry.key.as_str()) {
                let near = match nearest(&entry.key, T::KEYS) {
                    Some(near) => Some(near.to_owned()),
                    None => crate::run::path_of_key(&entry.key),
                };
                let problem = Problem::new(join(&self.path, &entry.key), &entry.place, "unknown key")
                    .found(&entry.value.inline())
                    .nearest(near)
                    .allowed(T::KEYS.join(", "));
                self.push(problem);
            }
        }
        Some(entries)
    }

    /// Reports every key that stands more than once in a mapping.
    pub(crate) fn report_duplicates(&mut self, entries: &[Entry]) {
        for (index, entry) in entries.iter().enumerate() {
            if let Some(first) = entries[..index].iter().find(|first| first.key == entry.key) {
                let message = match first.place {
                    Place::Line(line) => format!("given twice, first on line {line}"),
                    _ => "given twice".to_owned(),
                };
                let problem =
                    Problem::new(join(&self.path, &entry.key), &entry.place, message).found(&entry.value.inline());
                self.push(problem);
            }
        }
    }

    /// Reads the value of `key` or falls back.
    pub(crate) fn take<T>(
        &mut self,
        entries: &[Entry],
        key: &str,
        fallback: Fallback<T>,
        spec: &impl Spec<Out = T>,
    ) -> Option<T> {
        let given = entries.iter().find(|entry| entry.key == key);
        let read = given.and_then(|entry| self.below(key, |reader| spec.read(&entry.value, reader)));
        if read.is_some() {
            return read;
        }
        match fallback {
            Fallback::Required(stand_in) => {
                if given.is_none() {
                    let problem =
                        Problem::new(join(&self.path, key), &Place::Nowhere, "is required").allowed(spec.allowed());
                    self.push(problem);
                }
                Some(stand_in)
            }
            Fallback::Value(value) => Some(value),
            Fallback::Computed(_, compute) => Some(compute(self.recipe)),
            Fallback::Nested => {
                let empty = Node::map::<&str>([]);
                if given.is_none() {
                    self.below(key, |reader| spec.read(&empty, reader))
                } else {
                    spec.read(&empty, &mut Reader::new(self.recipe))
                }
            }
        }
    }
}

/// `key` below `path`.
pub(crate) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn kind(content: &Content) -> &'static str {
    match content {
        Content::Null => "null",
        Content::Bool(_) => "a boolean",
        Content::Int(_) => "a whole number",
        Content::Float(_) => "a fractional number",
        Content::Text(_) => "a string",
        Content::List(_) => "a list",
        Content::Map(_) => "a mapping",
    }
}

/// The name that `text` was probably meant to be.
fn nearest<'n>(text: &str, names: &[&'n str]) -> Option<&'n str> {
    const ALIKE: f64 = 0.75;
    let text = text.to_lowercase();
    let likeness = |name: &str| {
        let name = name.to_lowercase();
        let edits = strsim::normalized_damerau_levenshtein(&text, &name);
        edits.max(strsim::jaro_winkler(&text, &name))
    };
    names
        .iter()
        .map(|name| (likeness(name), *name))
        .filter(|(likeness, _)| *likeness >= ALIKE)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}
