//! What holds for any weight.

mod common;

use common::{bits, le_bytes};
use emberlora_quant::{
    BlockSize, Codebook, FloatDtype, PackedWeight, Packer, QuantError, QuantKind, Scales, Scheme, UnknownBlockSize,
    pack, quantise_rows,
};
use proptest::collection::vec;
use proptest::prelude::*;

fn four_bit(kind: QuantKind, block_size: usize, double_quant: bool) -> Scheme {
    Scheme::new(kind, BlockSize::try_from(block_size).unwrap(), double_quant)
}

fn packed(shape: [usize; 2], values: &[f32], scheme: Scheme) -> PackedWeight {
    pack("weight", shape, FloatDtype::F32, &le_bytes(values), scheme).unwrap()
}

fn dequantised(weight: &PackedWeight) -> Vec<f32> {
    let mut out = vec![f32::NAN; weight.shape()[0] * weight.shape()[1]];
    weight.dequantise(0, &mut out);
    out
}

fn kinds() -> impl Strategy<Value = QuantKind> {
    prop_oneof![Just(QuantKind::Nf4), Just(QuantKind::Fp4), Just(QuantKind::Int8)]
}

fn schemes() -> impl Strategy<Value = Scheme> {
    let blocks = prop_oneof![Just(32usize), Just(64), Just(128), Just(256), Just(512)];
    (kinds(), blocks, any::<bool>()).prop_map(|(kind, block, double)| four_bit(kind, block, double))
}

/// Any finite numbers of any magnitudes, in any small shape.
fn weights(element: impl Strategy<Value = f32> + Clone) -> impl Strategy<Value = ([usize; 2], Vec<f32>)> {
    (1..12usize, 1..90usize).prop_flat_map(move |(rows, columns)| {
        vec(element.clone(), rows * columns).prop_map(move |values| ([rows, columns], values))
    })
}

/// Half the widest gap between neighbouring values.
fn widest_error(codebook: Codebook) -> f32 {
    let mut values = *codebook.values();
    values.sort_unstable_by(f32::total_cmp);
    values.windows(2).map(|pair| (pair[1] - pair[0]) / 2.0).fold(0.0, f32::max)
}

