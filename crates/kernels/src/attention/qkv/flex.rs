//! The CPU body: heads are normed and rotated on the way out of qkv, and gradients turned back where they were written.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;
use rayon::prelude::*;

use super::{HeadLayout, Norms, QkvBodies, QkvContext, generic};
use crate::attention::flex as attention;
use crate::attention::flex::{Heads, Results};
use crate::flex::{Rows, f32_tensor, on_worker};
use crate::norm::flex::{backward_row, forward_row};
use crate::rope::flex::{rotate, rotate_back};

/// qkv and what is done to its heads, as slices.
struct Call {
    qkv: Rows,
    cos: Rows,
    sin: Rows,
    norms: Option<(Rows, Rows, f32)>,
    layout: HeadLayout,
    batch: usize,
    seq: usize,
}

impl Call {
    /// `None` for what the default bodies take.
    fn new(qkv: &FlexTensor, context: &QkvContext<Flex>) -> Option<Self> {
        let QkvContext { norms, tables, layout, .. } = context;
        let is_f32 = |t: &FlexTensor| t.dtype() == DType::F32;
        let norms = match norms {
            Norms::Absent => None,
            Norms::Present { q, k, eps } if is_f32(q) && is_f32(k) => Some((Rows::of(q), Rows::of(k), *eps)),
            Norms::Present { .. } => return None,
        };
        if ![qkv, &tables.cos, &tables.sin].into_iter().all(is_f32) {
            return None;
        }
        let (batch, seq) = (qkv.layout().shape()[0], qkv.layout().shape()[1]);
        let (cos, sin) = (Rows::of(&tables.cos), Rows::of(&tables.sin));
        Some(Self { qkv: Rows::of(qkv), cos, sin, norms, layout: *layout, batch, seq })
    }

    /// Elements of the queries, and of queries and keys, of a token.
    fn widths(&self) -> (usize, usize) {
        let HeadLayout { heads, kv_heads, dim } = self.layout;
        (heads * dim, (heads + kv_heads) * dim)
    }

    /// The tables of a token.
    fn angles(&self, token: usize) -> (&[f32], &[f32]) {
        let half = self.cos.width();
        (&self.cos.values()[token * half..][..half], &self.sin.values()[token * half..][..half])
    }

    /// The queries and keys of all tokens, normed and rotated: `[B · S, (H + Hkv) · D]`.
    fn rotated(&self) -> Vec<f32> {
        let ((q_width, width), dim) = (self.widths(), self.layout.dim);
        let mut out = vec![0f32; self.batch * self.seq * width];
        let rows = out.par_chunks_mut(width).zip(self.qkv.par_iter()).enumerate();
        rows.with_min_len(self.qkv.rows_per_task()).for_each(|(token, (out, qkv))| {
            out.copy_from_slice(&qkv[..width]);
            if let Some((q, k, eps)) = &self.norms {
                for (range, weight) in [(0..q_width, q), (q_width..width, k)] {
                    let (weight, x) = (weight.values(), &qkv[range.clone()]);
                    for (out, x) in out[range].chunks_exact_mut(weight.len()).zip(x.chunks_exact(weight.len())) {
                        forward_row(x, weight, out, *eps);
                    }
                }
            }
            let (cos, sin) = self.angles(token);
            out.chunks_exact_mut(dim).for_each(|head| rotate(head, cos, sin));
        });
        out
    }

    /// Turns gradients of rotated queries and keys, in rows like those of qkv, into those of qkv.
    fn turn_back(&self, grads: &mut [f32]) {
        let ((q_width, width), dim) = (self.widths(), self.layout.dim);
        let rows = grads.par_chunks_mut(self.qkv.width()).zip(self.qkv.par_iter()).enumerate();
        rows.with_min_len(self.qkv.rows_per_task()).for_each(|(token, (grads, qkv))| {
            let (cos, sin) = self.angles(token);
            grads[..width].chunks_exact_mut(dim).for_each(|head| rotate_back(head, cos, sin));
            let Some((q, k, eps)) = &self.norms else { return };
            for (range, weight) in [(0..q_width, q), (q_width..width, k)] {
                let (weight, x) = (weight.values(), &qkv[range.clone()]);
                for (grad, x) in grads[range].chunks_exact_mut(weight.len()).zip(x.chunks_exact(weight.len())) {
                    backward_row(grad, x, weight, *eps);
                }
            }
        });
    }

    /// The heads as attention reads them.
    fn heads(&self, rotated: Vec<f32>) -> [Heads; 3] {
        let HeadLayout { heads, kv_heads, dim } = self.layout;
        let (batch, seq, (q_width, width)) = (self.batch, self.seq, self.widths());
        let rotated = f32_tensor(rotated, [batch, seq, width]);
        [
            Heads::within(rotated.clone(), 0, width, [batch, seq, heads, dim]),
            Heads::within(rotated, q_width, width, [batch, seq, kv_heads, dim]),
            Heads::within(self.qkv.tensor(), width, self.qkv.width(), [batch, seq, kv_heads, dim]),
        ]
    }
}

impl QkvBodies for Flex {
    fn qkv_forward(qkv: FlexTensor, context: &QkvContext<Self>) -> (FlexTensor, FlexTensor) {
        let Some(call) = Call::new(&qkv, context) else {
            return generic::forward::<Self>(qkv, context);
        };
        let (out, lse) = on_worker(|| {
            let heads = call.heads(call.rotated());
            attention::forward(heads.each_ref(), &context.spans, context.options)
        });
        let HeadLayout { heads, dim, .. } = call.layout;
        (f32_tensor(out, [call.batch, call.seq, heads * dim]), f32_tensor(lse, [call.batch, heads, call.seq, 1]))
    }

    fn qkv_backward(
        grad: FlexTensor,
        qkv: FlexTensor,
        out: FlexTensor,
        lse: FlexTensor,
        context: &QkvContext<Self>,
    ) -> FlexTensor {
        let call = Call::new(&qkv, context).filter(|_| grad.dtype() == DType::F32);
        let Some(call) = call else {
            return generic::backward::<Self>(grad, qkv, out, lse, context);
        };
        let HeadLayout { heads: count, dim, .. } = call.layout;
        let (batch, seq, (q_width, width)) = (call.batch, call.seq, call.widths());
        let rows = |t: FlexTensor| Heads::within(Rows::of(&t).tensor(), 0, q_width, [batch, seq, count, dim]);
        let saved = [rows(grad), rows(out), Heads::of(&lse)];
        let row = call.qkv.width();
        let mut grads = vec![0f32; batch * seq * row];
        let results = Results::side_by_side(&mut grads, [0, q_width, width], [seq, row, dim]);
        on_worker(|| {
            let heads = call.heads(call.rotated());
            attention::backward(
                heads.each_ref(),
                saved.each_ref(),
                &context.spans,
                context.options,
                results.each_ref(),
            );
        });
        call.turn_back(&mut grads);
        f32_tensor(grads, [batch, seq, row])
    }
}
