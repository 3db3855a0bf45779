//! A trainer of one's own: LoRA on any Burn module, in a hand-written loop.
//!
//! ```text
//! cargo run --release --example custom_trainer
//! ```
//!
//! Only `burn` and `emberlora::lora` are used: no recipe, no language model, no trainer. The base is a small network of
//! `burn::nn::Linear` layers; the adapters teach it a function that it does not know, while its own weights stay put.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Tensor, activation::tanh};
use emberlora::lora::{LoraLinear, LoraOptions, Pass, Projections, Targets, attach, peft};

/// Step 1. Wherever the network had a `Linear` it now has a `LoraLinear`. The derive makes it a Burn module, so
/// optimizers find the adapters; the wrapped weights are frozen and no optimizer touches them.
#[derive(Module, Debug)]
struct Network {
    hidden: LoraLinear,
    output: LoraLinear,
}

impl Network {
    /// Takes layers over from a network that was trained elsewhere.
    fn wrap(hidden: Linear, output: Linear) -> Self {
        Self { hidden: LoraLinear::from_linear(hidden), output: LoraLinear::from_linear(output) }
    }

    /// The pass says whether dropout is on (training) and whether the adapters take part at all.
    fn forward(&self, x: Tensor<2>, pass: &Pass) -> Tensor<2> {
        self.output.forward(tanh(self.hidden.forward(x, pass)), pass)
    }

    fn loss(&self, x: Tensor<2>, y: Tensor<2>, pass: &Pass) -> Tensor<1> {
        (self.forward(x, pass) - y).square().mean()
    }
}

/// Step 2. The layers get names. Target rules match against them, and adapter files name their tensors by them.
impl Projections for Network {
    fn projections(&self, f: &mut dyn FnMut(&str, &LoraLinear)) {
        f("network.hidden", &self.hidden);
        f("network.output", &self.output);
    }

    fn visit_projections(&mut self, f: &mut dyn FnMut(&str, &mut LoraLinear)) {
        f("network.hidden", &mut self.hidden);
        f("network.output", &mut self.output);
    }
}

/// 64 points of a curve that the base network has never seen.
fn data(device: &Device) -> (Tensor<2>, Tensor<2>) {
    let x: Vec<f32> = (0..64).map(|i| i as f32 / 32.0 - 1.0).collect();
    let y: Vec<f32> = x.iter().map(|x| (3.0 * x).sin()).collect();
    let column = |values: Vec<f32>| Tensor::<1>::from_floats(values.as_slice(), device).reshape([64, 1]);
    (column(x), column(y))
}

/// The bytes of all frozen parameters, to show that training leaves them alone.
fn base_bytes(network: &Network) -> Vec<u8> {
    let mut bytes = Vec::new();
    network.projections(&mut |_, linear| {
        bytes.extend_from_slice(linear.weight.dequantise().into_data().as_bytes());
        if let Some(bias) = &linear.bias {
            bytes.extend_from_slice(bias.val().into_data().as_bytes());
        }
    });
    bytes
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Gradients are recorded on an autodiff device only.
    let device = Device::flex().autodiff();
    device.seed(1);
    let hidden = LinearConfig::new(1, 32).init(&device);
    let output = LinearConfig::new(32, 1).init(&device);
    let mut network = Network::wrap(hidden, output);

    // Step 3. Choose layers, rank and scale, and attach. B starts at zero, so nothing changes yet.
    let options = LoraOptions { r: 4, alpha: 8.0, targets: Targets::AllLinear, seed: 42, ..LoraOptions::default() };
    let report = attach(&mut network, &options, &device)?;
    println!("{} trainable parameters in {} layers", report.trainable_parameters, report.modules.len());

    // Step 4. Train: forward, backward, step. The number of the step makes the dropout masks reproducible.
    let (x, y) = data(&device);
    let before: f32 = network.loss(x.clone(), y.clone(), &Pass::eval()).into_scalar();
    let base = base_bytes(&network);
    let (seed, steps) = (42, 400);
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.0).init();
    for step in 0..steps {
        let loss = network.loss(x.clone(), y.clone(), &Pass::train(seed, step));
        let gradients = GradientsParams::from_grads(loss.backward(), &network);
        network = optimizer.step(1e-2, network, gradients);
    }

    // Step 5. Compare. The base is still in there: a pass without adapters gives its output, without a second copy.
    let after: f32 = network.loss(x.clone(), y.clone(), &Pass::eval()).into_scalar();
    let base_loss: f32 = network.loss(x, y, &Pass::base()).into_scalar();
    println!("loss before {before:.4}, after {after:.4}; without the adapters still {base_loss:.4}");
    assert!(after < before / 10.0, "the loss did not fall");
    assert!(base_bytes(&network) == base, "a frozen weight changed");

    // Step 6. Save in PEFT's format; `peft::load` and `peft::apply` bring the adapter back onto the same base.
    let dir = std::env::temp_dir().join("emberlora-custom-trainer");
    peft::save(&network, &options, "", None, &dir)?;
    println!("adapter written to {}", dir.display());
    Ok(())
}
