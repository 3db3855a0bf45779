//! What the CPU bodies share: strided views of a tensor's storage and the general matrix product.

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Shape};
use rayon::prelude::*;

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
    /// The view of a two-dimensional f32 tensor, whatever its strides.
    pub fn of(tensor: &'a FlexTensor) -> Self {
        let (shape, strides) = (tensor.layout().shape(), tensor.layout().strides());
        assert_eq!(shape.num_dims(), 2, "a matrix has two dimensions, found {shape:?}");
        Self::strided(
            &tensor.storage::<f32>()[tensor.layout().start_offset()..],
            [shape[0], shape[1]],
            [strides[0], strides[1]],
        )
    }

    /// A row-major view of `data`.
    pub fn slice(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::strided(data, [rows, cols], [cols as isize, 1])
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

    /// Columns `first..first + count`.
    pub fn columns(self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.cols);
        Self { data: &self.data[first * self.col_stride as usize..], cols: count, ..self }
    }
}

/// Multiply-adds below which a product stays on one thread: waking a second one costs about as much.
const PARALLEL_FROM: usize = 192 * 192 * 192;

/// `dst (+)= factor · lhs · rhs`, `dst` row-major with `stride` elements from row to row.
pub(crate) fn gemm(dst: &mut [f32], stride: usize, accumulate: bool, factor: f32, lhs: Mat, rhs: Mat) {
    assert_eq!(lhs.cols, rhs.rows, "inner dimensions differ");
    let (m, n, k) = (lhs.rows, rhs.cols, lhs.cols);
    if m == 0 || n == 0 {
        return;
    }
    assert!((m - 1) * stride + n <= dst.len() && n <= stride, "the destination is smaller than the product");
    let parallelism = match m * n * k >= PARALLEL_FROM {
        true => gemm::Parallelism::Rayon(0),
        false => gemm::Parallelism::None,
    };
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
            parallelism,
        );
    }
}

/// Takes `data` over as a contiguous f32 tensor, without a copy.
pub(crate) fn f32_tensor<const D: usize>(data: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(data), Layout::contiguous(Shape::new(shape)), DType::F32)
}

/// Widens half-precision values on all cores.
pub(crate) fn half_to_f32<H: Copy + Sync>(values: &[H], out: &mut [f32], widen: impl Fn(H) -> f32 + Sync) {
    const CHUNK: usize = 1 << 14;
    out.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).for_each(|(out, values)| {
        for (out, &value) in out.iter_mut().zip(values) {
            *out = widen(value);
        }
    });
}
