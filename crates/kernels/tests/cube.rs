//! The unpacking kernel of CubeCL's runtimes, on whatever adapter wgpu takes: a software one will do.
#![cfg(feature = "wgpu")]

mod support;

use burn::backend::Cube;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Device, DeviceKind, Tensor, TensorData};
use emberlora_kernels::checkpoint::Values;
use emberlora_kernels::{
    AdapterPath, FrozenWeight, Input, PackedFormat, PackedTensor, Projection, ProjectionAdapter, Weight, WeightOps,
    project, reference,
};
use emberlora_quant::{BlockSize, FloatDtype, PackedWeight, QuantKind, Scheme, pack};
use support::*;

fn device() -> Device {
    Device::wgpu(DeviceKind::DefaultDevice)
}

fn schemes() -> Vec<Scheme> {
    let four_bit = |kind, size: usize, double| Scheme::new(kind, BlockSize::try_from(size).unwrap(), double);
    vec![
        four_bit(QuantKind::Nf4, 64, false),
        four_bit(QuantKind::Nf4, 32, true),
        four_bit(QuantKind::Fp4, 64, true),
        four_bit(QuantKind::Fp4, 256, false),
        Scheme::Int8,
    ]
}

/// A weight of numbers that follow no pattern, a row of zeros among them.
fn packed([n, k]: [usize; 2], scheme: Scheme) -> PackedWeight {
    let numbers = (0..n * k).map(|i| if i / k == 2 { 0.0 } else { (i as f32 * 0.731).sin() * 0.1 + (i as f32).cos() });
    let bytes: Vec<u8> = numbers.flat_map(f32::to_le_bytes).collect();
    pack("w", [n, k], FloatDtype::F32, &bytes, scheme).unwrap()
}

fn dequantised(weight: &PackedWeight) -> Vec<f32> {
    let [n, k] = weight.shape();
    let mut out = vec![0.0; n * k];
    weight.dequantise(0, &mut out);
    out
}

fn primitive(weight: &PackedWeight) -> Weight<Cube> {
    let PackedTensor { codes, scale_codes, scales, format } = PackedTensor::upload(weight, 0.0, &device());
    let codes = codes.try_into_primitive::<Cube>().unwrap();
    let scales = scales.try_into_primitive::<Cube>().unwrap();
    match format {
        PackedFormat::Int8(format) => Weight::Int8 { codes, scales, format },
        PackedFormat::FourBit { format, nested: None } => Weight::FourBit { codes, scales, format },
        PackedFormat::FourBit { format, nested: Some(nested) } => {
            let scale_codes = scale_codes.unwrap().try_into_primitive::<Cube>().unwrap();
            Weight::FourBitDouble { codes, scale_codes, scales, format, nested }
        }
    }
}

/// Single elements, rows that are no whole words, blocks that straddle rows and end early, more scales than one nested
/// block has.
const SHAPES: [[usize; 2]; 8] = [[1, 1], [3, 5], [7, 33], [9, 10], [5, 24], [3, 100], [4, 64], [130, 65]];

#[test]
fn every_kind_unpacks_to_the_bits_that_it_was_packed_to() {
    for scheme in schemes() {
        for shape in SHAPES {
            let weight = packed(shape, scheme);
            let found = FrozenWeight::from(PackedTensor::upload(&weight, 0.0, &device())).dequantise();
            assert_eq!(found.dims(), shape);
            let bits = |numbers: Vec<f32>| numbers.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            assert_eq!(bits(values(&found)), bits(dequantised(&weight)), "{scheme} {shape:?}");
        }
    }
}

#[test]
fn the_default_body_unpacks_to_the_same_bits() {
    for scheme in schemes() {
        let weight = packed([7, 33], scheme);
        let found = reference::weight::dequantise::<Cube>(primitive(&weight), DType::F32);
        assert_eq!(values(&Tensor::<2>::from_primitive::<Cube>(found)), dequantised(&weight), "{scheme}");
    }
}

