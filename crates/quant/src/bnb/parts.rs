use super::{Element, sibling, state_name};
use crate::{FloatDtype, NESTED_BLOCK, Scheme};

/// More bytes than the state of any weight takes.
pub const LONGEST_STATE: usize = 256;

/// A tensor of a checkpoint before its bytes are known.
#[derive(Clone, Debug, PartialEq, Eq, derive_new::new)]
pub struct Part {
    /// Its name.
    #[new(into)]
    pub name: String,
    /// What its elements are.
    pub element: Element,
    /// Its shape; `None` for the state of a 4-bit weight, a list of at most [`LONGEST_STATE`] bytes that is as long as its
    /// numbers have digits.
    pub shape: Option<Vec<usize>>,
}

/// What [`to_tensors`](super::to_tensors) gives for a weight of this shape, in the same order. A file can be laid out by
/// it while the weight has yet to be packed.
pub fn parts(weight: &str, shape: [usize; 2], scheme: Scheme) -> Vec<Part> {
    const F32: Element = Element::Float(FloatDtype::F32);
    let part = |name: &str, element, length: usize| Part::new(format!("{weight}.{name}"), element, Some(vec![length]));
    let elements = shape[0] * shape[1];
    match scheme {
        Scheme::FourBit { codebook, block_size, double_quant } => {
            let blocks = elements.div_ceil(block_size.get());
            let codes = Part::new(weight, Element::U8, Some(vec![elements.div_ceil(2), 1]));
            let absmax = part("absmax", if double_quant { Element::U8 } else { F32 }, blocks);
            let mut parts = vec![codes, absmax, part("quant_map", F32, codebook.values().len())];
            if double_quant {
                parts.push(part("nested_absmax", F32, blocks.div_ceil(NESTED_BLOCK)));
                parts.push(part("nested_quant_map", F32, 256));
            }
            parts.push(Part::new(state_name(weight, codebook), Element::U8, None));
            parts
        }
        Scheme::Int8 => vec![
            Part::new(weight, Element::I8, Some(shape.to_vec())),
            Part::new(sibling(weight, "SCB"), F32, Some(vec![shape[0]])),
            Part::new(sibling(weight, "weight_format"), Element::U8, Some(Vec::new())),
        ],
    }
}
