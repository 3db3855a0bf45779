//! The CPU body, on products whose operands are made while they are packed ([`crate::gemm`]).
//!
//! h is packed once for all projections of a group; what an adapter adds is a further stretch of the inner dimension of the
//! frozen product; a weight stored in a narrower format is widened tile by tile. [`adapters`] has the products of h and of
//! the gradient with A and B.

mod adapters;
mod few_rows;
mod int8;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::DType;
use rayon::prelude::*;

use super::{AdapterPath, LinearBodies, LinearGrads, LowRank, Optional, Projected, Prologue, generic};
use crate::activation::{self, Gate};
use crate::flex::{Rows, f32_tensor, on_worker};
use crate::gemm::{self, Gated, Job, Lanes, Left, Matrix, Normed, Operand, Source, Start, Term};
use crate::norm;
use crate::weight::Weight;
use crate::weight::flex::Stored;
use adapters::Adapters;

/// Rows up to which a product is limited by reading the weight, so that each weight is read once and used at once.
const FEW_ROWS: usize = 4;

/// Whether the bodies below compute this; the default ones take the rest.
fn supported(x: &FlexTensor, prologue: &Prologue<Flex>, projections: &[Projected<Flex>]) -> bool {
    let is_f32 = |t: &FlexTensor| t.dtype() == DType::F32;
    let optional = |t: &Optional<Flex>| if let Optional::Present(t) = t { is_f32(t) } else { true };
    let prologue = match prologue {
        Prologue::Plain | Prologue::Gated(_) => true,
        Prologue::Normed { weight, .. } => is_f32(weight),
    };
    prologue
        && is_f32(x)
        && projections.iter().all(|Projected { weight, bias, adapter, .. }| {
            Stored::reads(weight)
                && optional(bias)
                && match adapter {
                    LowRank::Absent => true,
                    LowRank::Present { a, b } => is_f32(a) && is_f32(b),
                }
        })
}

/// h, which exists only while it is read.
struct Hidden {
    x: Rows,
    prologue: Step,
    /// K.
    width: usize,
}

enum Step {
    Plain,
    Normed { weight: Rows, factors: Vec<f32> },
    Gated(Gate),
}

impl Hidden {
    fn new(x: &FlexTensor, prologue: &Prologue<Flex>) -> Self {
        let x = Rows::of(x);
        let (prologue, width) = match prologue {
            Prologue::Plain => (Step::Plain, x.width()),
            Prologue::Normed { weight, eps } => {
                (Step::Normed { weight: Rows::of(weight), factors: norm::flex::factors(&x, *eps) }, x.width())
            }
            Prologue::Gated(gate) => (Step::Gated(*gate), x.width() / 2),
        };
        Self { x, prologue, width }
    }

    /// Calls `f` with h.
    fn with<T>(&self, f: impl FnOnce(&dyn Source) -> T) -> T {
        let x = Matrix::new(self.x.values(), self.x.width());
        match &self.prologue {
            Step::Plain => f(&x),
            Step::Normed { weight, factors } => f(&Normed::new(x, weight.values(), factors)),
            Step::Gated(gate) => f(&Gated::new(*gate, x, self.width)),
        }
    }

    /// dx from dh, in the memory of one of them where it can be.
    fn backward(self, mut dh: Vec<f32>) -> FlexTensor {
        match self.prologue {
            Step::Plain => {}
            Step::Normed { weight, factors } => norm::flex::backward_in_place(&mut dh, &self.x, &weight, &factors),
            Step::Gated(gate) => return activation::flex::side_by_side_backward(gate, &dh, self.x),
        }
        f32_tensor(dh, [self.x.count(), self.x.width()])
    }
}

/// A projection ready to be multiplied with.
struct Part {
    weight: Stored,
    /// Above 0 the activations of the forward product are in 8 bits as well, see [`int8`].
    threshold: f32,
    bias: Option<Rows>,
    adapter: Option<Factors>,
    path: AdapterPath,
    /// Its first column in the outputs side by side.
    first: usize,
    /// N.
    columns: usize,
}

struct Factors {
    a: Rows,
    b: Rows,
    /// r.
    rank: usize,
}

