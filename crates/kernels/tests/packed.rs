//! Products with packed weights against the same with the weights that they dequantise to.

mod support;

use burn::backend::Flex;
use burn::tensor::{DType, Device, Tensor, TensorData};
use emberlora_kernels::checkpoint::Values;
use emberlora_kernels::{
    AdapterPath, Dropout, FrozenWeight, Input, LinearBodies, LowRank, Optional, PackedTensor, Projected, Projection,
    ProjectionAdapter, Prologue, Weight, WeightOps, frozen_linear, linear_cross_entropy, project, reference,
};
use emberlora_quant::{BlockSize, FloatDtype, PackedWeight, QuantKind, Scheme, pack};
use proptest::prelude::*;
use support::*;

fn schemes() -> Vec<Scheme> {
    let block = |size: usize| BlockSize::try_from(size).unwrap();
    vec![
        Scheme::new(QuantKind::Nf4, block(64), false),
        Scheme::new(QuantKind::Nf4, block(32), true),
        Scheme::new(QuantKind::Fp4, block(64), true),
        Scheme::new(QuantKind::Fp4, block(128), false),
        Scheme::new(QuantKind::Int8, block(64), false),
    ]
}

fn packed(shape: [usize; 2], scheme: Scheme, device: &Device) -> PackedWeight {
    let weight = values(&normal(shape, 0.3, device));
    let bytes: Vec<u8> = weight.iter().flat_map(|value| value.to_le_bytes()).collect();
    pack("w", shape, FloatDtype::F32, &bytes, scheme).unwrap()
}

fn dequantised(weight: &PackedWeight) -> Vec<f32> {
    let [n, k] = weight.shape();
    let mut out = vec![0.0; n * k];
    weight.dequantise(0, &mut out);
    out
}

