//! One safetensors file that is written tensor by tensor, in any order.
//!
//! The header stands in front of the data and its length depends on tensors that do not exist yet, so it is given as much
//! room as it can need and filled up with spaces, which the format allows. As in files that the `safetensors` crate
//! writes, tensors are sorted by the size of their elements, so that every one is aligned.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::PathBuf;

use emberlora_quant::bnb::{Element, LONGEST_STATE, Part, Tensor};
use serde_json::{Map, Value, json};

use super::error::{ExportError, failed};

/// A file under way.
#[derive(Debug)]
pub(super) struct ShardWriter {
    path: PathBuf,
    file: File,
    /// Where the data begins, behind the header.
    data: usize,
    slots: BTreeMap<String, Slot>,
    /// Bytes of all slots.
    length: usize,
    /// Tensors whose length only they know: they come behind all others.
    tail: BTreeMap<String, Vec<u8>>,
}

/// Where a tensor goes.
#[derive(Debug)]
struct Slot {
    element: Element,
    shape: Vec<usize>,
    range: Range<usize>,
}

impl ShardWriter {
    /// Creates a file for these tensors.
    pub(super) fn create(path: PathBuf, mut parts: Vec<Part>) -> Result<Self, ExportError> {
        let file = File::create_new(&path).map_err(failed("create", &path))?;
        parts.sort_by(|a, b| (Reverse(a.element.size()), &a.name).cmp(&(Reverse(b.element.size()), &b.name)));
        let (mut slots, mut tail, mut length) = (BTreeMap::new(), BTreeMap::new(), 0);
        for Part { name, element, shape } in parts {
            match shape {
                Some(shape) => {
                    let start = length;
                    length += shape.iter().product::<usize>() * element.size().unwrap_or(0);
                    slots.insert(name, Slot { element, shape, range: start..length });
                }
                None => drop(tail.insert(name, vec![0; LONGEST_STATE])),
            }
        }
        let mut shard = Self { path, file, data: 0, slots, length, tail };
        // Offsets only become smaller once the states have their lengths, and so do their digits.
        shard.data = 8 + shard.header().len().next_multiple_of(8);
        Ok(shard)
    }

