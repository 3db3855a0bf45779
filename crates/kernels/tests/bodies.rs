//! The CPU bodies against the default ones that run on every backend.

mod support;

use burn::backend::Flex;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{Device, Tensor};
use emberlora_kernels::{
    AttentionKind, AttentionOps, AttentionOptions, Gate, GluOps, HeadLayout, NormOps, Norms, QkvBodies, QkvContext,
    RopeOps, RotaryTables, reference,
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
fn attention_on_projected_rows() {
    let device = device();
    let forest = tree_of_several_blocks();
    let (batch, seq, layout) = (2, forest.len(), HeadLayout::new(4, 2, 8));
    let (qkv, g) = (normal([batch, seq, layout.width()], 1.0, &device), normal([batch, seq, 32], 1.0, &device));
    let angles = normal([batch, seq, 4], 2.0, &device);
    let spans = ints(&forest.spans().repeat(batch), [batch, seq, 2], &device);
    let norms = |q: usize, k: usize| Norms::Present {
        q: raw(&normal([q], 1.0, &device)),
        k: raw(&normal([k], 1.0, &device)),
        eps: 1e-5,
    };
    for norms in [Norms::Absent, norms(8, 8), norms(32, 16)] {
        let context = QkvContext::<Flex> {
            norms,
            tables: RotaryTables { cos: raw(&angles.clone().cos()), sin: raw(&angles.clone().sin()) },
            spans: spans.clone().try_into_primitive::<Flex>().unwrap(),
            layout,
            options: AttentionOptions::new(0.3, Some(40), AttentionKind::Fused),
        };
        let (out, lse) = reference::qkv::forward::<Flex>(raw(&qkv), &context);
        let found = Flex::qkv_forward(raw(&qkv), &context);
        close::<3>("O", out.clone(), found.0, 3e-6);
        close::<4>("lse", lse.clone(), found.1, 3e-6);
        let expected = reference::qkv::backward::<Flex>(raw(&g), raw(&qkv), out.clone(), lse.clone(), &context);
        close::<3>("dqkv", expected, Flex::qkv_backward(raw(&g), raw(&qkv), out, lse, &context), 4e-6);
    }
}
