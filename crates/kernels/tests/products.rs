//! The CPU's products against the default bodies, which run on every backend.

mod support;

use burn::backend::Flex;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Device, Distribution, Tensor};
use emberlora_kernels::{
    AdapterPath, CrossEntropyBodies, Dropout, Gate, LinearBodies, LowRank, Optional, Projected, Prologue, Weight,
    reference,
};
use support::*;

fn raw<const D: usize>(t: &Tensor<D>) -> FloatTensor<Flex> {
    t.clone().try_into_primitive::<Flex>().unwrap()
}

fn close(name: &str, expected: FloatTensor<Flex>, found: FloatTensor<Flex>) {
    let wrap = Tensor::<2>::from_primitive::<Flex>;
    assert_close(name, &wrap(expected), &wrap(found), 4e-6);
}

fn device() -> Device {
    let device = Device::flex();
    device.seed(7);
    device
}

/// Projections of an input of `k` columns to each of `widths`; every second one without an adapter where `mixed`.
fn projections(
    k: usize,
    widths: &[usize],
    dtype: DType,
    dropout: Option<Dropout>,
    mixed: bool,
    device: &Device,
) -> Vec<Projected<Flex>> {
    let one = |(i, &n): (usize, &usize)| {
        let rank = 4 + i;
        let adapter = match mixed && i % 2 == 1 {
            true => LowRank::Absent,
            false => {
                LowRank::Present { a: raw(&normal([rank, k], 0.1, device)), b: raw(&normal([n, rank], 0.1, device)) }
            }
        };
        let bias = if i % 2 == 0 { Optional::Present(raw(&normal([n], 1.0, device))) } else { Optional::Absent };
        let dropout = dropout.map(|d| Dropout::new(d.p, d.seed + i as u64));
        Projected {
            weight: Weight::Dense(raw(&normal([n, k], 0.1, device).cast(dtype))),
            bias,
            adapter,
            path: AdapterPath::new(0.7, dropout),
        }
    };
    widths.iter().enumerate().map(one).collect()
}

fn check(x: &Tensor<2>, prologue: &Prologue<Flex>, projections: &[Projected<Flex>], with_residual: bool) {
    let ([rows, _], device) = (x.dims(), x.device());
    let width: usize = projections.iter().map(|p| p.weight.dims()[0]).sum();
    let (grad, residual) = (normal([rows, width], 1.0, &device), normal([rows, width], 1.0, &device));
    let residual = || with_residual.then(|| raw(&residual));
    close(
        "y",
        reference::linear::forward::<Flex>(raw(x), prologue.clone(), projections.to_vec(), residual()),
        Flex::project_forward(raw(x), prologue.clone(), projections.to_vec(), residual()),
    );
    for need_dx in [true, false] {
        let arguments = || (raw(&grad), raw(x), prologue.clone(), projections.to_vec(), need_dx);
        let (g, h, p, all, need) = arguments();
        let expected = reference::linear::backward::<Flex>(g, h, p, all, need);
        let (g, h, p, all, need) = arguments();
        let found = Flex::project_backward(g, h, p, all, need);
        match (expected.dx, found.dx) {
            (Some(expected), Some(found)) => close("dx", expected, found),
            (expected, found) => assert!(!need_dx && expected.is_none() && found.is_none()),
        }
        assert_eq!(expected.adapters.len(), found.adapters.len());
        for (expected, found) in expected.adapters.into_iter().zip(found.adapters) {
            match (expected, found) {
                (Some((da, db)), Some((found_da, found_db))) => {
                    close("dA", da, found_da);
                    close("dB", db, found_db);
                }
                (expected, found) => assert!(expected.is_none() && found.is_none(), "an adapter without a gradient"),
            }
        }
    }
}

#[test]
fn groups_of_projections() {
    let device = device();
    let k = 48;
    let normed = Prologue::Normed { weight: raw(&normal([k], 1.0, &device)), eps: 1e-5 };
    let gated = [Gate::Silu, Gate::Gelu, Gate::GeluTanh].map(|gate| (Prologue::Gated(gate), 2 * k));
    for (prologue, columns) in [(Prologue::Plain, k), (normed, k)].into_iter().chain(gated) {
        for rows in [1, 3, 34] {
            let x = normal([rows, columns], 1.0, &device);
            for widths in [&[80][..], &[33, 70], &[24, 8, 16]] {
                for dropout in [None, Some(Dropout::new(0.5, 9))] {
                    let dtype = [DType::F32, DType::BF16, DType::F16][widths.len() - 1];
                    let projections = projections(k, widths, dtype, dropout, rows == 3, &device);
                    check(&x, &prologue, &projections, rows != 3);
                }
            }
        }
    }
}

