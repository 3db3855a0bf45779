//! A model of two blocks and a head, small enough to compute by hand.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod saved;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use emberlora_kernels::rng::{mix, uniform};
use emberlora_lora::{LoraLinear, LoraOptions, Pass, Projections, Targets};

pub const WIDTH: usize = 6;
pub const INNER: usize = 10;
pub const VOCABULARY: usize = 5;

#[derive(Module, Debug)]
pub struct Block {
    pub up: LoraLinear,
    pub down: LoraLinear,
}

#[derive(Module, Debug)]
pub struct Tiny {
    pub blocks: Vec<Block>,
    pub head: LoraLinear,
}

impl Tiny {
    pub fn new(device: &Device) -> Self {
        let block = |i: u64| Block {
            up: LoraLinear::new(noise(10 + i, [INNER, WIDTH], device), Some(vector(20 + i, INNER, device))),
            down: LoraLinear::new(noise(30 + i, [WIDTH, INNER], device), None),
        };
        Self {
            blocks: (0..2).map(block).collect(),
            head: LoraLinear::new(noise(40, [VOCABULARY, WIDTH], device), None),
        }
    }

    pub fn forward(&self, x: Tensor<2>, pass: &Pass) -> Tensor<2> {
        let block =
            |x: Tensor<2>, block: &Block| x.clone() + block.down.forward(block.up.forward(x, pass).tanh(), pass);
        self.head.forward(self.blocks.iter().fold(x, block), pass)
    }
}

impl Projections for Tiny {
    fn projections(&self, f: &mut dyn FnMut(&str, &LoraLinear)) {
        for (i, block) in self.blocks.iter().enumerate() {
            f(&format!("model.layers.{i}.mlp.up_proj"), &block.up);
            f(&format!("model.layers.{i}.mlp.down_proj"), &block.down);
        }
        f("lm_head", &self.head);
    }

    fn visit_projections(&mut self, f: &mut dyn FnMut(&str, &mut LoraLinear)) {
        for (i, block) in self.blocks.iter_mut().enumerate() {
            f(&format!("model.layers.{i}.mlp.up_proj"), &mut block.up);
            f(&format!("model.layers.{i}.mlp.down_proj"), &mut block.down);
        }
        f("lm_head", &mut self.head);
    }
}

/// Numbers in [-1, 1) that depend on the stream alone.
pub fn numbers(stream: u64, count: usize) -> Vec<f32> {
    (0..count as u64).map(|i| 2.0 * uniform(mix(99, &[stream]), i) - 1.0).collect()
}

pub fn noise(stream: u64, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(numbers(stream, shape[0] * shape[1]), shape), device)
}

pub fn vector(stream: u64, len: usize, device: &Device) -> Tensor<1> {
    Tensor::from_data(TensorData::new(numbers(stream, len), [len]), device)
}

/// Gives every B of a model values, so that the adapters do something.
pub fn fill_b(model: &mut Tiny) {
    let mut stream = 500;
    model.visit_projections(&mut |_, linear| {
        if let Some(adapter) = &mut linear.adapter {
            let (shape, device) = (adapter.b.dims(), adapter.b.device());
            stream += 1;
            let b = noise(stream, shape, &device);
            adapter.b = adapter.b.clone().map(|old| if old.is_autodiff() { b.require_grad() } else { b });
        }
    });
}

pub fn suffixes(list: &[&str]) -> Targets {
    Targets::Suffixes(list.iter().map(|name| name.to_string()).collect())
}

pub fn options(r: usize, targets: Targets) -> LoraOptions {
    LoraOptions { r, alpha: 2.0 * r as f64, targets, seed: 7, ..LoraOptions::default() }
}

pub fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    tensor.clone().inner().into_data_dtype(burn::tensor::DType::F32).try_to_vec().unwrap()
}

pub fn assert_close(a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len());
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        assert!((x - y).abs() <= tolerance, "element {i}: {x} and {y}");
    }
}

/// Module name, A and B of every adapter.
pub fn factors(model: &Tiny) -> Vec<(String, Vec<f32>, Vec<f32>)> {
    let mut all = Vec::new();
    model.projections(&mut |name, linear| {
        if let Some(adapter) = &linear.adapter {
            all.push((name.to_owned(), values(&adapter.a.val()), values(&adapter.b.val())));
        }
    });
    all
}