#[test]
fn halves_are_the_rounded_numbers() {
    assert!(device().supports_dtype(DType::F16), "this adapter has no f16");
    let wrap = Tensor::<2>::from_primitive::<Cube>;
    for scheme in schemes() {
        for shape in [[3, 5], [9, 10], [3, 100], [4, 64]] {
            let weight = primitive(&packed(shape, scheme));
            let expected = Cube::float_cast(Cube::dequantise(weight.clone(), DType::F32), DType::F16.into());
            let found = wrap(Cube::dequantise(weight, DType::F16));
            assert_eq!(found.dtype(), DType::F16);
            assert_eq!(values(&found), values(&wrap(expected)), "{scheme} {shape:?}");
        }
    }
}

#[test]
fn codes_of_eight_bits_are_numbers_with_their_sign() {
    for shape in SHAPES {
        let weight = packed(shape, Scheme::Int8);
        let PackedWeight::Int8(int8) = &weight else { unreachable!("packed as INT8") };
        let Weight::Int8 { codes, .. } = primitive(&weight) else { unreachable!("uploaded as INT8") };
        let found = values(&Tensor::<2>::from_primitive::<Cube>(Cube::int8_codes(codes, shape)));
        let expected: Vec<f32> = int8.codes().iter().map(|&code| code.into()).collect();
        assert_eq!(found, expected);
    }
}

/// y, dx, dA and dB of a projection with an adapter.
fn differentiate(weight: FrozenWeight, device: &Device) -> [Vec<f32>; 4] {
    let device = device.clone().autodiff();
    let ([n, k], r) = (weight.dims(), 3);
    let tensor = |shape: [usize; 2], step: f32| {
        let numbers: Vec<f32> = (0..shape[0] * shape[1]).map(|i| (i as f32 * step).sin()).collect();
        Tensor::<2>::from_data(TensorData::new(numbers, shape), &device).require_grad()
    };
    let (x, a, b) = (tensor([6, k], 0.37), tensor([r, k], 0.51), tensor([n, r], 0.23));
    let adapter = ProjectionAdapter { a: a.clone(), b: b.clone(), path: AdapterPath::new(0.7, None) };
    let projection = Projection { weight, bias: None, adapter: Some(adapter) };
    let y = project(x.clone(), Input::Plain, &[projection], None, Values::Read);
    let grads = probe(y.clone()).backward();
    let grad = |t: &Tensor<2>| values(&t.grad(&grads).unwrap());
    [values(&y), grad(&x), grad(&a), grad(&b)]
}

#[test]
fn projections_are_those_of_the_dequantised_weight() {
    for scheme in schemes() {
        let weight = packed([19, 45], scheme);
        let dense = Tensor::<2>::from_data(TensorData::new(dequantised(&weight), weight.shape()), &device());
        let expected = differentiate(dense.into(), &device());
        let found = differentiate(PackedTensor::upload(&weight, 0.0, &device()).into(), &device());
        assert_eq!(found, expected, "{scheme}");
    }
}

#[test]
#[cfg(feature = "flex")]
fn products_with_activations_in_eight_bits_are_those_of_the_cpu() {
    let weight = packed([19, 45], Scheme::Int8);
    let product = |device: &Device| {
        // Column 7 has outliers.
        let x = (0..6 * 45).map(|i| if i % 45 == 7 { 9.0 } else { (i as f32 * 0.37).sin() }).collect::<Vec<f32>>();
        let x = Tensor::<2>::from_data(TensorData::new(x, [6, 45]), device);
        emberlora_kernels::frozen_linear(x, PackedTensor::upload(&weight, 6.0, device))
    };
    let (expected, found) = (values(&product(&Device::flex())), values(&product(&device())));
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    assert!(expected.iter().zip(&found).all(|(a, b)| (a - b).abs() <= 2e-6 * largest), "{expected:?}\n{found:?}");
}
