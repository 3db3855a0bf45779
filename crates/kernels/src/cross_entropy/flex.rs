//! The CPU body: the gradient of a row of logits is made while it is packed for the product with the head, and is never
//! stored.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;
use rayon::prelude::*;

use super::{CrossEntropyBodies, generic};
use crate::flex::{Rows, f32_tensor, integers, on_worker};
use crate::gemm::{self, Job, Lanes, Left, Matrix, Operand, Source, Start, Term};
use crate::simd::{exp, lane_max, lane_sum, vectorised};
use crate::weight::Weight;
use crate::weight::flex::Stored;

/// Columns of the logits' gradient that are packed at one time.
const PACKED_COLUMNS: usize = 3072;

vectorised! {
    /// log Σ exp.
    fn log_sum_exp(logits: &[f32]) -> f32 {
        let max = lane_max(logits);
        max + lane_sum(logits.len(), |i| exp(logits[i] - max)).ln()
    }
}

vectorised! {
    /// weight · softmax, of a part of a row.
    fn weighted_softmax(logits: &[f32], log_sum: f32, weight: f32, out: &mut [f32]) {
        let logits = &logits[..out.len()];
        for i in 0..out.len() {
            out[i] = weight * exp(logits[i] - log_sum);
        }
    }
}

/// weight · (softmax(logits) − onehot(target)), made while it is read.
struct LogitsGradient<'a> {
    logits: Matrix<'a>,
    log_sums: &'a [f32],
    targets: &'a [usize],
    weights: &'a [f32],
    /// The column of the logits that is column 0 here.
    first: usize,
}

impl Source for LogitsGradient<'_> {
    fn read(&self, row: usize, first: usize, out: &mut [f32]) {
        let first = self.first + first;
        weighted_softmax(self.logits.row(row, first, out.len()), self.log_sums[row], self.weights[row], out);
        if let Some(target) = self.targets[row].checked_sub(first).and_then(|at| out.get_mut(at)) {
            *target -= self.weights[row];
        }
    }

    fn prefetch(&self, row: usize, first: usize, count: usize) {
        self.logits.prefetch(row, self.first + first, count);
    }
}

impl CrossEntropyBodies for Flex {
    fn head_loss(
        hidden: FlexTensor,
        w: Weight<Self>,
        targets: FlexTensor,
        weights: FlexTensor,
        with_grad: bool,
        chunk: usize,
    ) -> (FlexTensor, Option<FlexTensor>) {
        let head = Stored::of(&w).filter(|_| hidden.dtype() == DType::F32 && weights.dtype() == DType::F32);
        let Some(head) = head else {
            return generic::head_loss::<Self>(hidden, w, targets, weights, with_grad, chunk);
        };
        let (hidden, targets, weights) = (Rows::of(&hidden), integers(&targets), Rows::of(&weights));
        on_worker(|| loss_and_gradient(&hidden, &head, &targets, &weights, with_grad, chunk))
    }
}

fn loss_and_gradient(
    hidden: &Rows,
    head: &Stored,
    targets: &[usize],
    weights: &Rows,
    with_grad: bool,
    chunk: usize,
) -> (FlexTensor, Option<FlexTensor>) {
    let ([vocabulary, width], rows) = (head.dims(), targets.len());
    let (source, mut loss) = (head.source(), 0f32);
    let mut grad = vec![0f32; if with_grad { rows * width } else { 0 }];
    let mut logits = Vec::new();
    for first in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - first);
        {
            let x = Matrix::new(&hidden.values()[first * width..], width);
            let left = Left::new(count, width, Operand::new(&x, Lanes::Rows));
            let terms = vec![Term { left: &left, right: Operand::new(&*source, Lanes::Rows) }];
            let job = Job { first: 0, columns: vocabulary, terms, start: Start::Zero };
            gemm::product_into(count, vocabulary, &[job], &mut logits);
        }
        let log_sums: Vec<f32> = logits.par_chunks_exact(vocabulary).map(log_sum_exp).collect();
        let (targets, weights) = (&targets[first..][..count], &weights.values()[first..][..count]);
        for (row, ((log_sum, target), weight)) in log_sums.iter().zip(targets).zip(weights).enumerate() {
            loss += weight * (log_sum - logits[row * vocabulary + target]);
        }
        if !with_grad {
            continue;
        }
        let grad = &mut grad[first * width..][..count * width];
        for part in (0..vocabulary).step_by(PACKED_COLUMNS) {
            let columns = PACKED_COLUMNS.min(vocabulary - part);
            let logits = Matrix::new(&logits, vocabulary);
            let gradient = LogitsGradient { logits, log_sums: &log_sums, targets, weights, first: part };
            let left = Left::new(count, columns, Operand::new(&gradient, Lanes::Rows));
            let right = gemm::Below::new(&*source, part);
            let terms = vec![Term { left: &left, right: Operand::new(&right, Lanes::Columns) }];
            gemm::accumulate(count, width, terms, grad);
        }
    }
    (f32_tensor(vec![loss], [1]), with_grad.then(|| f32_tensor(grad, [rows, width])))
}
