//! The optimizer's update: against numbers of PyTorch, against its definition, and where it happens.

mod support;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Device, Tensor};
use emberlora_kernels::{AdamWOps, AdamWStep, adamw, reference, sum_squares, undo_adamw};
use proptest::prelude::*;
use support::*;

fn step(update: i32) -> AdamWStep {
    AdamWStep { learning_rate: 0.1, betas: [0.9, 0.99], eps: 1e-3, weight_decay: 0.2, update }
}

/// A gradient that is not clipped.
fn whole(device: &Device) -> Tensor<1> {
    row(&[1.0], device)
}

fn row(values: &[f32], device: &Device) -> Tensor<1> {
    Tensor::from_floats(values, device)
}

fn raw<const D: usize>(t: &Tensor<D>) -> FlexTensor {
    t.clone().try_into_primitive::<Flex>().unwrap()
}

/// `torch.optim.AdamW([p], lr=0.1, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.2)` of PyTorch 2.15, three steps with the
/// gradients `g`, `-2 g` and `0.5 g`.
#[test]
fn three_updates_give_what_pytorch_gives() {
    let device = Device::flex();
    let g = [0.5f32, -1.0, 0.001, 0.0];
    let mut state = (row(&[1.0, -2.0, 0.25, 3.0], &device), [row(&[0.0; 4], &device), row(&[0.0; 4], &device)]);
    for (update, factor) in [1.0f32, -2.0, 0.5].into_iter().enumerate() {
        let (p, moments) = state;
        state = adamw(p, row(&g.map(|g| g * factor), &device), moments, whole(&device), step(update as i32 + 1));
        for (found, expected) in values(&state.0).iter().zip(TORCH[update]) {
            assert!((found - expected).abs() < 3e-7, "update {}: {found}, expected {expected}", update + 1);
        }
    }
}

const TORCH: [[f32; 4]; 3] = [
    [0.880_199_6, -1.860_099_9, 0.195_000_01, 2.94],
    [0.899_110_26, -1.859_435_6, 0.213_509_26, 2.881_2],
    [0.894_785_46, -1.835_914_6, 0.217_026_28, 2.823_576_2],
];

#[test]
fn the_cpu_changes_parameter_and_moments_where_they_lie() {
    let device = Device::flex();
    for n in [3, 40_000] {
        let random = || normal([n], 1.0, &device);
        let [p, g, m, v] =
            [random(), random(), random(), random().abs()].map(|t| t.try_into_primitive::<Flex>().unwrap());
        let place = |t: &FlexTensor| t.storage::<f32>().as_ptr();
        let places = [&p, &m, &v].map(place);
        let (p, m, v) = Flex::adamw(p, g, m, v, raw(&whole(&device)), step(1));
        assert_eq!([&p, &m, &v].map(place), places);
    }
}

#[test]
fn a_parameter_that_somebody_else_holds_keeps_its_value_there() {
    let device = Device::flex();
    let p = row(&[1.0, 2.0], &device);
    let zeros = || row(&[0.0; 2], &device);
    let (updated, _) = adamw(p.clone(), row(&[1.0, 1.0], &device), [zeros(), zeros()], whole(&device), step(1));
    assert_eq!(values(&p), [1.0, 2.0]);
    assert_ne!(values(&updated), [1.0, 2.0]);
}

#[test]
fn a_negative_factor_leaves_everything_as_it_is() {
    let device = Device::flex();
    for gradient in [1.0, f32::NAN, f32::INFINITY] {
        let (p, g) = (row(&[1.0, 2.0], &device), row(&[gradient, 1.0], &device));
        let (m, v) = (row(&[0.5, -0.5], &device), row(&[0.25, 0.5], &device));
        let arguments = || (raw(&p), raw(&g), raw(&m), raw(&v), raw(&row(&[-1.0], &device)));
        let (a, b, c, d, e) = arguments();
        let own = Flex::adamw(a, b, c, d, e, step(1));
        let (a, b, c, d, e) = arguments();
        let default = reference::adamw::adamw::<Flex>(a, b, c, d, e, step(1));
        for found in [own, default] {
            let found = [found.0, found.1, found.2].map(|t| values(&Tensor::<1>::from_primitive::<Flex>(t)));
            assert_eq!(found, [values(&p), values(&m), values(&v)]);
        }
    }
}

#[test]
fn the_sum_of_squares_covers_every_element_and_every_format() {
    let device = Device::flex();
    for n in [1, 100, 16_384, 16_385, 50_000] {
        let x = Tensor::<1>::ones([n], &device) * 2.0;
        assert_eq!(values(&sum_squares(x.clone())), [4.0 * n as f32]);
        assert_eq!(values(&sum_squares(x.cast(DType::BF16))), [4.0 * n as f32]);
    }
    let infinite = row(&[1.0, f32::INFINITY], &device);
    assert_eq!(values(&sum_squares(infinite)), [f32::INFINITY]);
    assert!(values(&sum_squares(row(&[f32::NAN, 1.0], &device)))[0].is_nan());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn bodies_agree_and_an_update_can_be_undone(
        seed in 0u64..1000,
        n in 1usize..40,
        update in 1i32..1000,
        learning_rate in 1e-6f64..0.1,
        weight_decay in 0.0f64..1.0,
        gradient_factor in 0.01f32..=1.0,
    ) {
        let device = Device::flex();
        device.seed(seed);
        let (step, factor) = (AdamWStep { learning_rate, weight_decay, ..step(update) }, row(&[gradient_factor], &device));
        let [p, g, m] = [(); 3].map(|()| normal([n, 3], 1.0, &device));
        // A transposed view has its elements in another order than its storage.
        let g = g.reshape([3, n]).transpose();
        let v = normal([n, 3], 1.0, &device).square();
        let expected = reference::adamw::adamw::<Flex>(raw(&p), raw(&g), raw(&m), raw(&v), raw(&factor), step);
        let (found, moments) = adamw(p.clone(), g, [m, v], factor, step);
        let wrap = |t: FlexTensor| Tensor::<2>::from_primitive::<Flex>(t);
        prop_assert!(relative(&wrap(expected.0), &found) < 1e-6);
        prop_assert!(relative(&wrap(expected.1), &moments[0]) < 1e-6);
        prop_assert!(relative(&wrap(expected.2), &moments[1]) < 1e-6);
        prop_assert!(relative(&p, &undo_adamw(found, moments, step)) < 1e-6);
    }
}
