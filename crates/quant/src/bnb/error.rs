use super::Element;

/// Why a quantised weight of a checkpoint cannot be read. Every message names the tensor.
#[derive(Debug, thiserror::Error)]
pub enum BnbError {
    /// A part is not there.
    #[error("`{tensor}` is missing: without it the quantised weight `{weight}` cannot be read; is a shard missing?")]
    Missing {
        /// What was looked for.
        tensor: String,
        /// The weight that it is a part of.
        weight: String,
    },
    /// A part is there that belongs to another format.
    #[error("`{tensor}` is there although {because}: the checkpoint contradicts itself")]
    Unexpected {
        /// The part.
        tensor: String,
        /// Why it should not be there.
        because: String,
    },
    /// The state's bytes are not the JSON that they should be.
    #[error("`{tensor}` is no readable quantisation state: {source}; it is truncated or damaged")]
    State {
        /// The state.
        tensor: String,
        /// What JSON said.
        source: serde_json::Error,
    },
    /// A 4-bit format that does not exist here.
    #[error("`{tensor}` announces the quantised format `{found}`; expected nf4 or fp4")]
    QuantType {
        /// The state.
        tensor: String,
        /// What it says.
        found: String,
    },
    /// A field of the state has a value that cannot be, or that another part contradicts.
    #[error("`{tensor}` says {field} {found}; expected {expected}")]
    Field {
        /// The state, or `weight_format`.
        tensor: String,
        /// The field.
        field: &'static str,
        /// What would be right.
        expected: String,
        /// What it says.
        found: String,
    },
    /// A tensor has elements of another type.
    #[error("`{tensor}` holds {found}; expected {expected}")]
    Element {
        /// The tensor.
        tensor: String,
        /// The type it should have.
        expected: Element,
        /// The type it has.
        found: Element,
    },
    /// A tensor is too long or too short.
    #[error("`{tensor}` has {found} {unit}; expected {expected} for {reason}")]
    Length {
        /// The tensor.
        tensor: String,
        /// Elements or bytes that it should have.
        expected: usize,
        /// How many it has.
        found: usize,
        /// What is counted.
        unit: &'static str,
        /// Where the expectation comes from.
        reason: String,
    },
    /// A table of values is not the format's own.
    #[error(
        "`{tensor}` holds {found} at {index} where the format has {expected}; only the standard table is supported"
    )]
    Table {
        /// The table.
        tensor: String,
        /// The first entry that differs.
        index: usize,
        /// The format's value.
        expected: f32,
        /// The checkpoint's.
        found: f32,
    },
    /// A scale, or what one is made of, is a NaN or an infinity.
    #[error("`{tensor}` gives {value} at {index}: scales must be finite; the checkpoint is damaged")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// The first such element.
        index: usize,
        /// What it is.
        value: f32,
    },
}