#[test]
fn weights_of_many_tiles() {
    let device = device();
    let x = normal([150, 1700], 1.0, &device);
    check(&x, &Prologue::Plain, &projections(1700, &[130, 260], DType::BF16, None, false, &device), true);
}

#[test]
fn formats_without_a_body_of_their_own_take_the_default_one() {
    let device = device();
    let x = normal([9, 32], 1.0, &device);
    check(&x, &Prologue::Plain, &projections(32, &[8], DType::F64, None, false, &device), false);
}

#[test]
fn weights_that_are_views_and_inputs_without_rows() {
    let device = device();
    let w = normal([6, 8], 1.0, &device);
    for weight in [w.clone().flip([0]), w.transpose().reshape([6, 8]), normal([8, 6], 1.0, &device).transpose()] {
        let projected = Projected {
            weight: Weight::Dense(raw(&weight)),
            bias: Optional::Absent,
            adapter: LowRank::Absent,
            path: AdapterPath::new(1.0, None),
        };
        for rows in [0, 3, 9] {
            let x = normal([rows, 8], 1.0, &device);
            let found = Flex::project_forward(raw(&x), Prologue::Plain, vec![projected.clone()], None);
            assert_eq!(Tensor::<2>::from_primitive::<Flex>(found).dims(), [rows, 6]);
            if rows > 0 {
                check(&x, &Prologue::Plain, std::slice::from_ref(&projected), false);
            }
        }
    }
}

/// Sums are added up in memory that an earlier product has used.
#[test]
fn no_rows_leave_gradients_of_adapters_at_zero() {
    let device = device();
    let projections = projections(32, &[8, 24], DType::F32, None, false, &device);
    let backward = |rows| {
        let (grad, x) = (normal([rows, 32], 1.0, &device), normal([rows, 32], 1.0, &device));
        Flex::project_backward(raw(&grad), raw(&x), Prologue::Plain, projections.clone(), false).adapters
    };
    let largest = |gradient| Tensor::<2>::from_primitive::<Flex>(gradient).abs().max().into_scalar::<f32>();
    for (rows, are_zero) in [(9, false), (0, true)] {
        for (da, db) in backward(rows).into_iter().flatten() {
            assert_eq!([largest(da) == 0.0, largest(db) == 0.0], [are_zero; 2], "{rows} rows");
        }
    }
}

#[test]
fn head_and_loss_in_chunks() {
    let device = device();
    let (rows, width, vocabulary) = (11, 24, 7000);
    let hidden = normal([rows, width], 1.0, &device);
    let weights = Tensor::<1>::random([rows], Distribution::Uniform(0.1, 1.0), &device);
    let targets: Vec<i64> = (0..rows as i64).map(|i| i * 631 % vocabulary as i64).collect();
    let targets = ints(&targets, [rows], &device);
    let targets = || -> IntTensor<Flex> { targets.clone().try_into_primitive::<Flex>().unwrap() };
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let head = normal([vocabulary, width], 0.5, &device).cast(dtype);
        for (with_grad, chunk) in [(true, 4), (true, 11), (false, 3)] {
            let arguments = || (raw(&hidden), Weight::Dense(raw(&head)), targets(), raw(&weights), with_grad, chunk);
            let (h, w, t, s, g, c) = arguments();
            let expected = reference::cross_entropy::head_loss::<Flex>(h, w, t, s, g, c);
            let (h, w, t, s, g, c) = arguments();
            let found = Flex::head_loss(h, w, t, s, g, c);
            let wrap = Tensor::<1>::from_primitive::<Flex>;
            assert_close("loss", &wrap(expected.0), &wrap(found.0), 2e-6);
            match (expected.1, found.1) {
                (Some(expected), Some(found)) => close("dhidden", expected, found),
                (expected, found) => assert!(!with_grad && expected.is_none() && found.is_none()),
            }
        }
    }
}