fn parts(projections: &[Projected<Flex>]) -> (Vec<Part>, usize) {
    let mut width = 0;
    let parts = projections
        .iter()
        .map(|Projected { weight, bias, adapter, path }| {
            let threshold = match weight {
                Weight::Int8 { format, .. } => format.threshold,
                _ => 0.0,
            };
            let weight = Stored::of(weight).expect("a format that was found to be supported");
            let [columns, _] = weight.dims();
            let first = width;
            width += columns;
            let adapter = match adapter {
                LowRank::Absent => None,
                // A rank of zero adds nothing.
                LowRank::Present { a, .. } if a.layout().shape()[0] == 0 => None,
                LowRank::Present { a, b } => {
                    Some(Factors { rank: a.layout().shape()[0], a: Rows::of(a), b: Rows::of(b) })
                }
            };
            let bias = match bias {
                Optional::Absent => None,
                Optional::Present(bias) => Some(Rows::of(bias)),
            };
            Part { weight, threshold, bias, adapter, path: *path, first, columns }
        })
        .collect();
    (parts, width)
}

/// What products read of the parts.
struct Sources<'a> {
    weights: Vec<Box<dyn Source + 'a>>,
    /// (A, B, r) where there is an adapter.
    factors: Vec<Option<(Matrix<'a>, Matrix<'a>, usize)>>,
}

impl<'a> Sources<'a> {
    fn of(parts: &'a [Part], inner: usize) -> Self {
        let factors = |factors: &'a Factors| {
            let Factors { a, b, rank } = factors;
            (Matrix::new(a.values(), inner), Matrix::new(b.values(), *rank), *rank)
        };
        Self {
            weights: parts.iter().map(|part| part.weight.source()).collect(),
            factors: parts.iter().map(|part| part.adapter.as_ref().map(factors)).collect(),
        }
    }
}