proptest! {
    #[test]
    fn the_error_of_a_round_trip_stays_below_half_the_widest_gap(
        (shape, values) in weights(-3.0f32..3.0), kind in kinds(), block in prop_oneof![Just(32usize), Just(64), Just(256)],
    ) {
        let weight = packed(shape, &values, four_bit(kind, block, false));
        let (size, bound) = match kind.codebook() {
            Some(codebook) => (block, widest_error(codebook)),
            // Half a step, and what rounding to f16 adds.
            None => (shape[1], 0.5 / 127.0 + 2f32.powi(-11)),
        };
        let round_trip = dequantised(&weight);
        for (block, found) in values.chunks(size).zip(round_trip.chunks(size)) {
            let largest = block.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            for (value, found) in block.iter().zip(found) {
                prop_assert!((value - found).abs() <= largest * bound * 1.000_01, "{value} became {found}");
            }
        }
    }

    #[test]
    fn the_error_of_double_quantisation_is_bounded_too((shape, values) in weights(-3.0f32..3.0), kind in kinds()) {
        let plain = packed(shape, &values, four_bit(kind, 32, false));
        let double = packed(shape, &values, four_bit(kind, 32, true));
        let (PackedWeight::FourBit(plain), PackedWeight::FourBit(double)) = (&plain, &double) else { return Ok(()) };
        prop_assert_eq!(plain.codes(), double.codes());
        let Scales::Double(scales) = double.scales() else { panic!("the scales are plain") };
        for block in 0..plain.scales().blocks() {
            // Half the widest gap of the dynamic map is 0.0070, half a bin of the search 0.000015.
            let bound = scales.absmax()[block / 256] * 0.0072 + 1e-6;
            let error = (plain.scales().get(block) - double.scales().get(block)).abs();
            prop_assert!(error <= bound, "block {block}: {error} above {bound}");
        }
    }

    #[test]
    fn packing_what_was_dequantised_changes_nothing(
        (shape, values) in weights(any::<f32>().prop_filter("finite", |v| v.is_finite())), block in prop_oneof![Just(32usize), Just(64)],
        kind in prop_oneof![Just(QuantKind::Nf4), Just(QuantKind::Fp4)],
    ) {
        let scheme = four_bit(kind, block, false);
        let once = dequantised(&packed(shape, &values, scheme));
        let twice = dequantised(&packed(shape, &once, scheme));
        prop_assert_eq!(once, twice);
    }

    #[test]
    fn packing_int8_again_changes_nothing((shape, values) in weights(-3.0f32..3.0)) {
        let once = packed(shape, &values, Scheme::Int8);
        let twice = packed(shape, &dequantised(&once), Scheme::Int8);
        prop_assert_eq!(once, twice);
    }

    #[test]
    fn any_finite_weight_is_packed_and_stays_finite(
        (shape, values) in weights(any::<f32>().prop_filter("finite", |v| v.is_finite())), scheme in schemes(),
    ) {
        match pack("weight", shape, FloatDtype::F32, &le_bytes(&values), scheme) {
            Ok(weight) => prop_assert!(dequantised(&weight).iter().all(|value| value.is_finite())),
            Err(QuantError::BeyondF16 { row, column, value, .. }) => {
                prop_assert_eq!(scheme, Scheme::Int8);
                prop_assert!(value.abs() >= 65504.0);
                prop_assert_eq!(values[row * shape[1] + column], value);
            }
            Err(QuantError::ScaleOverflow { largest, .. }) => prop_assert!(largest > f32::MAX / 100.0),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn any_range_is_dequantised_as_the_whole_is(
        (shape, values) in weights(-3.0f32..3.0), scheme in schemes(), ends in any::<(prop::sample::Index, prop::sample::Index)>(),
    ) {
        let weight = packed(shape, &values, scheme);
        let whole = dequantised(&weight);
        let ends = [ends.0.index(whole.len() + 1), ends.1.index(whole.len() + 1)];
        let (start, end) = (ends[0].min(ends[1]), ends[0].max(ends[1]));
        let mut part = vec![f32::NAN; end - start];
        weight.dequantise(start, &mut part);
        prop_assert_eq!(bits(&part), bits(&whole[start..end]));
    }

    #[test]
    fn what_is_not_finite_is_refused_by_name_and_place(
        (shape, mut values) in weights(-3.0f32..3.0), scheme in schemes(), at in any::<prop::sample::Index>(),
        bad in prop_oneof![Just(f32::NAN), Just(f32::INFINITY), Just(f32::NEG_INFINITY)],
    ) {
        let at = at.index(values.len());
        values[at] = bad;
        *values.last_mut().unwrap() = bad; // the first is reported
        let error = pack("layers.3.up_proj.weight", shape, FloatDtype::F32, &le_bytes(&values), scheme).unwrap_err();
        let QuantError::NotFinite { tensor, row, column, value } = error else { panic!("{error}") };
        prop_assert_eq!(tensor, "layers.3.up_proj.weight");
        prop_assert_eq!((row, column), (at / shape[1], at % shape[1]));
        prop_assert!(value == bad || value.is_nan() && bad.is_nan());
    }

    #[test]
    fn quantised_activations_leave_out_exactly_the_columns_with_outliers(
        values in vec(-10.0f32..10.0, 12 * 7), threshold in prop_oneof![Just(0.0f32), 1.0f32..12.0],
    ) {
        let rows = quantise_rows(&values, 7, threshold);
        for column in 0..7 {
            let largest = values.iter().skip(column).step_by(7).fold(0f32, |largest, value| largest.max(value.abs()));
            let clear = (largest - threshold).abs() > 0.01; // both are rounded to f16
            if threshold > 0.0 && clear {
                prop_assert_eq!(rows.outliers.contains(&column), largest > threshold);
            }
            if rows.outliers.contains(&column) {
                prop_assert!(rows.codes.iter().skip(column).step_by(7).all(|code| *code == 0));
            }
        }
        prop_assert!(threshold > 0.0 || rows.outliers.is_empty());
    }
}

/// Numbers from N(0, 1), by Box and Muller, from a fixed stream.
fn normal(count: usize) -> Vec<f32> {
    let mut state = 0u64;
    let mut uniform = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    let mut draw = || ((-2.0 * (1.0 - uniform()).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32;
    (0..count).map(|_| draw()).collect()
}

#[test]
fn the_mean_error_on_normal_weights_is_the_formats_own() {
    let values = normal(1 << 20);
    for (kind, expected) in [(QuantKind::Nf4, 0.0728), (QuantKind::Fp4, 0.0965)] {
        let found = dequantised(&packed([1024, 1024], &values, four_bit(kind, 64, false)));
        let error = values.iter().zip(&found).map(|(value, found)| f64::from((value - found).abs())).sum::<f64>();
        let error = error / values.len() as f64;
        assert!((error / expected - 1.0).abs() < 0.01, "{kind}: {error}, not {expected}");
    }
}

#[test]
fn a_weight_takes_four_and_a_half_bits_and_with_double_quantisation_four_and_an_eighth() {
    let values = vec![0.5; 1 << 20];
    let bits = |scheme| packed([1024, 1024], &values, scheme).bytes() as f64 * 8.0 / values.len() as f64;
    assert_eq!(bits(four_bit(QuantKind::Nf4, 64, false)), 4.5);
    // A scale of 8 bits per 64 elements, one of 32 bits per 64 · 256, and the offset.
    let double = 4.0 + 8.0 / 64.0 + 32.0 / (64.0 * 256.0) + 32.0 / f64::from(1 << 20);
    assert_eq!(bits(four_bit(QuantKind::Nf4, 64, true)), double);
    assert!((double - 4.127).abs() < 1e-3);
    assert_eq!(bits(Scheme::Int8), 8.0 + 32.0 / 1024.0);
}

#[test]
fn blocks_of_zeros_stay_zero() {
    for kind in [QuantKind::Nf4, QuantKind::Fp4, QuantKind::Int8] {
        let weight = packed([3, 37], &[0.0; 111], four_bit(kind, 64, false));
        assert!(dequantised(&weight).iter().all(|value| *value == 0.0), "{kind}");
    }
}

#[test]
fn a_scale_that_overflows_in_8_bits_is_refused_by_name_and_place() {
    let mut values = vec![0.25; 3 * 64];
    values[100] = f32::MAX;
    values[170] = f32::MAX * 0.3;
    assert!(dequantised(&packed([6, 32], &values, four_bit(QuantKind::Nf4, 64, false))).contains(&f32::MAX));
    let scheme = four_bit(QuantKind::Nf4, 64, true);
    let error = pack("weight", [6, 32], FloatDtype::F32, &le_bytes(&values), scheme).unwrap_err();
    let QuantError::ScaleOverflow { tensor, row, column, block_size, largest } = error else { panic!("{error}") };
    assert_eq!((tensor.as_str(), row, column, block_size, largest), ("weight", 2, 0, 64, f32::MAX));
}

#[test]
fn shapes_without_elements_or_beyond_memory_are_refused() {
    for shape in [[0, 4], [4, 0], [usize::MAX, 2], [usize::MAX / 2, 1]] {
        let error = Packer::new("weight", shape, FloatDtype::F32, Scheme::Int8).unwrap_err();
        assert_eq!(error, QuantError::Shape { tensor: "weight".into(), shape });
    }
}

#[test]
fn missing_and_surplus_bytes_are_refused() {
    for scheme in [four_bit(QuantKind::Nf4, 32, true), Scheme::Int8] {
        for found in [0, 319, 321, 384] {
            let error = pack("weight", [8, 20], FloatDtype::Bf16, &vec![0; found], scheme).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("`weight`") && text.contains("[8, 20]") && text.contains("320"), "{text}");
        }
    }
}

#[test]
fn only_bitsandbytes_block_sizes_exist() {
    for size in [0, 1, 16, 48, 63, 8192, 65536 + 64] {
        assert_eq!(BlockSize::try_from(size), Err(UnknownBlockSize(size)));
    }
}
