use super::state::write;
use super::{Element, Tensor, sibling, state_name};
use crate::{FloatDtype, FourBit, Int8, PackedWeight, Scales};

/// The tensors that hold a packed weight in a checkpoint, by name, in bitsandbytes' order; `weight` is the name of the
/// weight itself, `….weight`.
pub fn to_tensors<'a>(weight: &str, packed: &'a PackedWeight) -> Vec<(String, Tensor<'a>)> {
    match packed {
        PackedWeight::FourBit(packed) => four_bit(weight, packed),
        PackedWeight::Int8(packed) => int8(weight, packed),
    }
}

fn four_bit<'a>(weight: &str, packed: &'a FourBit) -> Vec<(String, Tensor<'a>)> {
    let part = |name: &str| format!("{weight}.{name}");
    let codes = packed.codes();
    let table = (part("quant_map"), floats(packed.codebook().values()));
    let mut tensors = vec![(weight.to_owned(), Tensor::new(Element::U8, vec![codes.len(), 1], codes))];
    match packed.scales() {
        Scales::Plain(absmax) => tensors.extend([(part("absmax"), floats(absmax)), table]),
        Scales::Double(double) => tensors.extend([
            (part("absmax"), Tensor::new(Element::U8, vec![double.codes().len()], double.codes())),
            table,
            (part("nested_absmax"), floats(double.absmax())),
            (part("nested_quant_map"), floats(double.map().as_slice())),
        ]),
    }
    let state = write(packed).into_bytes();
    tensors.push((state_name(weight, packed.codebook()), Tensor::new(Element::U8, vec![state.len()], state)));
    tensors
}

fn int8<'a>(weight: &str, packed: &'a Int8) -> Vec<(String, Tensor<'a>)> {
    let codes: Vec<u8> = packed.codes().iter().map(|code| code.cast_unsigned()).collect();
    vec![
        (weight.to_owned(), Tensor::new(Element::I8, packed.shape().to_vec(), codes)),
        (sibling(weight, "SCB"), floats(packed.scales())),
        (sibling(weight, "weight_format"), Tensor::new(Element::U8, Vec::new(), vec![0])),
    ]
}

fn floats(values: &[f32]) -> Tensor<'static> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Tensor::new(Element::Float(FloatDtype::F32), vec![values.len()], bytes)
}
