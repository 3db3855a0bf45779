//! What gradient checkpointing saves and costs: peak activation memory against the number of layers, and time.
//!
//! `cargo bench --bench checkpointing` prints Markdown tables. The models are Llamas of random weights, 256 wide, that
//! train on one row of 512 tokens. Memory is measured in a process of its own for each point.

mod support;

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use burn::tensor::Device;
use clap::{Parser, ValueEnum};
use emberlora::data::{Batch, Document, RowRef};
use emberlora::lora::{LoraOptions, attach};
use emberlora::model::{AttentionKind, CausalLm, Checkpointing, LoadOptions};
use emberlora::quant::FloatDtype;
use emberlora::train::{AdamW, Decay, LrSchedule, TrainState};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::json;

use support::{Rounds, alternate, in_a_child, mib, peak_bytes, reset_peak, resident_bytes};

const HIDDEN: usize = 256;
const INTERMEDIATE: usize = 704;
const HEADS: usize = 4;
const VOCABULARY: usize = 512;
const FOUR: std::num::NonZeroUsize = std::num::NonZeroUsize::new(4).unwrap();

#[derive(Parser)]
struct Args {
    /// Numbers of layers
    #[arg(long, value_delimiter = ',', default_value = "8,16,32,64")]
    layers: Vec<usize>,
    /// Layers of the model whose time is measured
    #[arg(long, default_value_t = 16)]
    timed_layers: usize,
    #[arg(long, default_value_t = 512)]
    seq: usize,
    #[arg(long, default_value_t = 11)]
    rounds: usize,
    /// Print the peak activation memory in bytes of the model in this directory, and nothing else
    #[arg(long, hide = true, requires = "strategy")]
    memory_of: Option<PathBuf>,
    #[arg(long, hide = true)]
    strategy: Option<Strategy>,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Strategy {
    None,
    Block,
    Sqrt,
    EveryFour,
}

const STRATEGIES: [Strategy; 4] = [Strategy::None, Strategy::Block, Strategy::Sqrt, Strategy::EveryFour];

impl Strategy {
    fn checkpointing(self) -> Option<Checkpointing> {
        match self {
            Self::None => None,
            Self::Block => Some(Checkpointing::Block),
            Self::Sqrt => Some(Checkpointing::Sqrt),
            Self::EveryFour => Some(Checkpointing::Every(FOUR)),
        }
    }

