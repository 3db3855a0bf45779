//! What the CPU bodies share: views of a tensor's storage, and small matrix products.

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Shape};
use rayon::prelude::*;

/// Runs an operation on one of the threads that share its work: each of its parallel parts then wakes the others at most,
/// and not a thread to hand the work to.
pub(crate) fn on_worker<R: Send>(operation: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| operation())
}

/// A read-only, strided f32 matrix over borrowed storage; transposing costs nothing.
///
/// The lifetime ties it to the storage it points into.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    data: &'a [f32],
    pub rows: usize,
    pub cols: usize,
    row_stride: isize,
    col_stride: isize,
}

impl<'a> Mat<'a> {
    /// A row-major view of `data`.
    pub fn slice(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, [rows, cols], [cols as isize, 1])
    }

    /// `rows` rows of `cols` neighbours each, `stride` elements from row to row.
    pub fn rows_of(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        Self::strided(data, [rows, cols], [stride as isize, 1])
    }

    fn strided(data: &'a [f32], [rows, cols]: [usize; 2], [row_stride, col_stride]: [isize; 2]) -> Self {
        assert!(row_stride >= 0 && col_stride >= 0, "flipped views are made contiguous before they come here");
        let extent = (rows.max(1) - 1) * row_stride as usize + (cols.max(1) - 1) * col_stride as usize;
        assert!(rows * cols == 0 || extent < data.len(), "a [{rows}, {cols}] view reaches past its storage");
        Self { data, rows, cols, row_stride, col_stride }
    }

    pub fn t(self) -> Self {
        Self { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// `dst (+)= factor · lhs · rhs` on the calling thread, for small products inside parallel tasks; `dst` is row-major with
/// `stride` elements from row to row.
pub(crate) fn gemm_serial(dst: &mut [f32], stride: usize, accumulate: bool, factor: f32, lhs: Mat, rhs: Mat) {
    assert_eq!(lhs.cols, rhs.rows, "inner dimensions differ");
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * stride + n <= dst.len() && n <= stride, "the destination is smaller than the product");
    // SAFETY: `Mat::strided` checked that every element of both views lies inside its slice, the assertion above that
    // every written element lies inside `dst`; `dst` is borrowed mutably, so it overlaps neither view.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            stride as isize,
            accumulate,
            lhs.data.as_ptr(),
            lhs.col_stride,
            lhs.row_stride,
            rhs.data.as_ptr(),
            rhs.col_stride,
            rhs.row_stride,
            1.0,
            factor,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// The rows of a contiguous f32 tensor: its last dimension is the width of a row.
pub(crate) struct Rows {
    tensor: FlexTensor,
    width: usize,
    len: usize,
}

impl Rows {
    /// Shares the storage of a contiguous tensor; a view with other strides is copied once.
    pub fn of(tensor: &FlexTensor) -> Self {
        let tensor = contiguous(tensor);
        let shape = tensor.layout().shape();
        let (width, len) = (shape[shape.num_dims() - 1].max(1), shape.num_elements());
        Self { width, len, tensor }
    }

    pub fn values(&self) -> &[f32] {
        &self.tensor.storage::<f32>()[self.tensor.layout().start_offset()..][..self.len]
    }

    pub fn par_iter(&self) -> rayon::slice::ChunksExact<'_, f32> {
        self.values().par_chunks_exact(self.width)
    }

    /// The values to be changed: where they lie if nothing else holds them, else in a copy.
    pub fn values_mut(&mut self) -> &mut [f32] {
        let first = self.tensor.layout().start_offset();
        &mut self.tensor.storage_mut::<f32>()[first..][..self.len]
    }

    /// The tensor, contiguous.
    pub fn tensor(&self) -> FlexTensor {
        self.tensor.clone()
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub fn count(&self) -> usize {
        self.len / self.width
    }

    /// Rows below which a further task costs more than it gains.
    pub fn rows_per_task(&self) -> usize {
        (1 << 14) / self.width + 1
    }
}

/// Takes `data` over as a contiguous f32 tensor, without a copy.
pub(crate) fn f32_tensor<const D: usize>(data: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    f32_tensor_of(data, Shape::new(shape))
}

/// [`f32_tensor`] of a shape whose rank is not known here.
pub(crate) fn f32_tensor_of(data: Vec<f32>, shape: Shape) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(data), Layout::contiguous(shape), DType::F32)
}

/// `tensor` with neighbouring elements in order. Burn's own `to_contiguous` also copies a contiguous part of a larger
/// storage, such as the filled part of a cache; everything here reads from the layout's offset on, so it need not.
pub(crate) fn contiguous(tensor: &FlexTensor) -> FlexTensor {
    if tensor.is_contiguous() { tensor.clone() } else { tensor.to_contiguous() }
}

/// The non-negative integers of a tensor, whatever integer format it has.
pub(crate) fn integers(tensor: &FlexTensor) -> Vec<usize> {
    let tensor = contiguous(tensor);
    let (offset, len) = (tensor.layout().start_offset(), tensor.layout().shape().num_elements());
    match tensor.dtype() {
        DType::I64 => tensor.storage::<i64>()[offset..][..len].iter().map(|v| *v as usize).collect(),
        DType::I32 => tensor.storage::<i32>()[offset..][..len].iter().map(|v| *v as usize).collect(),
        other => panic!("expected an i64 or i32 tensor, found {other:?}"),
    }
}