/// The matrix of each part with an adapter as a left operand.
fn lefts<'a>(rows: usize, low: &'a [Option<Matrix<'a>>], parts: &[Part]) -> Vec<Option<Left<'a>>> {
    let left = |(low, part): (&'a Option<Matrix<'a>>, &Part)| {
        let rank = part.adapter.as_ref()?.rank;
        Some(Left::new(rows, rank, Operand::new(low.as_ref()?, Lanes::Rows)))
    };
    low.iter().zip(parts).map(left).collect()
}

fn forward(
    x: &FlexTensor,
    prologue: &Prologue<Flex>,
    projections: &[Projected<Flex>],
    residual: Option<&FlexTensor>,
) -> FlexTensor {
    let hidden = Hidden::new(x, prologue);
    let (parts, width) = parts(projections);
    let (rows, inner) = (hidden.x.count(), hidden.width);
    let sources = Sources::of(&parts, inner);
    let residual = residual.map(Rows::of);
    let few = rows <= FEW_ROWS && parts.iter().all(|part| part.threshold == 0.0);
    let mut y = hidden.with(|h| match few {
        true => few_rows::forward(rows, inner, width, h, &parts, &sources),
        false => {
            let left = Left::new(rows, inner, Operand::new(h, Lanes::Rows));
            let low = Adapters::new(&parts, rows, inner).hidden(h);
            let low = low.matrices();
            let low = lefts(rows, &low, &parts);
            let jobs: Vec<Job> = parts
                .iter()
                .enumerate()
                .map(|(i, part)| {
                    let mut terms = Vec::with_capacity(2);
                    if part.threshold == 0.0 {
                        terms.push(Term { left: &left, right: Operand::new(&*sources.weights[i], Lanes::Rows) });
                    }
                    if let (Some(left), Some((_, b, _))) = (&low[i], &sources.factors[i]) {
                        terms.push(Term { left, right: Operand::new(b, Lanes::Rows) });
                    }
                    let start = match (&residual, &part.bias) {
                        (Some(residual), _) => Start::Values(Matrix::new(residual.values(), width)),
                        (None, Some(bias)) => Start::Bias(bias.values()),
                        (None, None) => Start::Zero,
                    };
                    Job { first: part.first, columns: part.columns, terms, start }
                })
                .collect();
            let mut y = gemm::product(rows, width, &jobs);
            for part in parts.iter().filter(|part| part.threshold > 0.0) {
                let product = int8::product(rows, inner, h, part);
                for (y, product) in y.chunks_exact_mut(width).zip(product.chunks_exact(part.columns)) {
                    y[part.first..][..part.columns].iter_mut().zip(product).for_each(|(y, product)| *y += product);
                }
            }
            y
        }
    });
    for part in &parts {
        // Where there is no residual the product has begun with the bias.
        if let (Some(bias), true) = (&part.bias, residual.is_some() || few) {
            y.par_chunks_exact_mut(width).for_each(|row| {
                row[part.first..][..part.columns].iter_mut().zip(bias.values()).for_each(|(y, bias)| *y += bias);
            });
        }
    }
    if let (Some(residual), true) = (&residual, few) {
        y.iter_mut().zip(residual.values()).for_each(|(y, r)| *y += r);
    }
    f32_tensor(y, [rows, width])
}

fn backward(
    grad: &FlexTensor,
    x: FlexTensor,
    prologue: &Prologue<Flex>,
    projections: &[Projected<Flex>],
    need_dx: bool,
) -> LinearGrads<Flex> {
    let hidden = Hidden::new(&x, prologue);
    drop(x); // `hidden` alone holds it now, and may write over it
    let (parts, width) = parts(projections);
    let (rows, inner) = (hidden.x.count(), hidden.width);
    let sources = Sources::of(&parts, inner);
    let grad = Rows::of(grad);
    let g: Vec<Matrix> =
        parts.iter().map(|part| Matrix::new(&grad.values()[part.first.min(grad.len())..], width)).collect();
    let (u, adapters) = hidden.with(|h| Adapters::new(&parts, rows, inner).backward(h, &g));
    let dh = need_dx.then(|| {
        let left: Vec<Left> =
            parts.iter().zip(&g).map(|(part, g)| Left::new(rows, part.columns, Operand::new(g, Lanes::Rows))).collect();
        let low = u.matrices();
        let low = lefts(rows, &low, &parts);
        let mut terms = Vec::new();
        for i in 0..parts.len() {
            terms.push(Term { left: &left[i], right: Operand::new(&*sources.weights[i], Lanes::Columns) });
            if let (Some(left), Some((a, ..)), None) = (&low[i], &sources.factors[i], parts[i].path.dropout) {
                terms.push(Term { left, right: Operand::new(a, Lanes::Columns) });
            }
        }
        let mut dh = gemm::product(rows, inner, &[Job { first: 0, columns: inner, terms, start: Start::Zero }]);
        for (i, part) in parts.iter().enumerate() {
            if let (Some(left), Some((a, ..)), Some(dropout)) = (&low[i], &sources.factors[i], part.path.dropout) {
                let terms = vec![Term { left, right: Operand::new(a, Lanes::Columns) }];
                let through =
                    gemm::product(rows, inner, &[Job { first: 0, columns: inner, terms, start: Start::Zero }]);
                dh.par_iter_mut().zip(&through).enumerate().for_each(|(i, (dh, t))| *dh += dropout.factor(i) * t);
            }
        }
        dh
    });
    LinearGrads { dx: dh.map(|dh| hidden.backward(dh)), adapters }
}

impl LinearBodies for Flex {
    fn project_forward(
        x: FlexTensor,
        prologue: Prologue<Self>,
        projections: Vec<Projected<Self>>,
        residual: Option<FlexTensor>,
    ) -> FlexTensor {
        if !supported(&x, &prologue, &projections) || residual.as_ref().is_some_and(|r| r.dtype() != DType::F32) {
            return generic::forward::<Self>(x, prologue, projections, residual);
        }
        on_worker(move || forward(&x, &prologue, &projections, residual.as_ref()))
    }

    fn project_backward(
        grad: FlexTensor,
        x: FlexTensor,
        prologue: Prologue<Self>,
        projections: Vec<Projected<Self>>,
        need_dx: bool,
    ) -> LinearGrads<Self> {
        if !supported(&x, &prologue, &projections) || grad.dtype() != DType::F32 {
            return generic::backward::<Self>(grad, x, prologue, projections, need_dx);
        }
        on_worker(move || backward(&grad, x, &prologue, &projections, need_dx))
    }
}
