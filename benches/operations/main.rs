//! Each operation of a LoRA step, forward and backward, against the same written with Burn's own parts; its flex body
//! against its generic body; and, where products are what it consists of, its share of the GEMM rate at the same shape.
//!
//! `cargo bench --bench operations` prints Markdown tables of medians of alternating runs. The shapes are those of a
//! SmolLM2-135M layer. `-- --only attention --rounds 5` measures less.

mod attention;
mod elementwise;
mod fused;
mod products;
#[path = "../support/mod.rs"]
mod support;

use std::hint::black_box;
use std::time::Duration;

use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{DType, Device, Tensor};
use clap::Parser;

use attention::Contender;
use support::{Gemm, Rounds, alternate};

const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const VOCABULARY: usize = 49_152;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const RANK: usize = 16;

#[derive(Parser)]
struct Args {
    /// Rounds of each comparison; slow ones take fewer
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Seconds after which a comparison begins no further round, once it has three
    #[arg(long, default_value_t = 30)]
    budget: u64,
    /// Rows of the products and of the element-wise operations
    #[arg(long, default_value_t = 512)]
    tokens: usize,
    /// The longest sequence that attention is measured on
    #[arg(long, default_value_t = 8192)]
    longest: usize,
    /// Measure only the operations whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Print the bytes that attention over this many tokens needs at its peak, and nothing else
    #[arg(long, hide = true, requires = "contender")]
    memory_of: Option<usize>,
    #[arg(long, hide = true)]
    contender: Option<Contender>,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let args = Args::parse();
    let device = Device::flex().autodiff();
    device.seed(0);
    if let (Some(tokens), Some(contender)) = (args.memory_of, args.contender) {
        println!("{}", attention::peak(contender, tokens, &device));
        return;
    }
    let bench = Bench::new(&args, device);
    println!("GEMM {} × {INTERMEDIATE} × {INTERMEDIATE} in f32: {:.0} GFLOP/s\n", args.tokens, bench.gemm_rate() / 1e9);
    println!(
        "| operation, forward + backward | emberlora (ms) | Burn (ms) | ratio | of GEMM | body (ms) | generic (ms) | ratio |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    products::measure(&bench);
    fused::measure(&bench);
    elementwise::measure(&bench);
    attention::fused(&bench);
    attention::measure(&bench, args.longest);
    products::formats(&bench);
    products::packing(&bench);
    attention::memory(&bench, args.longest);
}

/// What every comparison needs.
struct Bench {
    device: Device,
    rounds: Rounds,
    tokens: usize,
    only: String,
    /// Where an operation has no product of one shape to be compared with.
    gemm: Gemm,
}

/// Floating-point operations of the products in an operation, and the GEMM whose rate they are a share of.
struct Products<'a> {
    flop: f64,
    gemm: &'a Gemm,
}

impl Bench {
    fn new(args: &Args, device: Device) -> Self {
        Self {
            rounds: Rounds { most: args.rounds, budget: Duration::from_secs(args.budget) },
            tokens: args.tokens,
            only: args.only.clone(),
            gemm: Gemm::new(args.tokens, INTERMEDIATE, INTERMEDIATE, &device),
            device,
        }
    }

    fn wants(&self, name: &str) -> bool {
        name.contains(&self.only)
    }

    /// Floating-point operations per second.
    fn gemm_rate(&self) -> f64 {
        self.gemm.flop() / alternate(self.rounds, [&mut || self.gemm.run()])[0]
    }

    /// Prints a row of the table.
    fn compare(&self, contest: Contest) {
        let Contest { name, products, ours, burn, body, generic } = contest;
        let mut gemm = || products.iter().for_each(|products| products.gemm.run());
        let seconds = alternate(self.rounds, [ours, burn, body, generic, &mut gemm]);
        let [ours, burn, body, generic, gemm] = seconds;
        let share = products.map_or("–".to_owned(), |products| {
            format!("{:.0}%", 100.0 * (products.flop / ours) / (products.gemm.flop() / gemm))
        });
        println!(
            "| {name} | {:.2} | {:.2} | {:.2} × | {share} | {:.2} | {:.2} | {:.2} × |",
            ours * 1e3,
            burn * 1e3,
            burn / ours,
            body * 1e3,
            generic * 1e3,
            generic / body,
        );
    }
}

/// One operation, in all the ways to compute it.
struct Contest<'a> {
    name: &'a str,
    products: Option<Products<'a>>,
    /// Through the graph, as a model calls it.
    ours: &'a mut dyn FnMut(),
    /// The same through the graph with Burn's parts.
    burn: &'a mut dyn FnMut(),
    /// The flex body alone, without a graph.
    body: &'a mut dyn FnMut(),
    /// The body for any backend, without a graph.
    generic: &'a mut dyn FnMut(),
}

/// Backward from a sum, the same work for all contenders.
fn backward<const D: usize>(y: Tensor<D>) {
    black_box(y.sum().backward());
}

/// What [`backward`] does beside the operation itself, for bodies that are called without a graph: the sum of the result,
/// and the gradient of ones that it begins with.
fn seed(y: FloatTensor<Flex>) -> FloatTensor<Flex> {
    let (shape, device) = (y.shape(), y.device());
    black_box(Flex::float_sum(y));
    Flex::float_ones(shape, &device, DType::F32.into())
}

/// The values as bodies take them.
fn raw<const D: usize>(tensor: &Tensor<D>) -> FloatTensor<Flex> {
    let plain = if tensor.device().is_autodiff() { tensor.clone().inner() } else { tensor.clone() };
    plain.try_into_primitive::<Flex>().expect("a tensor of flex")
}
