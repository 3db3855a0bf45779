//! A module and a closure as a [`Segment`].

use burn::backend::DispatchTensor;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, Device, GradientCheckpointingStrategy, Gradients, Int, Tensor};

use super::ops::{Segment, SegmentGrads};
use super::{Values, backward_with};

#[derive(derive_new::new)]
pub(super) struct ModuleSegment<M, F, const D: usize, const E: usize> {
    /// Handles on the parameters, no copy.
    module: M,
    f: F,
}

/// How the second run is recorded: it is short-lived, so nothing in it is computed a third time.
const STRATEGY: GradientCheckpointingStrategy = GradientCheckpointingStrategy::Disabled;

impl<M, F, const D: usize, const E: usize> Segment for ModuleSegment<M, F, D, E>
where
    M: Module + Sync + 'static,
    F: Fn(&M, Tensor<D>, Values) -> Tensor<E> + Send + Sync + 'static,
{
    fn forward_plain(&self, x: DispatchTensor) -> DispatchTensor {
        let module = self.module.clone().map(&mut Untracked);
        let y = (self.f)(&module, Tensor::from_dispatch(x), Values::Read);
        // Everything that went in was untracked, so what comes out tracked was captured: its gradient would be lost
        // and the second run would wait for the outer graph's lock for ever.
        assert!(!y.is_tracked(), "checkpoint: the closure captured a tracked tensor; pass it through the module or x");
        y.inner().into_dispatch()
    }

    fn trainable(&self) -> Vec<(ParamId, DispatchTensor)> {
        trainable_of(&self.module)
    }

    fn recompute(&self, x: DispatchTensor, grad: DispatchTensor, need_x: bool) -> SegmentGrads {
        let mut leaves = FreshLeaves { taken: Vec::new() };
        let module = self.module.clone().map(&mut leaves);
        let x = Tensor::<D>::from_dispatch(x).autodiff().with_gradient_checkpointing_strategy(STRATEGY);
        let x = if need_x { x.require_grad() } else { x };
        let y = (self.f)(&module, x.clone(), Values::Unread);
        drop(module);
        let mut grads = backward_with(y, Tensor::<E>::from_dispatch(grad));
        SegmentGrads {
            x: need_x.then(|| x.grad_remove(&mut grads)).flatten().map(|g| g.into_dispatch()),
            params: leaves.taken.into_iter().filter_map(|(id, take)| Some((id, take(&mut grads)?))).collect(),
        }
    }
}

/// The trainable parameters of `module`.
pub(super) fn trainable_of<M: Module>(module: &M) -> Vec<(ParamId, DispatchTensor)> {
    struct Trainable(Vec<(ParamId, DispatchTensor)>);
    impl ModuleVisitor for Trainable {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let tensor = param.base();
            if tensor.is_require_grad() {
                self.0.push((param.id, tensor.into_dispatch()));
            }
        }
    }
    let mut visitor = Trainable(Vec::new());
    module.visit(&mut visitor);
    visitor.0
}

/// The device of a tensor of unknown rank.
pub(super) fn device_of(tensor: &DispatchTensor) -> Device {
    // A dispatch tensor carries no rank, so any will do for asking for the device.
    Tensor::<1>::from_dispatch(tensor.clone()).device()
}

/// Maps every parameter to a plain tensor.
struct Untracked;

impl ModuleMapper for Untracked {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(Tensor::inner)
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        param.map(Tensor::inner)
    }

    fn map_bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        param.map(Tensor::inner)
    }
}

type TakeGrad = Box<dyn FnOnce(&mut Gradients) -> Option<DispatchTensor>>;

/// Maps trainable parameters to fresh leaves, which form a graph of their own, and frozen ones to plain tensors.
struct FreshLeaves {
    taken: Vec<(ParamId, TakeGrad)>,
}

impl ModuleMapper for FreshLeaves {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, taken) = (param.id, &mut self.taken);
        param.map(|tensor| {
            if !tensor.is_require_grad() {
                return tensor.inner();
            }
            let leaf = tensor.inner().autodiff().with_gradient_checkpointing_strategy(STRATEGY).require_grad();
            let handle = leaf.clone();
            let take: TakeGrad = Box::new(move |grads| handle.grad_remove(grads).map(Tensor::into_dispatch));
            taken.push((id, take));
            leaf
        })
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        param.map(Tensor::inner)
    }

    fn map_bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        param.map(Tensor::inner)
    }
}
