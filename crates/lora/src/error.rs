use thiserror::Error;

/// Why adapters cannot be attached to a model.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoraError {
    /// A number is outside of its range.
    #[error("{field} is {value}; it must be {expected}")]
    InvalidOption {
        /// Name of the option.
        field: String,
        /// What it is.
        value: String,
        /// What it may be.
        expected: &'static str,
    },
    /// A rank above both sides of a weight, which would hold more numbers than the weight and span nothing more.
    #[error(
        "the rank of `{module}` would be {rank}; its weight allows at most {bound}, the larger of its sides: \
         lower `r` or the entry of `rank_pattern` that matches"
    )]
    RankTooLarge {
        /// The module.
        module: String,
        /// Its rank, after `rank_pattern`.
        rank: usize,
        /// The larger of its input and output sizes.
        bound: usize,
    },
    /// A pattern is not a regular expression, or matching it ran out of bounds.
    #[error("{field}: `{pattern}` cannot be used as a regular expression: {source}")]
    Regex {
        /// Name of the option.
        field: &'static str,
        /// The pattern as it was given.
        pattern: String,
        /// What is wrong with it.
        source: Box<fancy_regex::Error>,
    },
    /// Layers were chosen together with a regular expression, which PEFT refuses.
    #[error("`layers` cannot be combined with a regular expression as target: put the layer into the expression")]
    LayersWithRegex,
    /// No projection has the index of a chosen layer.
    #[error("`layers` asks for layer {layer}, but {available}")]
    LayerOutOfRange {
        /// The index that was asked for.
        layer: usize,
        /// Which indices there are.
        available: String,
    },
    /// Some or all targets match no projection.
    #[error("nothing in the model matches the target {}; these can match: {}", quoted(targets), available.join(", "))]
    TargetsMatchNothing {
        /// The targets that match nothing.
        targets: Vec<String>,
        /// The last parts of the names of all projections.
        available: Vec<String>,
    },
    /// Targets match, but `exclude` or `layers` takes all of them away.
    #[error("all {targeted} projections that match the targets are left out by `{by}`")]
    NothingLeft {
        /// How many projections the targets matched.
        targeted: usize,
        /// The option that took the last of them away.
        by: &'static str,
    },
    /// The model carries adapters already.
    #[error("`{module}` has an adapter already; detach the adapters of the model first")]
    AlreadyAttached {
        /// A module with an adapter.
        module: String,
    },
}

fn quoted(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}