    /// As the command line has it.
    fn argument(self) -> String {
        self.to_possible_value().expect("no variant is skipped").get_name().to_owned()
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    if let (Some(dir), Some(strategy)) = (&args.memory_of, args.strategy) {
        println!("{}", activations(dir, strategy, args.seq)?);
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    memory(&args, dir.path())?;
    time(&args, dir.path())
}

fn memory(args: &Args, dir: &Path) -> Result<(), Box<dyn Error>> {
    println!("| layers | none (MiB) | block (MiB) | sqrt (MiB) | every: 4 (MiB) |");
    println!("|---|---|---|---|---|");
    let mut sqrt = Vec::new();
    for &layers in &args.layers {
        let model = write_model(dir, layers)?;
        let mut row = Vec::new();
        for strategy in STRATEGIES {
            let arguments = [
                "--memory-of",
                model.to_str().ok_or("a temporary directory that is no text")?,
                "--strategy",
                &strategy.argument(),
                "--seq",
                &args.seq.to_string(),
            ];
            let bytes: u64 = in_a_child(&arguments.map(str::to_owned)).trim().parse()?;
            row.push(format!("{:.1}", mib(bytes)));
            if matches!(strategy, Strategy::Sqrt) {
                sqrt.push(((layers as f64).sqrt(), mib(bytes)));
            }
        }
        println!("| {layers} | {} |", row.join(" | "));
    }
    let line = Line::fit(&sqrt);
    println!("\nsqrt: {:.1} MiB + {:.1} MiB · √layers, R² = {:.4}\n", line.intercept, line.slope, line.determination);
    Ok(())
}

fn time(args: &Args, dir: &Path) -> Result<(), Box<dyn Error>> {
    let model = write_model(dir, args.timed_layers)?;
    let batch = batch(args.seq);
    let states = STRATEGIES.map(|strategy| state(&model, strategy));
    let run = |state: &Result<TrainState, Box<dyn Error>>| match state {
        Ok(state) => drop(state.gradients(std::slice::from_ref(&batch)).expect("ids of the vocabulary")),
        Err(error) => panic!("{error}"),
    };
    let [none, block, sqrt, every] = &states;
    let rounds = Rounds { most: args.rounds, budget: Duration::from_secs(120) };
    let seconds = alternate(rounds, [&mut || run(none), &mut || run(block), &mut || run(sqrt), &mut || run(every)]);
    println!("| {} layers, forward + backward | time (ms) | added |", args.timed_layers);
    println!("|---|---|---|");
    for (strategy, took) in STRATEGIES.into_iter().zip(seconds) {
        let added = 100.0 * (took / seconds[0] - 1.0);
        println!("| {} | {:.1} | {added:+.1}% |", strategy.argument(), took * 1e3);
    }
    Ok(())
}

/// The bytes that one forward and backward pass adds at its peak, the adapters' gradients left out: they stay behind and
/// grow with the layers whatever the strategy.
fn activations(dir: &Path, strategy: Strategy, seq: usize) -> Result<u64, Box<dyn Error>> {
    let (state, batch) = (state(dir, strategy)?, batch(seq));
    reset_peak();
    let before = resident_bytes();
    let gradients = state.gradients(std::slice::from_ref(&batch))?;
    let added = peak_bytes() - before;
    drop(gradients);
    let mut parameters = 0;
    emberlora::lora::Projections::projections(state.model(), &mut |_, linear| {
        if let Some(adapter) = &linear.adapter {
            parameters += adapter.a.val().shape().num_elements() + adapter.b.val().shape().num_elements();
        }
    });
    Ok(added.saturating_sub(4 * parameters as u64))
}

/// Weights are converted, so that they are in memory before the first pass begins.
fn state(dir: &Path, strategy: Strategy) -> Result<TrainState, Box<dyn Error>> {
    let device = Device::flex().autodiff();
    let device = if strategy.checkpointing().is_some() { device.gradient_checkpointing() } else { device };
    let options = LoadOptions::new(Some(FloatDtype::F32), FloatDtype::F32, AttentionKind::Fused);
    let (mut model, _) = CausalLm::load(dir, &options, &device)?;
    attach(&mut model, &LoraOptions::default(), &device)?;
    model.set_checkpointing(strategy.checkpointing().unwrap_or_default());
    let optimizer = AdamW { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.0 };
    Ok(TrainState::new(model, optimizer, LrSchedule::new(1e-4, Decay::Constant, 0, 1, 0.0), None, 0)?)
}

fn batch(seq: usize) -> Batch {
    let ids = (0..seq).map(|i| (i * 37 % VOCABULARY) as u32).collect();
    let source = RowRef::new(Arc::from(Path::new("counted")), 1);
    let document = Document::new(ids, vec![true; seq], source, None);
    Batch::new(&[vec![&document]], 0)
}

/// Writes a Llama of random weights in bf16 and answers its directory.
fn write_model(dir: &Path, layers: usize) -> Result<PathBuf, Box<dyn Error>> {
    let dir = dir.join(layers.to_string());
    if dir.is_dir() {
        return Ok(dir);
    }
    fs::create_dir(&dir)?;
    let config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS / 2,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": true,
        "torch_dtype": "bfloat16",
    });
    fs::write(dir.join("config.json"), config.to_string())?;

    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    for layer in 0..layers {
        let mut push = |name: &str, shape: &[usize]| {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
        };
        push("input_layernorm", &[HIDDEN]);
        push("post_attention_layernorm", &[HIDDEN]);
        push("self_attn.q_proj", &[HIDDEN, HIDDEN]);
        push("self_attn.k_proj", &[HIDDEN / 2, HIDDEN]);
        push("self_attn.v_proj", &[HIDDEN / 2, HIDDEN]);
        push("self_attn.o_proj", &[HIDDEN, HIDDEN]);
        push("mlp.gate_proj", &[INTERMEDIATE, HIDDEN]);
        push("mlp.up_proj", &[INTERMEDIATE, HIDDEN]);
        push("mlp.down_proj", &[HIDDEN, INTERMEDIATE]);
    }
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, shape)| weights(shape.iter().product())).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape), bytes)| {
        TensorView::new(Dtype::BF16, shape.clone(), bytes).map(|view| (name.clone(), view))
    });
    serialize_to_file(views.collect::<Result<Vec<_>, _>>()?, None, &dir.join("model.safetensors"))?;
    Ok(dir)
}

/// bf16 numbers between −1/16 and 1/16 that do not repeat soon.
fn weights(count: usize) -> Vec<u8> {
    let number = |i: usize| ((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32 / (1 << 27) as f32 - 0.0625;
    (0..count).flat_map(|i| ((number(i).to_bits() >> 16) as u16).to_le_bytes()).collect()
}

/// A line through points, by least squares.
struct Line {
    slope: f64,
    intercept: f64,
    /// R²: 1 where all points lie on the line.
    determination: f64,
}

impl Line {
    fn fit(points: &[(f64, f64)]) -> Self {
        let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / points.len() as f64;
        let (mean_x, mean_y) = (mean(|p| p.0), mean(|p| p.1));
        let covariance: f64 = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
        let variance = |values: &dyn Fn(&(f64, f64)) -> f64| points.iter().map(|p| values(p).powi(2)).sum::<f64>();
        let (in_x, in_y) = (variance(&|p| p.0 - mean_x), variance(&|p| p.1 - mean_y));
        let slope = covariance / in_x;
        Self { slope, intercept: mean_y - slope * mean_x, determination: covariance.powi(2) / (in_x * in_y) }
    }
}
