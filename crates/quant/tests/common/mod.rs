//! What bitsandbytes wrote, from `tests/fixtures/quant` at the top of the repository.

#![allow(dead_code, reason = "each test file uses its part")]

use std::path::Path;

use emberlora_quant::FloatDtype;
use safetensors::SafeTensors;

/// The bytes of a file of goldens.
pub fn golden(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/quant");
    std::fs::read(folder.join(name)).unwrap()
}

/// Its tensors.
pub fn tensors(bytes: &[u8]) -> SafeTensors<'_> {
    SafeTensors::deserialize(bytes).unwrap()
}

/// The bytes of one tensor.
pub fn bytes<'a>(file: &SafeTensors<'a>, name: &str) -> &'a [u8] {
    file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}")).data()
}

/// The elements of one f32 tensor.
pub fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let (elements, rest) = bytes(file, name).as_chunks();
    assert!(rest.is_empty());
    elements.iter().map(|&element| f32::from_le_bytes(element)).collect()
}

/// Shape and format of a dense matrix.
pub fn matrix(file: &SafeTensors<'_>, name: &str) -> ([usize; 2], FloatDtype) {
    let tensor = file.tensor(name).unwrap();
    (tensor.shape().try_into().unwrap(), tensor.dtype().to_string().parse().unwrap())
}

/// The bits of floats, so that comparisons are exact and tell zeros apart.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Little-endian bytes.
pub fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
