//! Where the heads of a call are read and written.

use std::marker::PhantomData;

use burn::backend::flex::FlexTensor;

use crate::flex::Mat;

/// A `[batch, rows, heads, dim]` tensor that is read head by head. Any strides will do as long as a head's elements are
/// neighbours, so heads may lie inside the rows of a wider tensor.
pub struct Heads {
    tensor: FlexTensor,
    dims: [usize; 4],
    /// The first element in the tensor's storage.
    offset: usize,
    /// Elements from one batch, row and head to the next.
    strides: [usize; 3],
}

impl Heads {
    /// Shares the tensor's storage; only one whose heads are scattered is copied.
    pub fn of(tensor: &FlexTensor) -> Self {
        let readable = |t: &FlexTensor| {
            let (strides, dims) = (t.layout().strides(), t.layout().shape());
            (strides[3] == 1 || dims[3] <= 1) && strides.iter().all(|&stride| stride >= 0)
        };
        let tensor = if readable(tensor) { tensor.clone() } else { tensor.to_contiguous() };
        let dims = tensor.layout().shape().dims();
        let strides = tensor.layout().strides();
        let strides = [strides[0], strides[1], strides[2]].map(|stride| stride as usize);
        Self { offset: tensor.layout().start_offset(), tensor, dims, strides }
    }

    /// Heads side by side from element `first` on in the rows of `width` elements of a contiguous tensor.
    pub fn within(tensor: FlexTensor, first: usize, width: usize, dims: [usize; 4]) -> Self {
        let [_, rows, _, dim] = dims;
        Self { offset: tensor.layout().start_offset() + first, tensor, dims, strides: [rows * width, width, dim] }
    }

    pub fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// One head of one row.
    pub fn head(&self, batch: usize, row: usize, head: usize) -> &[f32] {
        &self.from(batch, row, head)[..self.dims[3]]
    }

    /// One head of `count` rows, `[count, dim]`.
    pub fn rows(&self, batch: usize, first: usize, count: usize, head: usize) -> Mat<'_> {
        Mat::rows_of(self.from(batch, first, head), count, self.dims[3], self.strides[1])
    }

    fn from(&self, batch: usize, row: usize, head: usize) -> &[f32] {
        let [of_batch, of_row, of_head] = self.strides;
        let offset = self.offset + batch * of_batch + row * of_row + head * of_head;
        &self.tensor.storage::<f32>()[offset..]
    }
}

/// A result of heads that many tasks write at once, each its own heads.
pub struct Results<'a> {
    values: *mut f32,
    len: usize,
    /// Elements from one batch, row and head to the next.
    strides: [usize; 3],
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for the exclusive borrow that it was made from; that tasks write to different heads is what the
// callers of `write` promise.
unsafe impl Sync for Results<'_> {}

impl<'a> Results<'a> {
    pub fn new(values: &'a mut [f32], strides: [usize; 3]) -> Self {
        Self { values: values.as_mut_ptr(), len: values.len(), strides, borrowed: PhantomData }
    }

    /// Results that lie side by side in the rows of one matrix of `width` columns, each from its element of `firsts` up to
    /// that of the next.
    pub fn side_by_side(values: &'a mut [f32], firsts: [usize; 3], [rows, width, dim]: [usize; 3]) -> [Self; 3] {
        let (start, len) = (values.as_mut_ptr(), values.len());
        firsts.map(|first| {
            assert!(first <= len, "a result begins behind the matrix");
            // SAFETY: inside the slice, as was just checked.
            let values = unsafe { start.add(first) };
            Self { values, len: len - first, strides: [rows * width, width, dim], borrowed: PhantomData }
        })
    }

    /// Copies `values` to where a head of a row begins.
    ///
    /// # Safety
    /// No other thread may write to any of these elements at the same time.
    pub unsafe fn write(&self, batch: usize, row: usize, head: usize, values: &[f32]) {
        let offset = batch * self.strides[0] + row * self.strides[1] + head * self.strides[2];
        assert!(offset + values.len() <= self.len, "a head is written past the result");
        // SAFETY: the assertion keeps the write inside the borrowed slice, which `values` cannot overlap; that nobody
        // else writes here at the same time is the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), self.values.add(offset), values.len()) }
    }
}