    /// Names of all tensors.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.slots.keys().chain(self.tail.keys()).map(String::as_str)
    }

    /// Writes a piece of a tensor, whose first byte is `offset` behind the tensor's.
    pub(super) fn write(&mut self, name: &str, offset: usize, bytes: &[u8]) -> Result<(), ExportError> {
        let range = &self.slots[name].range;
        debug_assert!(range.start + offset + bytes.len() <= range.end, "`{name}` has no room for these bytes");
        self.write_at(self.data + range.start + offset, bytes)
    }

    /// Writes a whole tensor.
    pub(super) fn put(&mut self, name: &str, tensor: &Tensor<'_>) -> Result<(), ExportError> {
        match self.tail.get_mut(name) {
            Some(state) => {
                *state = tensor.bytes.to_vec();
                Ok(())
            }
            None => self.write(name, 0, &tensor.bytes),
        }
    }

    /// Writes what is left, brings the file to the disk, and returns how many bytes its tensors have.
    pub(super) fn finish(mut self) -> Result<usize, ExportError> {
        let mut end = self.data + self.length;
        for state in std::mem::take(&mut self.tail) {
            self.write_at(end, &state.1)?;
            end += state.1.len();
            self.tail.insert(state.0, state.1);
        }
        let mut header = self.header().into_bytes();
        header.resize(self.data - 8, b' ');
        self.write_at(0, &(header.len() as u64).to_le_bytes())?;
        self.write_at(8, &header)?;
        self.file.sync_all().map_err(failed("write", &self.path))?;
        Ok(end - self.data)
    }

    fn header(&self) -> String {
        let mut header = Map::from_iter([("__metadata__".to_owned(), json!({"format": "pt"}))]);
        let mut entry = |name: &str, element: Element, shape: &[usize], range: Range<usize>| {
            let offsets = [range.start, range.end];
            header.insert(name.to_owned(), json!({"dtype": element.name(), "shape": shape, "data_offsets": offsets}));
        };
        for (name, slot) in &self.slots {
            entry(name, slot.element, &slot.shape, slot.range.clone());
        }
        let mut end = self.length;
        for (name, state) in &self.tail {
            entry(name, Element::U8, &[state.len()], end..end + state.len());
            end += state.len();
        }
        Value::Object(header).to_string()
    }

    fn write_at(&mut self, at: usize, bytes: &[u8]) -> Result<(), ExportError> {
        let mut write = || {
            self.file.seek(SeekFrom::Start(at as u64))?;
            self.file.write_all(bytes)
        };
        write().map_err(failed("write", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use emberlora_quant::FloatDtype;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;
    use safetensors::SafeTensors;

    use super::*;

    const F32: Element = Element::Float(FloatDtype::F32);
    const BF16: Element = Element::Float(FloatDtype::Bf16);

    #[test]
    fn tensors_in_any_order_make_a_file_that_reads_back_and_is_aligned() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let parts = vec![
            Part::new("codes", Element::U8, Some(vec![3, 1])),
            Part::new("state.b", Element::U8, None),
            Part::new("half", BF16, Some(vec![3])),
            Part::new("state.a", Element::U8, None),
            Part::new("scale", F32, Some(vec![2, 1])),
            Part::new("scalar", Element::U8, Some(Vec::new())),
        ];
        let mut shard = ShardWriter::create(path.clone(), parts).unwrap();
        let tensor = |element, bytes: &'static [u8]| Tensor::new(element, Vec::new(), bytes);
        shard.put("state.b", &tensor(Element::U8, b"{}")).unwrap();
        shard.put("state.a", &tensor(Element::U8, b"[1]")).unwrap();
        shard.write("codes", 2, &[9]).unwrap();
        shard.write("codes", 0, &[7, 8]).unwrap();
        shard.put("half", &tensor(BF16, &[1, 2, 3, 4, 5, 6])).unwrap();
        shard.put("scalar", &tensor(Element::U8, &[5])).unwrap();
        shard.put("scale", &tensor(F32, &[1, 0, 0, 0, 2, 0, 0, 0])).unwrap();
        assert_eq!(shard.names().count(), 6);
        assert_eq!(shard.finish().unwrap(), 8 + 6 + 3 + 1 + 2 + 3);

        let bytes = std::fs::read(&path).unwrap();
        let (length, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        assert!(length.is_multiple_of(8));
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
        assert_eq!(metadata.offset_keys(), ["scale", "half", "codes", "scalar", "state.a", "state.b"]);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let data = |name: &str| file.tensor(name).unwrap().data().to_vec();
        assert_eq!((data("codes"), data("half")), (vec![7, 8, 9], vec![1, 2, 3, 4, 5, 6]));
        assert_eq!((data("state.a"), data("state.b")), (b"[1]".to_vec(), b"{}".to_vec()));
        assert_eq!(file.tensor("scale").unwrap().shape(), [2, 1]);
        assert_eq!(file.tensor("scalar").unwrap().shape(), [] as [usize; 0]);
    }

    proptest! {
        #[test]
        fn whatever_is_written_in_whatever_order_reads_back(
            tensors in vec((select(vec![F32, BF16, Element::U8, Element::I8]), 0usize..40, any::<bool>(), any::<u32>()), 0..12),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("a.safetensors");
            let tensors: Vec<_> = tensors
                .into_iter()
                .enumerate()
                .map(|(index, (element, length, is_state, seed))| {
                    let element = if is_state { Element::U8 } else { element };
                    let bytes = (0..length * element.size().unwrap()).map(|i| (i as u32 ^ seed) as u8).collect::<Vec<_>>();
                    (format!("tensor {index}"), element, is_state, bytes, seed)
                })
                .collect();
            let parts = tensors.iter().map(|(name, element, is_state, bytes, _)| {
                Part::new(name, *element, (!is_state).then(|| vec![bytes.len() / element.size().unwrap()]))
            });
            let mut shard = ShardWriter::create(path.clone(), parts.collect()).unwrap();
            let mut order: Vec<_> = tensors.iter().collect();
            order.sort_by_key(|tensor| tensor.4);
            for (name, element, _, bytes, _) in order {
                shard.put(name, &Tensor::new(*element, Vec::new(), bytes.as_slice())).unwrap();
            }
            shard.finish().unwrap();
            let written = std::fs::read(&path).unwrap();
            let file = SafeTensors::deserialize(&written).unwrap();
            prop_assert_eq!(file.len(), tensors.len());
            for (name, element, _, bytes, _) in &tensors {
                let view = file.tensor(name).unwrap();
                prop_assert_eq!(view.data(), bytes);
                prop_assert_eq!(view.dtype().to_string(), element.name());
                prop_assert!((view.data().as_ptr().addr() - written.as_ptr().addr()).is_multiple_of(element.size().unwrap()));
            }
        }
    }
}
