//! The CPU bodies against the default ones that run on every backend.

mod support;

use burn::backend::Flex;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Device, Tensor};
use emberlora_kernels::{
    AdapterPath, AttentionKind, AttentionOps, AttentionOptions, CrossEntropyOps, Dropout, Gate, GluOps, LinearOps,
    NormOps, RopeOps, reference,
};
use support::forest::Forest;
use support::*;

fn raw<const D: usize>(t: &Tensor<D>) -> FloatTensor<Flex> {
    t.clone().try_into_primitive::<Flex>().unwrap()
}

fn close<const D: usize>(name: &str, expected: FloatTensor<Flex>, found: FloatTensor<Flex>, tolerance: f32) {
    let wrap = Tensor::<D>::from_primitive::<Flex>;
    assert_close(name, &wrap(expected), &wrap(found), tolerance);
}

fn device() -> Device {
    let device = Device::flex();
    device.seed(7);
    device
}

#[test]
fn linear() {
    let device = device();
    let (x, w, g) = (normal([34, 48], 1.0, &device), normal([80, 48], 0.1, &device), normal([34, 80], 1.0, &device));
    let (a, b) = (normal([4, 48], 0.1, &device), normal([80, 4], 0.1, &device));
    for w in [w.clone(), w.clone().cast(DType::BF16), w.cast(DType::F16)] {
        close::<2>(
            "x Wᵀ",
            reference::linear::frozen::<Flex>(raw(&x), raw(&w)),
            Flex::frozen_linear(raw(&x), raw(&w)),
            2e-6,
        );
        close::<2>(
            "g W",
            reference::linear::frozen_backward::<Flex>(raw(&g), raw(&w)),
            Flex::frozen_linear_backward(raw(&g), raw(&w)),
            2e-6,
        );
        for dropout in [None, Some(Dropout::new(0.5, 9))] {
            let path = AdapterPath::new(0.7, dropout);
            close::<2>(
                "y",
                reference::linear::lora::<Flex>(raw(&x), raw(&w), raw(&a), raw(&b), path),
                Flex::lora_linear(raw(&x), raw(&w), raw(&a), raw(&b), path),
                2e-6,
            );
            let expected =
                reference::linear::lora_backward::<Flex>(raw(&g), raw(&x), raw(&w), raw(&a), raw(&b), path, true);
            let found = Flex::lora_linear_backward(raw(&g), raw(&x), raw(&w), raw(&a), raw(&b), path, true);
            close::<2>("dx", expected.0.unwrap(), found.0.unwrap(), 2e-6);
            close::<2>("dA", expected.1, found.1, 2e-6);
            close::<2>("dB", expected.2, found.2, 2e-6);
        }
    }
}

#[test]
fn a_weight_of_several_panels() {
    let device = device();
    let (x, w) = (normal([3, 1030], 1.0, &device), normal([700, 1030], 0.1, &device).cast(DType::BF16));
    let g = normal([3, 700], 1.0, &device);
    close::<2>(
        "x Wᵀ",
        reference::linear::frozen::<Flex>(raw(&x), raw(&w)),
        Flex::frozen_linear(raw(&x), raw(&w)),
        3e-6,
    );
    close::<2>(
        "g W",
        reference::linear::frozen_backward::<Flex>(raw(&g), raw(&w)),
        Flex::frozen_linear_backward(raw(&g), raw(&w)),
        3e-6,
    );
}

#[test]
fn a_single_row_as_generation_has_it() {
    let device = device();
    let (x, w) = (normal([1, 83], 1.0, &device), normal([200, 83], 0.1, &device).cast(DType::BF16));
    close::<2>(
        "x Wᵀ",
        reference::linear::frozen::<Flex>(raw(&x), raw(&w)),
        Flex::frozen_linear(raw(&x), raw(&w)),
        3e-6,
    );
}

#[test]
fn norm() {
    let device = device();
    let (x, w, g) = (normal([9, 37], 2.0, &device), normal([37], 1.0, &device), normal([9, 37], 1.0, &device));
    let expected = reference::norm::forward::<Flex>(raw(&x), raw(&w), 1e-5);
    let found = Flex::rms_norm_with_factor(raw(&x), raw(&w), 1e-5);
    close::<2>("y", expected.0, found.0, 2e-6);
    close::<2>("factor", expected.1.clone(), found.1.clone(), 2e-6);
    close::<2>(
        "dx",
        reference::norm::backward::<Flex>(raw(&g), raw(&x), raw(&w), expected.1),
        Flex::rms_norm_backward(raw(&g), raw(&x), raw(&w), found.1),
        3e-6,
    );
}

#[test]
fn gated_activation() {
    let device = device();
    let tensor = |std| normal([5, 7, 11], std, &device);
    let (gate, up, g) = (tensor(4.0), tensor(1.0), tensor(1.0));
    close::<3>(
        "y",
        reference::activation::forward::<Flex>(raw(&gate), raw(&up), Gate::Silu),
        Flex::glu(raw(&gate), raw(&up), Gate::Silu),
        2e-6,
    );
    let expected = reference::activation::backward::<Flex>(raw(&g), raw(&gate), raw(&up), Gate::Silu);
    let found = Flex::glu_backward(raw(&g), raw(&gate), raw(&up), Gate::Silu);
    close::<3>("dgate", expected.0, found.0, 3e-6);
    close::<3>("dup", expected.1, found.1, 3e-6);
}

