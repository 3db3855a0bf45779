//! Values at the top of a recipe that are neither a section nor a plain scalar.

use std::num::NonZeroUsize;

use serde_json::{Value as Json, json};

use crate::node::{Content, Node};
use crate::spec::{Reader, Section, Spec, required, section, whole};

/// What is recomputed in the backward pass instead of being kept from the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GradientCheckpointing {
    /// Nothing: all activations are kept.
    None,
    /// Every block.
    Block,
    /// Groups of about the square root of the number of blocks (Chen et al. 2016, <https://arxiv.org/abs/1604.06174>).
    Sqrt,
    /// Groups of this many blocks.
    Every(NonZeroUsize),
}

section! {
    /// `{every: n}`.
    #[derive(derive_new::new)]
    struct Every {
        /// How many blocks make a group.
        every: usize = required(1) => whole().at_least(1);
    }
}

pub(crate) struct CheckpointingSpec;

impl Spec for CheckpointingSpec {
    type Out = GradientCheckpointing;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<GradientCheckpointing> {
        match &node.content {
            Content::Bool(true) => Some(GradientCheckpointing::Block),
            Content::Bool(false) => Some(GradientCheckpointing::None),
            Content::Text(text) => match text.as_str() {
                "none" => Some(GradientCheckpointing::None),
                "block" => Some(GradientCheckpointing::Block),
                "sqrt" => Some(GradientCheckpointing::Sqrt),
                _ => reader.unknown_name(node, text, &CHECKPOINTING, self.allowed()),
            },
            Content::Map(_) => {
                let Every { every } = Every::read(node, reader)?;
                NonZeroUsize::new(every).map(GradientCheckpointing::Every)
            }
            _ => reader.wrong_type(node, self.allowed()),
        }
    }

    fn write(&self, value: &GradientCheckpointing) -> Node {
        match value {
            GradientCheckpointing::None => Node::text("none"),
            GradientCheckpointing::Block => Node::text("block"),
            GradientCheckpointing::Sqrt => Node::text("sqrt"),
            GradientCheckpointing::Every(every) => Every::new(every.get()).write(),
        }
    }

    fn allowed(&self) -> String {
        "none, block, sqrt, {every: n} with n of at least 1, true or false".to_owned()
    }

    fn schema(&self) -> Json {
        json!({"anyOf": [{"enum": CHECKPOINTING}, {"type": "boolean"}, section::<Every>().schema()]})
    }
}

const CHECKPOINTING: [&str; 3] = ["none", "block", "sqrt"];
