//! Packed bytes, scales and dequantised values are those of bitsandbytes, bit for bit.

mod common;

use common::{bits, bytes, floats, golden, le_bytes, matrix, tensors};
use emberlora_quant::{
    BlockSize, Codebook, DOT_SCALE, FloatDtype, PackedWeight, Packer, QuantKind, Scales, Scheme, dynamic_map, pack,
    quantise_rows,
};
use safetensors::SafeTensors;

/// `odd.nf4.64.double`: the dense input and the scheme.
fn case(name: &str) -> (&str, Scheme) {
    let mut parts = name.split('.');
    let input = parts.next().unwrap();
    let kind: QuantKind = parts.next().unwrap().parse().unwrap();
    let block: usize = parts.next().unwrap().parse().unwrap();
    (input, Scheme::new(kind, BlockSize::try_from(block).unwrap(), parts.next() == Some("double")))
}

fn cases<'a>(file: &'a SafeTensors<'_>) -> Vec<&'a str> {
    let mut cases: Vec<&str> = file.names().into_iter().filter_map(|name| name.strip_suffix(".weight")).collect();
    cases.sort_unstable();
    assert!(!cases.is_empty());
    cases
}

#[test]
fn four_bit_weights_are_packed_to_the_same_bytes() {
    let file = golden("four_bit.safetensors");
    let file = tensors(&file);
    for name in cases(&file) {
        let (input, scheme) = case(name);
        let (shape, dtype) = matrix(&file, input);
        let packed = pack(name, shape, dtype, bytes(&file, input), scheme).unwrap();
        assert_eq!((packed.shape(), packed.scheme()), (shape, scheme), "{name}");
        let PackedWeight::FourBit(packed) = packed else { panic!("{name} is not in 4 bits") };
        assert_eq!(packed.codes(), bytes(&file, &format!("{name}.weight")), "{name}");
        match packed.scales() {
            Scales::Plain(absmax) => {
                assert_eq!(bits(absmax), bits(&floats(&file, &format!("{name}.weight.absmax"))), "{name}");
            }
            Scales::Double(double) => {
                assert_eq!(double.codes(), bytes(&file, &format!("{name}.weight.absmax")), "{name}");
                let absmax = floats(&file, &format!("{name}.weight.nested_absmax"));
                assert_eq!(bits(double.absmax()), bits(&absmax), "{name}");
                let map = floats(&file, &format!("{name}.weight.nested_quant_map"));
                assert_eq!(bits(double.map().as_slice()), bits(&map), "{name}");
                let state = format!("{name}.weight.quant_state.bitsandbytes__{}", packed.codebook());
                let state: serde_json::Value = serde_json::from_slice(bytes(&file, &state)).unwrap();
                let offset = state["nested_offset"].as_f64().unwrap() as f32;
                assert_eq!(double.offset().to_bits(), offset.to_bits(), "{name}");
            }
        }
    }
}

#[test]
fn four_bit_weights_are_dequantised_to_the_same_values() {
    let file = golden("four_bit.safetensors");
    let file = tensors(&file);
    let mut compared = 0;
    for name in cases(&file) {
        if file.tensor(&format!("{name}.dequantised")).is_err() {
            continue; // too large to keep
        }
        let expected = floats(&file, &format!("{name}.dequantised"));
        let (input, scheme) = case(name);
        let (shape, dtype) = matrix(&file, input);
        let packed = pack(name, shape, dtype, bytes(&file, input), scheme).unwrap();
        let mut found = vec![f32::NAN; expected.len()];
        packed.dequantise(0, &mut found);
        // By value: FP4's code 8 is -0 in one of bitsandbytes' tables and 0 in another.
        assert_eq!(found, expected, "{name}");
        compared += 1;
    }
    assert_eq!(compared, 48);
}

#[test]
fn the_tables_are_those_of_checkpoints() {
    let file = golden("four_bit.safetensors");
    let file = tensors(&file);
    for codebook in [Codebook::Nf4, Codebook::Fp4] {
        let table = floats(&file, &format!("single.{codebook}.64.weight.quant_map"));
        assert_eq!(bits(codebook.values()), bits(&table));
    }
    let map = floats(&file, "single.nf4.64.double.weight.nested_quant_map");
    assert_eq!(bits(dynamic_map().as_slice()), bits(&map));
}

