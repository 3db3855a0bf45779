//! Unpacking on CubeCL's runtimes (wgpu, CUDA): one kernel reads codes and scales and writes numbers, so that nothing
//! but the result is as large as the weight.

use burn::backend::Cube;
use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Shape, TensorData};
use burn_cubecl::cubecl::ir::ElemType;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::cubecl::{self, calculate_cube_count_elemwise, tensor_vector_size_parallel};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use emberlora_quant::{CODE_SCALE, Codebook, NESTED_BLOCK};

use super::{FourBitFormat, Int8Format, NestedFormat, Weight, WeightOps};
use crate::body::cast;

/// What the codes of elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Code {
    /// Numbers of a codebook, the first of a byte in its high half.
    FourBit(Codebook),
    /// Signed numbers.
    Int8,
}

impl Code {
    /// Codes in a 32-bit integer.
    const fn per_word(self) -> usize {
        match self {
            Self::FourBit(_) => 8,
            Self::Int8 => 4,
        }
    }
}

/// What codes are multiplied with.
#[expect(dead_code, reason = "variants are made from `ScalesArgs` when the kernel is launched")]
#[derive(CubeType, CubeLaunch)]
enum Scales {
    /// Nothing.
    Absent,
    /// A number for every row, in units of [`CODE_SCALE`].
    Rows { values: Box<[f32]>, columns: usize },
    /// A number for every block.
    Blocks { values: Box<[f32]>, size: usize },
    /// Likewise, as the code of `map[code] · absmax + offset`. `zero` is 0.
    Nested { codes: Box<[u32]>, map: Box<[f32]>, absmax: Box<[f32]>, size: usize, offset: f32, zero: u32 },
}

/// Every unit writes one vector of elements, whose codes are in one word and which share one scale.
#[cube(launch, address_type = "dynamic")]
fn unpack<F: Float, N: Size>(
    words: &[u32],
    scales: Scales,
    output: &mut [Vector<F, N>],
    #[comptime] code: Code,
    #[define(F)] _dtype: ElemType,
) {
    if ABSOLUTE_POS >= output.len() {
        terminate!();
    }
    let width = N::value();
    let per_word = comptime!(code.per_word());
    let first = ABSOLUTE_POS * width;
    let word = words[first / per_word];
    let scale = scale_of(first, &scales);
    let mut values = Vector::<F, N>::empty();
    #[unroll]
    for i in 0..width {
        let value = value_of(word, u32::cast_from(first % per_word + i), code);
        values.insert(i, F::cast_from(value * scale));
    }
    output[ABSOLUTE_POS] = values;
}

/// What the code of an element is multiplied with.
#[cube]
fn scale_of(element: usize, scales: &Scales) -> f32 {
    match scales {
        Scales::Absent => 1.0f32.runtime(),
        Scales::Rows { values, columns } => values[element / *columns] * comptime!(CODE_SCALE),
        Scales::Blocks { values, size } => values[element / *size],
        Scales::Nested { codes, map, absmax, size, offset, zero } => {
            let block = element / *size;
            let shift = u32::cast_from(block % 4) * 8;
            let code = (codes[block / 4] >> shift) & 255;
            let product = map[code as usize] * absmax[block / comptime!(NESTED_BLOCK)];
            // Rounded before the offset is added, as everywhere else: compilers contract a product and a sum into one
            // operation unless its bits pass through something that they cannot see.
            f32::reinterpret(u32::reinterpret(product) ^ *zero) + *offset
        }
    }
}

/// What the code at `position` of a word stands for.
#[cube]
fn value_of(word: u32, position: u32, #[comptime] code: Code) -> f32 {
    match code {
        Code::FourBit(codebook) => choose(word >> ((position * 4) ^ 4), codebook, 0usize, 16usize),
        // To the top, and down again with its sign.
        Code::Int8 => f32::cast_from(i32::reinterpret(word << (24 - position * 8)) >> 24),
    }
}

/// The value of a 4-bit code, by halving the codebook: sixteen constants need no memory to be looked up in.
#[cube]
fn choose(code: u32, #[comptime] codebook: Codebook, #[comptime] first: usize, #[comptime] count: usize) -> f32 {
    if comptime!(count == 1) {
        comptime!(codebook.values()[first]).runtime()
    } else {
        let half = comptime!(count / 2);
        let upper = (code & comptime!(half as u32)) != 0;
        select(upper, choose(code, codebook, comptime!(first + half), half), choose(code, codebook, first, half))
    }
}

fn launch(words: CubeTensor, scales: ScalesArgs, shape: [usize; 2], code: Code, dtype: DType) -> CubeTensor {
    let (client, device) = (words.client.clone(), words.device.clone());
    let output = empty_device_contiguous_dtype(client.clone(), device, Shape::new(shape), dtype);
    // A divisor of a row and of a word: it divides blocks too, which are whole words.
    let widths = client.io_optimized_vector_sizes(dtype.size()).filter(|&width| width <= code.per_word());
    let width = tensor_vector_size_parallel(widths, output.meta.shape(), output.meta.strides(), 1);
    let units = shape[0] * shape[1] / width;
    let cube_dim = CubeDim::new(&client, units);
    unpack::launch(
        &client,
        calculate_cube_count_elemwise(&client, units, cube_dim),
        cube_dim,
        output.required_address_type(),
        width,
        buffer(words),
        scales,
        output.clone().into_buffer_arg(),
        code,
        dtype_to_storage_type(dtype),
    );
    output
}

fn buffer(tensor: CubeTensor) -> BufferArg {
    into_contiguous(tensor).into_buffer_arg()
}

impl WeightOps for Cube {
    fn dequantise(weight: Weight<Self>, dtype: DType) -> CubeTensor {
        match weight {
            Weight::Dense(weight) => cast::<Self>(weight, dtype),
            Weight::FourBit { codes, scales, format: FourBitFormat { shape, codebook, block_size } } => {
                let scales = ScalesArgs::Blocks { values: buffer(scales), size: block_size };
                launch(codes, scales, shape, Code::FourBit(codebook), dtype)
            }
            Weight::FourBitDouble { codes, scale_codes, scales, format, nested } => {
                let FourBitFormat { shape, codebook, block_size } = format;
                let NestedFormat { offset, map } = nested;
                let map = TensorData::new(map.to_vec(), [map.len()]);
                let scales = ScalesArgs::Nested {
                    codes: buffer(scale_codes),
                    map: buffer(Self::float_from_data(map, &codes.device)),
                    absmax: buffer(scales),
                    size: block_size,
                    offset,
                    zero: 0,
                };
                launch(codes, scales, shape, Code::FourBit(codebook), dtype)
            }
            Weight::Int8 { codes, scales, format: Int8Format { shape, .. } } => {
                let scales = ScalesArgs::Rows { values: buffer(scales), columns: shape[1] };
                launch(codes, scales, shape, Code::Int8, dtype)
            }
        }
    }

    fn int8_codes(codes: CubeTensor, shape: [usize; 2]) -> CubeTensor {
        launch(codes, ScalesArgs::Absent, shape, Code::Int8, DType::F32)
    }
}
