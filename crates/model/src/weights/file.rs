//! One mapped safetensors file.
//!
//! The format (<https://github.com/huggingface/safetensors>): 8 bytes of header length, a JSON header, then the data
//! that the header's offsets cover without holes or overlaps. The `safetensors` crate checks exactly this.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{AllocationProperty, Bytes};
use emberlora_quant::FloatDtype;
use emberlora_quant::bnb::{self, Element};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata};
use safetensors::{SafeTensorError, SafeTensors};

use super::error::LoadError;

/// A mapped file; tensors made from it keep the mapping alive.
#[derive(Debug)]
pub(super) struct WeightFile {
    pub path: PathBuf,
    map: Arc<Mmap>,
    file: File,
    metadata: Metadata,
    /// Where the data begins.
    data: usize,
}

/// Where a tensor is and what it is.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub dtype: FloatDtype,
    pub shape: Vec<usize>,
    /// Bytes within the file.
    pub range: Range<usize>,
}

impl WeightFile {
    pub(super) fn open(path: &Path) -> Result<Self, LoadError> {
        let io = |source| LoadError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        if length < 8 {
            let reason = format!("{length} bytes cannot even hold the header's length");
            return Err(LoadError::Malformed { path: path.to_owned(), reason });
        }
        // SAFETY: the mapping is read-only and private to this process. Another process that truncates or rewrites
        // the file while it is mapped would break it, as it would for every program that maps weights; model files
        // are written once and replaced as a whole.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|error| explain(path, &map, error))?;
        Ok(Self { path: path.to_owned(), map: Arc::new(map), file, metadata, data: 8 + header })
    }

