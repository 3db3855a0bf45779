use std::sync::Arc;

use super::state::{State, torch_name};
use super::{BnbError, Element, TABLE_TOLERANCE, Tensor, sibling, state_name};
use crate::{
    BlockSize, Codebook, DoubleScales, FloatDtype, FourBit, Int8, NESTED_BLOCK, PackedWeight, Scales, dynamic_map,
};

const F32: Element = Element::Float(FloatDtype::F32);

/// Reads the weight of this name, `….weight`, when it is stored quantised; `None` when nothing beside it says so.
///
/// `lookup` finds the tensors of the checkpoint.
///
/// # Errors
/// A [`BnbError`] when parts are missing, contradict each other, have another length or type than they should, or give
/// scales that are not finite.
pub fn from_tensors<'a>(
    weight: &str,
    lookup: impl Fn(&str) -> Option<Tensor<'a>>,
) -> Result<Option<PackedWeight>, BnbError> {
    let parts = Parts { weight, lookup };
    let states = [Codebook::Nf4, Codebook::Fp4].map(|codebook| (codebook, state_name(weight, codebook)));
    let [nf4, fp4] = states.map(|(codebook, name)| (parts.lookup)(&name).map(|state| (codebook, name, state)));
    match (nf4, fp4) {
        (Some((codebook, name, state)), None) | (None, Some((codebook, name, state))) => {
            parts.four_bit(codebook, &name, &state).map(|weight| Some(PackedWeight::FourBit(weight)))
        }
        (Some(_), Some((_, tensor, _))) => {
            let because = format!("`{weight}` is also stored in nf4");
            Err(BnbError::Unexpected { tensor, because })
        }
        (None, None) if (parts.lookup)(&parts.name("absmax")).is_some() => {
            Err(parts.missing(format!("{weight}.quant_state.bitsandbytes__nf4 or …__fp4")))
        }
        (None, None) => match (parts.lookup)(&sibling(weight, "SCB")) {
            Some(scales) => parts.int8(&scales).map(|weight| Some(PackedWeight::Int8(weight))),
            None => Ok(None),
        },
    }
}

/// A weight and where its parts are.
struct Parts<'w, L> {
    weight: &'w str,
    lookup: L,
}