#[test]
fn offsets_of_all_lengths_are_added_up_in_the_same_order() {
    let file = golden("offsets.safetensors");
    let file = tensors(&file);
    let (lengths, _) = bytes(&file, "lengths").as_chunks();
    let scheme = Scheme::new(QuantKind::Nf4, BlockSize::try_from(32).unwrap(), true);
    for (&length, offset) in lengths.iter().zip(floats(&file, "offsets")) {
        let length = i64::from_le_bytes(length) as usize;
        let scale = |block: usize| ((block as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / 16_777_216.0;
        let mut weight = vec![0.0; length * 32];
        weight.iter_mut().step_by(32).enumerate().for_each(|(block, first)| *first = scale(block));
        let packed = pack("weight", [length, 32], FloatDtype::F32, &le_bytes(&weight), scheme).unwrap();
        let PackedWeight::FourBit(packed) = packed else { panic!() };
        let Scales::Double(double) = packed.scales() else { panic!() };
        assert_eq!(double.offset().to_bits(), offset.to_bits(), "{length} scales");
        if length < 2000 {
            assert_eq!(double.codes(), bytes(&file, &format!("{length}.absmax")), "{length} scales");
            let absmax = floats(&file, &format!("{length}.nested_absmax"));
            assert_eq!(bits(double.absmax()), bits(&absmax), "{length} scales");
        }
    }
}

#[test]
fn int8_weights_are_packed_to_the_same_bytes_and_dequantised_to_the_same_values() {
    let file = golden("int8.safetensors");
    let file = tensors(&file);
    for name in ["f32", "bf16", "f16"] {
        let (shape, dtype) = matrix(&file, name);
        let packed = pack(name, shape, dtype, bytes(&file, name), Scheme::Int8).unwrap();
        let mut found = vec![f32::NAN; shape[0] * shape[1]];
        packed.dequantise(0, &mut found);
        assert_eq!(bits(&found), bits(&floats(&file, &format!("{name}.dequantised"))), "{name}");
        let PackedWeight::Int8(packed) = packed else { panic!("{name} is not in 8 bits") };
        let codes: Vec<u8> = packed.codes().iter().map(|code| code.cast_unsigned()).collect();
        assert_eq!(codes, bytes(&file, &format!("{name}.weight")), "{name}");
        assert_eq!(bits(packed.scales()), bits(&floats(&file, &format!("{name}.SCB"))), "{name}");
    }
}

#[test]
fn activations_are_quantised_to_the_same_bytes() {
    let file = golden("int8.safetensors");
    let file = tensors(&file);
    let activations = floats(&file, "activations");
    for (threshold, name) in [(0.0, "0.0"), (6.0, "6.0"), (0.5, "0.5")] {
        let rows = quantise_rows(&activations, 40, threshold);
        let codes: Vec<u8> = rows.codes.iter().map(|code| code.cast_unsigned()).collect();
        assert_eq!(codes, bytes(&file, &format!("activations.{name}.codes")), "threshold {name}");
        assert_eq!(bits(&rows.scales), bits(&floats(&file, &format!("activations.{name}.scales"))), "threshold {name}");
        let (outliers, _) = bytes(&file, &format!("activations.{name}.outliers")).as_chunks();
        let outliers: Vec<usize> = outliers.iter().map(|&column| i64::from_le_bytes(column) as usize).collect();
        assert_eq!(rows.outliers, outliers, "threshold {name}");
    }
    assert_eq!(DOT_SCALE, 6.200_124e-5);
}

#[test]
fn the_pieces_in_which_a_weight_arrives_do_not_matter() {
    let file = golden("four_bit.safetensors");
    let file = tensors(&file);
    for (input, kind, double) in
        [("many_blocks", QuantKind::Nf4, true), ("odd", QuantKind::Fp4, false), ("odd", QuantKind::Int8, false)]
    {
        let scheme = Scheme::new(kind, BlockSize::default(), double);
        let (shape, dtype) = matrix(&file, input);
        let whole = pack(input, shape, dtype, bytes(&file, input), scheme).unwrap();
        for pieces in [1, 3, 26, 1000] {
            let mut packer = Packer::new(input, shape, dtype, scheme).unwrap();
            for piece in bytes(&file, input).chunks(pieces) {
                packer.push(piece).unwrap();
            }
            assert_eq!(packer.finish().unwrap(), whole, "{input} in pieces of {pieces}");
        }
    }
}