    /// Names in the order of their data.
    pub(super) fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.metadata.info(name).is_some()
    }

    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.metadata.info(name).map(|info| info.shape.as_slice())
    }

    /// The tensor, which must be in the file and hold floating-point numbers.
    pub(super) fn entry(&self, name: &str) -> Result<Option<Entry>, LoadError> {
        let Some(info) = self.metadata.info(name) else { return Ok(None) };
        let dtype = match info.dtype {
            Dtype::F32 => FloatDtype::F32,
            Dtype::BF16 => FloatDtype::Bf16,
            Dtype::F16 => FloatDtype::F16,
            other => {
                let (path, tensor) = (self.path.clone(), name.to_owned());
                return Err(LoadError::Dtype { path, tensor, found: format!("{other:?}") });
            }
        };
        let (start, end) = info.data_offsets;
        Ok(Some(Entry { dtype, shape: info.shape.clone(), range: self.data + start..self.data + end }))
    }

    /// The entry's bytes in `dtype`: the mapping itself where the file holds that format, else a converted copy.
    ///
    /// Returns whether they are mapped.
    pub(super) fn bytes(&self, entry: &Entry, dtype: FloatDtype) -> Result<(Bytes, bool), LoadError> {
        let aligned = self.map[entry.range.clone()].as_ptr().addr().is_multiple_of(dtype.size());
        if entry.dtype == dtype && aligned && cfg!(target_endian = "little") {
            let shared = bytes::Bytes::from_owner(Slice { map: Arc::clone(&self.map), range: entry.range.clone() });
            return Ok((Bytes::from_shared(shared, AllocationProperty::File), true));
        }
        self.converted(entry, dtype).map(|bytes| (bytes, false))
    }

    /// Whether two tensors hold the same bytes in the same format.
    pub(super) fn same_bytes(&self, entry: &Entry, other: &Self, of: &Entry) -> bool {
        entry.dtype == of.dtype && self.map[entry.range.clone()] == other.map[of.range.clone()]
    }

    fn converted(&self, entry: &Entry, dtype: FloatDtype) -> Result<Bytes, LoadError> {
        let elements = entry.range.len() / entry.dtype.size();
        Ok(match dtype {
            FloatDtype::F32 => Bytes::from_elems(self.elements(entry, dtype, elements, f32::from_le_bytes)?),
            FloatDtype::Bf16 => Bytes::from_elems(self.elements(entry, dtype, elements, bf16::from_le_bytes)?),
            FloatDtype::F16 => Bytes::from_elems(self.elements(entry, dtype, elements, f16::from_le_bytes)?),
        })
    }

    fn elements<T, const N: usize>(
        &self,
        entry: &Entry,
        dtype: FloatDtype,
        count: usize,
        read: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, LoadError> {
        let mut out = Vec::with_capacity(count);
        self.pieces(&entry.range, |piece| -> Result<(), LoadError> {
            let converted = emberlora_quant::convert(piece, entry.dtype, dtype)
                .map_err(|error| LoadError::Malformed { path: self.path.clone(), reason: error.to_string() })?;
            out.extend(converted.as_chunks::<N>().0.iter().map(|&element| read(element)));
            Ok(())
        })?;
        Ok(out)
    }

    /// Bytes of a tensor; 0 where there is none of that name.
    pub(super) fn length(&self, name: &str) -> usize {
        self.metadata.info(name).map_or(0, |info| info.data_offsets.1 - info.data_offsets.0)
    }

    /// Hands on a tensor's bytes in pieces of whole elements, read through the file rather than through the mapping:
    /// pages of the mapping that were touched once would stay resident beside what is made of them.
    pub(super) fn pieces<E: From<LoadError>>(
        &self,
        range: &Range<usize>,
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        const PIECE: usize = 4 << 20;
        let io = |source| LoadError::Io { path: self.path.clone(), source };
        let mut file = &self.file;
        file.seek(SeekFrom::Start(range.start as u64)).map_err(io)?;
        let mut piece = vec![0; PIECE.min(range.len())];
        let mut left = range.len();
        while left > 0 {
            let now = piece.len().min(left);
            file.read_exact(&mut piece[..now]).map_err(io)?;
            take(&piece[..now])?;
            left -= now;
        }
        Ok(())
    }

    /// The tensor as it is stored, whatever its elements are, read through the file.
    pub(super) fn stored(&self, name: &str) -> Result<Option<bnb::Tensor<'static>>, LoadError> {
        let Some(info) = self.metadata.info(name) else { return Ok(None) };
        let (start, end) = info.data_offsets;
        let mut bytes = Vec::with_capacity(end - start);
        self.pieces(&(self.data + start..self.data + end), |piece| -> Result<(), LoadError> {
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(Some(bnb::Tensor::new(Element::from_name(&info.dtype.to_string()), info.shape.clone(), bytes)))
    }
}

/// The bytes of one tensor, owning its share of the mapping.
struct Slice {
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl AsRef<[u8]> for Slice {
    fn as_ref(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}

/// Turns the crate's terse error into one that says what to do.
fn explain(path: &Path, map: &[u8], error: SafeTensorError) -> LoadError {
    let path = path.to_owned();
    let found = map.len() as u64;
    let header = map.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let reason = match error {
        SafeTensorError::InvalidHeaderLength => {
            return LoadError::Truncated { path, expected: header.saturating_add(8), found };
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            let end = usize::try_from(header).ok().and_then(|n| n.checked_add(8)).and_then(|end| map.get(8..end));
            let described = end.and_then(|json| serde_json::from_slice::<Metadata>(json).ok());
            let expected = described.map_or(0, |meta| 8 + header + meta.data_len() as u64);
            if expected > found {
                return LoadError::Truncated { path, expected, found };
            }
            format!("{} bytes follow the last tensor", found - expected)
        }
        SafeTensorError::InvalidOffset(name) => {
            format!("tensor `{name}` does not begin where the one before it ends: tensors overlap or leave a hole")
        }
        SafeTensorError::TensorInvalidInfo => "a tensor's bytes do not fit its shape and format".to_owned(),
        SafeTensorError::HeaderTooLarge => format!("its first 8 bytes claim a header of {header} bytes"),
        other => other.to_string(),
    };
    LoadError::Malformed { path, reason }
}
