//! Values at the top of a recipe that are neither a section nor a plain scalar.

use std::fmt;
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

/// Where tensors live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first of flex, CUDA, WebGPU and ndarray that is compiled in.
    Auto,
    /// Burn's fast CPU backend.
    Flex,
    /// The CPU backend on the `ndarray` crate.
    NdArray,
    /// A GPU through WebGPU; the number picks one of several.
    Wgpu(Option<usize>),
    /// An NVIDIA GPU; the number picks one of several.
    Cuda(Option<usize>),
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

pub(crate) struct DeviceSpec;

impl Spec for DeviceSpec {
    type Out = DeviceChoice;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<DeviceChoice> {
        let Content::Text(text) = &node.content else {
            return reader.wrong_type(node, self.allowed());
        };
        let (name, index) = match text.split_once(':') {
            None => (text.as_str(), None),
            // `usize::from_str` would take a sign, as in `cuda:+1`.
            Some((name, index)) if index.bytes().all(|byte| byte.is_ascii_digit()) => match index.parse() {
                Ok(index) => (name, Some(index)),
                Err(_) => return reader.refuse(node, "is not the number of a device", self.allowed()),
            },
            Some(_) => return reader.refuse(node, "is not the number of a device", self.allowed()),
        };
        match (name, index) {
            ("auto", None) => Some(DeviceChoice::Auto),
            ("flex", None) => Some(DeviceChoice::Flex),
            ("ndarray", None) => Some(DeviceChoice::NdArray),
            ("wgpu", index) => Some(DeviceChoice::Wgpu(index)),
            ("cuda", index) => Some(DeviceChoice::Cuda(index)),
            ("auto" | "flex" | "ndarray", Some(_)) => {
                reader.refuse(node, format!("`{name}` takes no number"), self.allowed())
            }
            _ => reader.unknown_name(node, name, &DEVICES, self.allowed()),
        }
    }

    fn write(&self, value: &DeviceChoice) -> Node {
        Node::text(value.to_string())
    }

    fn allowed(&self) -> String {
        "auto, flex, ndarray, wgpu, wgpu:N, cuda or cuda:N".to_owned()
    }

    fn schema(&self) -> Json {
        json!({"type": "string", "pattern": "^(auto|flex|ndarray|(wgpu|cuda)(:[0-9]+)?)$"})
    }
}

const DEVICES: [&str; 5] = ["auto", "flex", "ndarray", "wgpu", "cuda"];

impl fmt::Display for DeviceChoice {
    /// The spelling used in recipes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Flex => f.write_str("flex"),
            Self::NdArray => f.write_str("ndarray"),
            Self::Wgpu(None) => f.write_str("wgpu"),
            Self::Wgpu(Some(index)) => write!(f, "wgpu:{index}"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(index)) => write!(f, "cuda:{index}"),
        }
    }
}
