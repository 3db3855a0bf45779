use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, ExtensionType, TensorMetadata, backend_extension};
use burn::tensor::Shape;

use super::{AdapterPath, generic};
use crate::activation::Gate;
use crate::checkpoint::Values;
use crate::weight::{Weight, WeightOps};

/// A tensor that an operation may have or not.
#[derive(Clone, Debug, ExtensionType)]
pub enum Optional<B: Backend> {
    /// It has not.
    Absent,
    /// It has.
    Present(FloatTensor<B>),
}

impl<B: Backend> Optional<B> {
    /// The tensor.
    pub fn into_option(self) -> Option<FloatTensor<B>> {
        match self {
            Self::Absent => None,
            Self::Present(tensor) => Some(tensor),
        }
    }
}

/// The factors of an adapter.
#[derive(Clone, Debug, ExtensionType)]
pub enum LowRank<B: Backend> {
    /// There is no adapter.
    Absent,
    /// A `[r, K]` and B `[N, r]` of the input's dtype.
    Present {
        /// A.
        a: FloatTensor<B>,
        /// B.
        b: FloatTensor<B>,
    },
}

/// One projection of an input.
#[derive(Clone, Debug, ExtensionType)]
pub struct Projected<B: Backend> {
    /// W.
    #[extension_type]
    pub weight: Weight<B>,
    /// `[N]`.
    #[extension_type]
    pub bias: Optional<B>,
    /// A and B.
    #[extension_type]
    pub adapter: LowRank<B>,
    /// Scale and dropout of the adapter.
    pub path: AdapterPath,
}

/// The projections of one input.
#[derive(Clone, Debug, ExtensionType)]
pub enum Group<B: Backend> {
    /// One.
    One(#[extension_type] Projected<B>),
    /// Two, such as gate and up.
    Two(#[extension_type] Projected<B>, #[extension_type] Projected<B>),
    /// Three: query, key and value.
    Three(#[extension_type] Projected<B>, #[extension_type] Projected<B>, #[extension_type] Projected<B>),
}

impl<B: Backend> Group<B> {
    /// One to three projections.
    ///
    /// # Panics
    /// When there are none, or more.
    pub(super) fn of(projections: impl Iterator<Item = Projected<B>>) -> Self {
        let all: Vec<Projected<B>> = projections.collect();
        let count = all.len();
        let mut all = all.into_iter();
        match (all.next(), all.next(), all.next(), all.next()) {
            (Some(first), None, ..) => Self::One(first),
            (Some(first), Some(second), None, _) => Self::Two(first, second),
            (Some(first), Some(second), Some(third), None) => Self::Three(first, second, third),
            _ => panic!("project: expected one to three projections, found {count}"),
        }
    }

    /// In order.
    pub fn into_vec(self) -> Vec<Projected<B>> {
        match self {
            Self::One(first) => vec![first],
            Self::Two(first, second) => vec![first, second],
            Self::Three(first, second, third) => vec![first, second, third],
        }
    }
}

/// What leads from x to the input h of the projections.
#[derive(Clone, Debug, ExtensionType)]
pub enum Prologue<B: Backend> {
    /// h = x.
    Plain,
    /// h = w ⊙ x / rms(x).
    Normed {
        /// w, `[K]`.
        weight: FloatTensor<B>,
        /// Added to the mean square.
        eps: f32,
    },
    /// h = act(gate) ⊙ up, where x is gate and up side by side.
    Gated(Gate),
}

/// The gradients of a group.
#[derive(Debug)]
pub struct LinearGrads<B: Backend> {
    /// dx, where it was asked for.
    pub dx: Option<FloatTensor<B>>,
    /// (dA, dB) of each projection, where it has an adapter.
    pub adapters: Vec<Option<(FloatTensor<B>, FloatTensor<B>)>>,
}

/// Products with frozen weights, differentiable.
#[backend_extension(
    Autodiff,
    Flex: cfg(feature = "flex"),
    NdArray: cfg(feature = "ndarray"),
    Cube: cfg(any(feature = "wgpu", feature = "cuda")),
    Remote: cfg(feature = "remote")
)]
pub trait LinearOps: Backend {
    /// The outputs of the group side by side, `[M, Σ N_i]`, plus the residual; zeros where nobody reads them.
    fn project(
        x: FloatTensor<Self>,
        #[extension_type] prologue: Prologue<Self>,
        #[extension_type] group: Group<Self>,
        #[extension_type] residual: Optional<Self>,
        values: Values,
    ) -> FloatTensor<Self>;
}

/// The bodies on a backend without autodiff. The default ones run anywhere and are the reference for the others.
pub trait LinearBodies: WeightOps {
    /// See [`LinearOps::project`].
    fn project_forward(
        x: FloatTensor<Self>,
        prologue: Prologue<Self>,
        projections: Vec<Projected<Self>>,
        residual: Option<FloatTensor<Self>>,
    ) -> FloatTensor<Self> {
        generic::forward::<Self>(x, prologue, projections, residual)
    }

    /// The gradients for `grad`, that of the result. The residual's is `grad` itself.
    fn project_backward(
        grad: FloatTensor<Self>,
        x: FloatTensor<Self>,
        prologue: Prologue<Self>,
        projections: Vec<Projected<Self>>,
        need_dx: bool,
    ) -> LinearGrads<Self> {
        generic::backward::<Self>(grad, x, prologue, projections, need_dx)
    }
}

/// The result of [`LinearOps::project`].
pub(super) fn result_of<B: LinearBodies>(
    x: FloatTensor<B>,
    prologue: Prologue<B>,
    projections: Vec<Projected<B>>,
    residual: Option<FloatTensor<B>>,
    values: Values,
) -> FloatTensor<B> {
    match values {
        Values::Read => B::project_forward(x, prologue, projections, residual),
        Values::Unread => {
            let [rows, _] = x.shape().dims();
            let width = projections.iter().map(|projection| projection.weight.dims()[0]).sum();
            B::float_zeros(Shape::new([rows, width]), &x.device(), x.dtype().into())
        }
    }
}

macro_rules! plain_linear_ops {
    ($backend:ty) => {
        impl LinearOps for $backend {
            fn project(
                x: FloatTensor<Self>,
                prologue: Prologue<Self>,
                group: Group<Self>,
                residual: Optional<Self>,
                values: Values,
            ) -> FloatTensor<Self> {
                result_of::<Self>(x, prologue, group.into_vec(), residual.into_option(), values)
            }
        }
    };
}
#[cfg(feature = "flex")]
plain_linear_ops!(burn::backend::Flex);
#[cfg(feature = "ndarray")]
plain_linear_ops!(burn_ndarray::NdArray);
#[cfg(any(feature = "wgpu", feature = "cuda"))]
plain_linear_ops!(burn::backend::Cube);
#[cfg(feature = "remote")]
plain_linear_ops!(burn::backend::Remote);

crate::body::plain_backends!(LinearBodies);
