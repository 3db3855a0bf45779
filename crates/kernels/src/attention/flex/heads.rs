//! Where the heads of a call are read and written.

use std::marker::PhantomData;

use burn::backend::flex::FlexTensor;

use crate::flex::Mat;

/// A `[batch, rows, heads, dim]` tensor that is read head by head. Any strides will do as long as a head's elements are
/// neighbours, so heads may lie inside the rows of a wider tensor.
pub struct Heads {
    tensor: FlexTensor,
    dims: [usize; 4],
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
        Self { tensor, dims, strides }
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
        let offset = self.tensor.layout().start_offset() + batch * of_batch + row * of_row + head * of_head;
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
