//! Everything that is wrong with a recipe, in one error.

use std::fmt;
use std::path::PathBuf;

/// Why a recipe is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the recipe {}: {source}", path.display())]
    Read {
        /// The recipe.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The recipe was read and is wrong; every mistake is listed.
    #[error("{}", list(name, problems))]
    Invalid {
        /// Name of the recipe, as given.
        name: String,
        /// The mistakes, in the order of their lines; never empty.
        problems: Vec<Problem>,
    },
}

impl ConfigError {
    /// The mistakes in the recipe; empty when it could not be read at all.
    pub fn problems(&self) -> &[Problem] {
        match self {
            Self::Read { .. } => &[],
            Self::Invalid { problems, .. } => problems,
        }
    }
}

/// Where in the input a value was written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A line of the recipe, counted from 1.
    Line(u64),
    /// A `key=value` argument, as given.
    Argument(String),
    /// Nowhere: a required key that is missing.
    Nowhere,
}

/// One mistake.
#[derive(Clone, Debug, PartialEq)]
pub struct Problem {
    /// The key, as in `train.schedule.kind` or `data.train[1].path`; empty for the recipe as a whole.
    pub key: String,
    /// Where it was written.
    pub place: Place,
    /// What is wrong.
    pub message: String,
    /// The value found, as it could be written in a recipe.
    pub found: Option<String>,
    /// What is allowed there.
    pub allowed: Option<String>,
    /// The nearest allowed spelling of a misspelt key or value.
    pub nearest: Option<String>,
}

impl Problem {
    pub(crate) fn new(key: impl Into<String>, place: &Place, message: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            place: place.clone(),
            message: message.into(),
            found: None,
            allowed: None,
            nearest: None,
        }
    }

    pub(crate) fn found(mut self, found: &str) -> Self {
        const LONGEST: usize = 80;
        let mut short: String = found.chars().take(LONGEST).collect();
        if short.len() < found.len() {
            short.push('…');
        }
        self.found = Some(short);
        self
    }

    pub(crate) fn allowed(mut self, allowed: impl Into<String>) -> Self {
        self.allowed = Some(allowed.into());
        self
    }

    pub(crate) fn nearest(mut self, nearest: Option<String>) -> Self {
        self.nearest = nearest;
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Line(line) => write!(f, "line {line}: ")?,
            Place::Argument(argument) => write!(f, "argument `{argument}`: ")?,
            Place::Nowhere => {}
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)?;
        if let Some(found) = &self.found {
            write!(f, "; found {found}")?;
        }
        if let Some(nearest) = &self.nearest {
            write!(f, "; did you mean `{nearest}`?")?;
        }
        if let Some(allowed) = &self.allowed {
            let joint = if self.nearest.is_some() { " Allowed: " } else { "; allowed: " };
            write!(f, "{joint}{allowed}")?;
        }
        Ok(())
    }
}

fn list(name: &str, problems: &[Problem]) -> String {
    let mut text = match problems.len() {
        1 => format!("{name}: 1 mistake in the recipe"),
        n => format!("{name}: {n} mistakes in the recipe"),
    };
    for problem in problems {
        text.push_str("\n  ");
        text.push_str(&problem.to_string());
    }
    text
}