fn flex_weight(weight: &PackedWeight, threshold: f32) -> Weight<Flex> {
    let PackedTensor { codes, scale_codes, scales, format } = PackedTensor::upload(weight, threshold, &Device::flex());
    let codes = codes.try_into_primitive::<Flex>().unwrap();
    let scales = scales.try_into_primitive::<Flex>().unwrap();
    match format {
        emberlora_kernels::PackedFormat::Int8(format) => Weight::Int8 { codes, scales, format },
        emberlora_kernels::PackedFormat::FourBit { format, nested: None } => Weight::FourBit { codes, scales, format },
        emberlora_kernels::PackedFormat::FourBit { format, nested: Some(nested) } => {
            let scale_codes = scale_codes.unwrap().try_into_primitive::<Flex>().unwrap();
            Weight::FourBitDouble { codes, scale_codes, scales, format, nested }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_body_dequantises_to_the_same_bits(n in 1usize..9, k in 1usize..200, kind in 0usize..5, seed in 0u64..1000) {
        let device = Device::flex();
        device.seed(seed);
        let weight = packed([n, k], schemes()[kind], &device);
        let expected = dequantised(&weight);
        let wrap = Tensor::<2>::from_primitive::<Flex>;
        prop_assert_eq!(&values(&wrap(Flex::dequantise(flex_weight(&weight, 0.0), DType::F32))), &expected);
        prop_assert_eq!(&values(&wrap(reference::weight::dequantise::<Flex>(flex_weight(&weight, 0.0), DType::F32))), &expected);
    }
}

/// What meets two weights: x, A, B and the weight of x's norm. Drawn once, for all tests of a process draw from one stream.
struct Operands {
    x: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    norm: Tensor<1>,
}

impl Operands {
    fn new(rows: usize, [n, k]: [usize; 2]) -> Self {
        let device = Device::flex().autodiff();
        Self {
            x: normal([rows, k], 1.0, &device),
            a: normal([4, k], 0.1, &device),
            b: normal([n, 4], 0.1, &device),
            norm: normal([k], 1.0, &Device::flex()),
        }
    }
}

/// y, dx, dA and dB of two projections of a normed input.
fn differentiate(weights: &[FrozenWeight; 2], operands: &Operands, dropout: Option<Dropout>) -> [Vec<f32>; 4] {
    let Operands { x, a, b, norm } = operands;
    let (x, a, b, norm) = (leaf(x), leaf(a), leaf(b), norm.clone());
    let adapter = ProjectionAdapter { a: a.clone(), b: b.clone(), path: AdapterPath::new(0.7, dropout) };
    let [first, second] = weights.clone();
    let projections = [
        Projection { weight: first, bias: None, adapter: Some(adapter) },
        Projection { weight: second, bias: None, adapter: None },
    ];
    let y = project(x.clone(), Input::Normed { weight: norm, eps: 1e-5 }, &projections, None, Values::Read);
    let grads = probe(y.clone()).backward();
    let grad = |t: &Tensor<2>| values(&t.grad(&grads).unwrap());
    [values(&y), grad(&x), grad(&a), grad(&b)]
}

/// Calls `check` with what packed weights give and what their dequantised values give.
fn beside_dequantised(shapes: &[([usize; 2], usize)], check: impl Fn([Vec<f32>; 4], [Vec<f32>; 4], &str)) {
    let device = Device::flex();
    for &(shape, rows) in shapes {
        for scheme in schemes() {
            let weights = [packed(shape, scheme, &device), packed([20, shape[1]], scheme, &device)];
            let upload = |weight| FrozenWeight::from(PackedTensor::upload(weight, 0.0, &device));
            let dense = |weight: &PackedWeight| {
                let data = TensorData::new(dequantised(weight), weight.shape());
                FrozenWeight::from(Tensor::<2>::from_data(data, &device))
            };
            let dropout = (rows == 37).then(|| Dropout::new(0.3, 5));
            let operands = Operands::new(rows, shape);
            let expected = differentiate(&weights.each_ref().map(dense), &operands, dropout);
            let found = differentiate(&weights.each_ref().map(upload), &operands, dropout);
            check(found, expected, &format!("{scheme}, {rows} rows"));
        }
    }
}

#[test]
fn values_and_gradients_are_to_the_bit_those_of_the_dequantised_weights() {
    let shapes = [([70, 65], 1), ([70, 65], 3), ([33, 96], 37), ([300, 800], 60)];
    beside_dequantised(&shapes, |found, expected, what| assert_eq!(found, expected, "{what}"));
}

/// Many rows may be multiplied by a unit that takes fewer bits of packed weights than f32 has.
#[test]
fn values_and_gradients_of_many_rows_are_close_to_those_of_the_dequantised_weights() {
    beside_dequantised(&[([300, 800], 70), ([70, 65], 130)], |found, expected, what| {
        for (name, (found, expected)) in ["y", "dx", "da", "db"].iter().zip(found.iter().zip(&expected)) {
            let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
            let apart = square(&mut found.iter().zip(expected).map(|(f, e)| f - e));
            let relative = (apart / square(&mut expected.iter().copied())).sqrt();
            // The gradients begin with that of y cos y, which is steep where y is large.
            let allowed = if *name == "y" { 6e-6 } else { 6e-5 };
            assert!(relative < allowed, "{what}: {name} is {relative:.1e} away");
        }
    });
}

#[test]
fn a_packed_head_has_the_loss_of_the_dequantised_one() {
    let device = Device::flex().autodiff();
    for scheme in schemes() {
        let weight = packed([130, 48], scheme, &device);
        let hidden = normal([9, 48], 1.0, &device);
        let loss = |head: FrozenWeight| {
            let hidden = leaf(&hidden);
            let targets: Vec<i64> = (0..9).map(|i| i * 14).collect();
            let weights = Tensor::ones([9], &device);
            let loss = linear_cross_entropy(hidden.clone(), head, ints(&targets, [9], &device), weights);
            let grads = loss.clone().backward();
            (values(&loss), values(&hidden.grad(&grads).unwrap()))
        };
        let dense = FrozenWeight::from(PackedTensor::upload(&weight, 0.0, &device)).dequantise();
        assert_eq!(loss(PackedTensor::upload(&weight, 0.0, &device).into()), loss(dense.into()), "{scheme}");
    }
}

#[test]
fn activations_in_eight_bits_agree_between_bodies_and_keep_outliers_in_full_precision() {
    let device = Device::flex();
    device.seed(11);
    let (n, k) = (40, 70);
    let weight = packed([n, k], Scheme::Int8, &device);
    for rows in [1, 3, 20] {
        let mut x = normal([rows, k], 1.0, &device);
        let outlier = Tensor::full([rows, 1], 9.0, &device);
        x = x.slice_assign([0..rows, 7..8], outlier);
        let exact = frozen_linear(x.clone(), PackedTensor::upload(&weight, 0.0, &device));
        let projected = |threshold| Projected::<Flex> {
            weight: flex_weight(&weight, threshold),
            bias: Optional::Present(normal([n], 0.0, &device).try_into_primitive::<Flex>().unwrap()),
            adapter: LowRank::Absent,
            path: AdapterPath::new(1.0, None),
        };
        let raw = || x.clone().try_into_primitive::<Flex>().unwrap();
        let wrap = Tensor::<2>::from_primitive::<Flex>;
        let forward = |threshold| {
            let all = vec![projected(threshold)];
            let expected = wrap(reference::linear::forward::<Flex>(raw(), Prologue::Plain, all.clone(), None));
            let found = wrap(Flex::project_forward(raw(), Prologue::Plain, all, None));
            assert_close("y", &expected, &found, 2e-6);
            relative(&exact, &found)
        };
        // Without the column among the outliers its magnitude is what the codes of all others are counted in.
        let (with, without) = (forward(6.0), forward(100.0));
        assert!(with > 0.0 && with < 0.01 && without > 1.5 * with, "{rows} rows: {with:.2e}, {without:.2e}");
        let backward = |threshold| {
            let all = vec![projected(threshold)];
            let grad = Tensor::<2>::ones([rows, n], &device).try_into_primitive::<Flex>().unwrap();
            values(&wrap(Flex::project_backward(grad, raw(), Prologue::Plain, all, true).dx.unwrap()))
        };
        assert_eq!(backward(6.0), backward(0.0));
    }
}