impl<'a, L: Fn(&str) -> Option<Tensor<'a>>> Parts<'_, L> {
    fn four_bit(&self, codebook: Codebook, state_tensor: &str, state: &Tensor<'_>) -> Result<FourBit, BnbError> {
        expect_element(state_tensor, state, Element::U8)?;
        let state: State = serde_json::from_slice(&state.bytes)
            .map_err(|source| BnbError::State { tensor: state_tensor.to_owned(), source })?;
        let field = |field, expected: &str, found: String| BnbError::Field {
            tensor: state_tensor.to_owned(),
            field,
            expected: expected.to_owned(),
            found,
        };
        if state.quant_type != codebook.name() {
            return Err(match state.quant_type.as_str() {
                "nf4" | "fp4" => field("quant_type", codebook.name(), state.quant_type),
                _ => BnbError::QuantType { tensor: state_tensor.to_owned(), found: state.quant_type },
            });
        }
        let block_size = BlockSize::try_from(state.blocksize)
            .map_err(|_| field("blocksize", "a power of two from 32 to 4096", state.blocksize.to_string()))?;
        let dtype = [FloatDtype::F32, FloatDtype::Bf16, FloatDtype::F16]
            .into_iter()
            .find(|&dtype| torch_name(dtype) == state.dtype)
            .ok_or_else(|| field("dtype", "float32, bfloat16 or float16", state.dtype))?;
        let (shape, elements) = matrix(&state.shape)
            .ok_or_else(|| field("shape", "two dimensions, neither of them 0", format!("{:?}", state.shape)))?;

        let codes = self.get(self.weight.to_owned())?;
        let reason = format!("the shape {shape:?} in 4 bits");
        expect_length(self.weight, "bytes", codes.bytes.len(), elements.div_ceil(2), reason)?;
        self.check_table(codebook)?;

        let blocks = elements.div_ceil(block_size.get());
        let reason = format!("the shape {shape:?} in blocks of {block_size}");
        let absmax = self.name("absmax");
        let nested = (self.lookup)(&self.name("nested_absmax"));
        let scales = match (state.nested_blocksize, state.nested_offset, nested) {
            (None, None, None) => Scales::Plain(self.finite(absmax, blocks, reason)?),
            (None, None, Some(_)) => {
                let because = format!("`{state_tensor}` knows no double quantisation");
                return Err(BnbError::Unexpected { tensor: self.name("nested_absmax"), because });
            }
            (Some(size), _, _) if size != NESTED_BLOCK => {
                return Err(field("nested_blocksize", &NESTED_BLOCK.to_string(), size.to_string()));
            }
            (Some(_), Some(offset), _) => {
                if let Some(dtype) = state.nested_dtype.filter(|dtype| dtype != "float32") {
                    return Err(field("nested_dtype", "float32", dtype));
                }
                let codes = self.get(absmax.clone())?;
                expect_element(&absmax, &codes, Element::U8)?;
                expect_length(&absmax, "elements", codes.bytes.len(), blocks, reason)?;
                Scales::Double(self.double(state_tensor, codes.bytes.into_owned(), offset as f32)?)
            }
            (size, _, _) => {
                let (missing, found) = match size {
                    Some(_) => ("nested_offset", "nested_blocksize"),
                    None => ("nested_blocksize", "nested_offset"),
                };
                return Err(field(missing, &format!("a number, since there is {found}"), "nothing".to_owned()));
            }
        };
        Ok(FourBit { codebook, block_size, shape, dtype, codes: codes.bytes.into_owned(), scales })
    }

    fn double(&self, state_tensor: &str, codes: Vec<u8>, offset: f32) -> Result<DoubleScales, BnbError> {
        let groups = codes.len().div_ceil(NESTED_BLOCK);
        let absmax_name = self.name("nested_absmax");
        let reason = format!("{} scales in blocks of {NESTED_BLOCK}", codes.len());
        let absmax = self.finite(absmax_name.clone(), groups, reason)?;
        let map_name = self.name("nested_quant_map");
        let map = self.finite(map_name.clone(), 256, "codes of 8 bits".to_owned())?;
        let standard = dynamic_map();
        let map = match <[f32; 256]>::try_from(map) {
            Ok(map) if map == *standard => standard,
            Ok(map) => Arc::new(map),
            Err(map) => return Err(wrong_length(&map_name, "elements", map.len(), 256, "codes of 8 bits".to_owned())),
        };
        check_finite(state_tensor, &[offset])?;
        let double = DoubleScales { codes, absmax, offset, map };
        match (0..double.codes.len()).find(|&block| !double.scale(block).is_finite()) {
            Some(block) => {
                let (index, value) = (block / NESTED_BLOCK, double.scale(block));
                Err(BnbError::NotFinite { tensor: absmax_name, index, value })
            }
            None => Ok(double),
        }
    }

    fn int8(&self, scales: &Tensor<'_>) -> Result<Int8, BnbError> {
        let format_name = sibling(self.weight, "weight_format");
        if let Some(format) = (self.lookup)(&format_name)
            && *format.bytes != [0]
        {
            let found = format!("{:?}", format.bytes);
            return Err(BnbError::Field { tensor: format_name, field: "format", expected: "[0], rows".into(), found });
        }
        let codes = self.get(self.weight.to_owned())?;
        expect_element(self.weight, &codes, Element::I8)?;
        let Some((shape, elements)) = matrix(&codes.shape) else {
            return Err(BnbError::Field {
                tensor: self.weight.to_owned(),
                field: "shape",
                expected: "two dimensions, neither of them 0".to_owned(),
                found: format!("{:?}", codes.shape),
            });
        };
        expect_length(self.weight, "bytes", codes.bytes.len(), elements, format!("the shape {shape:?} in 8 bits"))?;
        let scales_name = sibling(self.weight, "SCB");
        let scales = to_floats(&scales_name, scales, shape[0], format!("{} rows", shape[0]))?;
        Ok(Int8 { shape, codes: codes.bytes.iter().map(|code| code.cast_signed()).collect(), scales })
    }

    /// Checks that the codes mean what they mean here: bitsandbytes itself never looks at the table.
    fn check_table(&self, codebook: Codebook) -> Result<(), BnbError> {
        let tensor = self.name("quant_map");
        let table = self.finite(tensor.clone(), 16, "codes of 4 bits".to_owned())?;
        let mut pairs = table.iter().zip(codebook.values()).enumerate();
        match pairs.find(|(_, (found, expected))| (*found - *expected).abs() > TABLE_TOLERANCE) {
            Some((index, (&found, &expected))) => Err(BnbError::Table { tensor, index, expected, found }),
            None => Ok(()),
        }
    }

    /// An f32 tensor of a known length without NaN and infinities.
    fn finite(&self, tensor: String, len: usize, reason: String) -> Result<Vec<f32>, BnbError> {
        let found = self.get(tensor.clone())?;
        to_floats(&tensor, &found, len, reason)
    }

    fn get(&self, tensor: String) -> Result<Tensor<'a>, BnbError> {
        (self.lookup)(&tensor).ok_or_else(|| self.missing(tensor))
    }

    fn missing(&self, tensor: String) -> BnbError {
        BnbError::Missing { tensor, weight: self.weight.to_owned() }
    }

    fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.weight)
    }
}

/// The shape of a matrix with elements, and how many.
fn matrix(shape: &[usize]) -> Option<([usize; 2], usize)> {
    let shape: [usize; 2] = shape.try_into().ok()?;
    let elements = shape[0].checked_mul(shape[1]).filter(|&count| count > 0)?;
    Some((shape, elements))
}

fn to_floats(name: &str, tensor: &Tensor<'_>, len: usize, reason: String) -> Result<Vec<f32>, BnbError> {
    expect_element(name, tensor, F32)?;
    let (elements, rest) = tensor.bytes.as_chunks();
    if !rest.is_empty() {
        return Err(wrong_length(name, "bytes", tensor.bytes.len(), len * 4, reason));
    }
    expect_length(name, "elements", elements.len(), len, reason)?;
    let values: Vec<f32> = elements.iter().map(|&element| f32::from_le_bytes(element)).collect();
    check_finite(name, &values)?;
    Ok(values)
}

fn check_finite(tensor: &str, values: &[f32]) -> Result<(), BnbError> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(BnbError::NotFinite { tensor: tensor.to_owned(), index, value: values[index] }),
        None => Ok(()),
    }
}

fn expect_element(tensor: &str, found: &Tensor<'_>, expected: Element) -> Result<(), BnbError> {
    match found.element == expected {
        true => Ok(()),
        false => Err(BnbError::Element { tensor: tensor.to_owned(), expected, found: found.element }),
    }
}

fn expect_length(
    tensor: &str,
    unit: &'static str,
    found: usize,
    expected: usize,
    reason: String,
) -> Result<(), BnbError> {
    if found == expected { Ok(()) } else { Err(wrong_length(tensor, unit, found, expected, reason)) }
}

fn wrong_length(tensor: &str, unit: &'static str, found: usize, expected: usize, reason: String) -> BnbError {
    BnbError::Length { tensor: tensor.to_owned(), expected, found, unit, reason }
}