#[test]
fn rotary_embedding() {
    let device = device();
    let x = normal([2, 5, 3, 8], 1.0, &device);
    for half in [4, 2] {
        let angles = normal([2, 5, half], 2.0, &device);
        let (cos, sin) = (angles.clone().cos(), angles.sin());
        close::<4>(
            "y",
            reference::rope::rope::<Flex>(raw(&x), raw(&cos), raw(&sin)),
            Flex::rope(raw(&x), raw(&cos), raw(&sin)),
            1e-6,
        );
    }
}

/// A trunk of 90 tokens with branches of 70 and 45 at it and in it, and a document behind them.
fn tree_of_several_blocks() -> Forest {
    let mut steps = vec![0; 300];
    steps[160] = 70;
    steps[205] = 60;
    steps[280] = 1000;
    Forest::from_steps(&steps)
}

#[test]
fn attention_over_many_blocks_and_tiles() {
    let device = device();
    for (heads, kv_heads, forest) in [
        (4, 2, Forest::documents(&[70, 70, 10])),
        (6, 2, tree_of_several_blocks()),
        (1, 1, Forest::chain(700)),
        // More scores than the default body forms at a time.
        (8, 8, Forest::chain(760)),
    ] {
        let (batch, seq, dim) = (2, forest.len(), 8);
        let tensor = |heads| normal([batch, seq, heads, dim], 1.0, &device);
        let (q, k, v, g) = (tensor(heads), tensor(kv_heads), tensor(kv_heads), tensor(heads));
        let spans = ints(&forest.spans().repeat(batch), [batch, seq, 2], &device);
        let spans = || -> IntTensor<Flex> { spans.clone().try_into_primitive::<Flex>().unwrap() };
        for window in [None, Some(40)] {
            let options = AttentionOptions::new(0.3, window, AttentionKind::Fused);
            let (out, lse) = reference::attention::forward::<Flex>(raw(&q), raw(&k), raw(&v), spans(), options);
            let found = Flex::packed_attention_with_lse(raw(&q), raw(&k), raw(&v), spans(), options);
            close::<4>("O", out.clone(), found.0, 2e-6);
            close::<4>("lse", lse.clone(), found.1, 2e-6);
            let expected = reference::attention::backward::<Flex>(
                raw(&g),
                raw(&q),
                raw(&k),
                raw(&v),
                out.clone(),
                lse.clone(),
                spans(),
                options,
            );
            let found = Flex::packed_attention_backward(raw(&g), raw(&q), raw(&k), raw(&v), out, lse, spans(), options);
            close::<4>("dQ", expected.0, found.0, 3e-6);
            close::<4>("dK", expected.1, found.1, 3e-6);
            close::<4>("dV", expected.2, found.2, 3e-6);
        }
    }
}

#[test]
fn loss_over_rows_of_logits() {
    let device = device();
    let logits = normal([5, 103], 3.0, &device);
    let weights = Tensor::<2>::random([5, 1], burn::tensor::Distribution::Uniform(0.1, 1.0), &device);
    let targets = ints(&[0, 102, 7, 50, 3], [5, 1], &device);
    let targets = || -> IntTensor<Flex> { targets.clone().try_into_primitive::<Flex>().unwrap() };
    for with_grad in [true, false] {
        let expected =
            reference::cross_entropy::weighted_nll::<Flex>(raw(&logits), targets(), raw(&weights), with_grad);
        let found = Flex::weighted_nll(raw(&logits), targets(), raw(&weights), with_grad);
        close::<1>("loss", expected.0, found.0, 2e-6);
        match (expected.1, found.1) {
            (Some(expected), Some(found)) => close::<2>("gradient", expected, found, 2e-6),
            (expected, found) => assert!(expected.is_none() && found.is_none()),
        }
    }
}

#[test]
fn views_that_run_backwards_and_empty_inputs() {
    let device = device();
    let (x, w, g) = (normal([3, 8], 1.0, &device), normal([6, 8], 1.0, &device), normal([3, 6], 1.0, &device));
    let flipped = w.clone().flip([0]);
    close::<2>(
        "x Wᵀ",
        reference::linear::frozen::<Flex>(raw(&x), raw(&flipped)),
        Flex::frozen_linear(raw(&x), raw(&flipped)),
        2e-6,
    );
    close::<2>(
        "g W",
        reference::linear::frozen_backward::<Flex>(raw(&g), raw(&flipped)),
        Flex::frozen_linear_backward(raw(&g), raw(&flipped)),
        2e-6,
    );
    let (none, wide) = (Tensor::<2>::zeros([0, 600], &device), normal([600, 600], 1.0, &device).cast(DType::BF16));
    let dx = Tensor::<2>::from_primitive::<Flex>(Flex::frozen_linear_backward(raw(&none), raw(&wide)));
    assert_eq!(dx.dims(), [0, 600]);
}
