//! What the benchmarks share: alternating timings, the machine's GEMM rate, the memory of a process.
#![allow(dead_code, reason = "each benchmark uses a part of it")]

use std::hint::black_box;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use burn::tensor::{Device, Distribution, Tensor};

/// A comparison takes at least this many rounds, however slow they are.
const FEWEST_ROUNDS: usize = 3;

/// How often a comparison is repeated.
#[derive(Clone, Copy, Debug)]
pub struct Rounds {
    /// The most rounds.
    pub most: usize,
    /// No round begins after this much time, once there are a few.
    pub budget: Duration,
}

/// Seconds that each contender takes, the median of the rounds. In a round each runs once, so that a change of the
/// machine's speed meets all of them alike; a first round is not counted.
pub fn alternate<const N: usize>(rounds: Rounds, mut contenders: [&mut dyn FnMut(); N]) -> [f64; N] {
    let mut seconds = [const { Vec::new() }; N];
    contenders.iter_mut().for_each(|run| run());
    let start = Instant::now();
    for round in 0..rounds.most {
        if round >= FEWEST_ROUNDS && start.elapsed() > rounds.budget {
            break;
        }
        for (run, seconds) in contenders.iter_mut().zip(&mut seconds) {
            let start = Instant::now();
            run();
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    seconds.map(median)
}

/// The middle one; of an even number the higher of the two.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Normally distributed numbers.
pub fn random<const D: usize>(shape: [usize; D], std: f64, device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, std), device)
}

/// The two products that a frozen projection needs, `x Wᵀ` and `g W` in f32, as flex's GEMM computes them.
pub struct Gemm {
    x: Tensor<2>,
    weight: Tensor<2>,
    grad: Tensor<2>,
}

impl Gemm {
    /// `x` is `[m, k]`, the weight `[n, k]`.
    pub fn new(m: usize, n: usize, k: usize, device: &Device) -> Self {
        let device = device.clone().without_autodiff();
        Self {
            x: random([m, k], 1.0, &device),
            weight: random([n, k], 0.05, &device),
            grad: random([m, n], 1.0, &device),
        }
    }

    /// Computes both products.
    pub fn run(&self) {
        black_box(self.x.clone().matmul(self.weight.clone().transpose()));
        black_box(self.grad.clone().matmul(self.weight.clone()));
    }

    /// Floating-point operations of both.
    pub fn flop(&self) -> f64 {
        let ([m, k], [n, _]) = (self.x.dims(), self.weight.dims());
        4.0 * (m * n * k) as f64
    }
}

/// What the process has in memory now, in bytes.
pub fn resident_bytes() -> u64 {
    status("VmRSS:")
}

/// The most it has had since its start or the last [`reset_peak`], in bytes.
pub fn peak_bytes() -> u64 {
    status("VmHWM:")
}

/// Lets the high-water mark begin anew at what is in memory now.
pub fn reset_peak() {
    std::fs::write("/proc/self/clear_refs", "5").expect("Linux with /proc/self/clear_refs");
}

fn status(key: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux with /proc/self/status");
    let line = status.lines().find_map(|line| line.strip_prefix(key)).expect("a line of the status");
    let kibibytes: u64 = line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("kB");
    kibibytes * 1024
}

/// Runs this program again with `arguments` and answers what it prints: memory is measured in a process of its own,
/// since an allocator keeps what an earlier measurement needed.
pub fn in_a_child(arguments: &[String]) -> String {
    let program = std::env::current_exe().expect("the path of this program");
    let output = Command::new(program).args(arguments).stderr(Stdio::inherit()).output().expect("a child process");
    assert!(output.status.success(), "{arguments:?}: {}", output.status);
    String::from_utf8(output.stdout).expect("text")
}

/// Bytes as MiB.
pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
