//! Optimizer steps of a model directory on random tokens, every one a label, and how close they come to the machine.
//!
//! ```sh
//! cargo bench --bench step -- --model models/smollm2 --rows 4 --seq 256 --steps 8 --limit
//! ```
//!
//! prints one JSON object. `benches/peers/compare.py` runs the same program beside other trainers; the tokens come from
//! a generator that is a few lines in any language. All steps train the same batch, as the peers do.

mod flop;
#[path = "../support/mod.rs"]
mod support;

use std::error::Error;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use burn::tensor::Device;
use clap::{Parser, ValueEnum};
use emberlora::data::{Batch, Document, RowRef};
use emberlora::kernels::keep_freed_memory;
use emberlora::lora::{LoraOptions, attach, peft};
use emberlora::model::{AttentionKind, CausalLm, Checkpointing, LoadOptions, QuantizationOptions};
use emberlora::quant::{BlockSize, FloatDtype, QuantKind, Scheme};
use emberlora::train::{AdamW, Decay, LrSchedule, TrainState};
use serde_json::json;

use flop::{Flop, Limit};
use support::{median, peak_bytes};

#[derive(Parser)]
struct Args {
    /// A directory with `config.json` and `*.safetensors`
    #[arg(long)]
    model: PathBuf,
    /// The PEFT adapter to start from; without it one of rank 16 on all linear layers is made
    #[arg(long)]
    adapter: Option<PathBuf>,
    #[arg(long, default_value_t = 4)]
    rows: usize,
    #[arg(long, default_value_t = 256)]
    seq: usize,
    /// Steps in all; the first is not part of the median
    #[arg(long, default_value_t = 6)]
    steps: usize,
    /// none, block, sqrt or every:N
    #[arg(long, default_value = "none", value_parser = checkpointing)]
    checkpointing: Strategy,
    /// How frozen projections are stored, `auto` as in the files; computing is in f32
    #[arg(long, value_enum, default_value_t = Weights::Auto)]
    weights: Weights,
    #[arg(long, default_value_t = 1e-4)]
    lr: f64,
    /// Measure the GEMM rate before and after the timed steps and say which share of it they reach; its operands would
    /// count in the peak memory, which is then left out
    #[arg(long)]
    limit: bool,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Weights {
    Auto,
    F32,
    Bf16,
    /// NF4 with double quantisation, the embedding and the head as in the files
    Nf4,
}

#[global_allocator]
static ALLOCATOR: emberlora::kernels::Allocator = emberlora::kernels::Allocator;

fn main() -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    keep_freed_memory();
    let args = Args::parse();
    if args.steps < 2 || args.seq < 2 {
        return Err("--steps and --seq are at least 2".into());
    }
    let device = Device::flex().autodiff();
    let device = if args.checkpointing.0.is_some() { device.gradient_checkpointing() } else { device };
    let model = load(&args, &device)?;
    let batch = batch(args.rows, args.seq, model.config().vocab_size);
    let flop = Flop::of_step(&model, args.rows, args.seq, batch.targets.len());
    // Its operands are made where it is used: the first step must not wait for them.
    let limit = Limit::of(&model, args.rows * args.seq);

    let optimizer = AdamW { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.0 };
    let schedule = LrSchedule::new(args.lr, Decay::Constant, 0, args.steps, 0.0);
    let mut state = TrainState::new(model, optimizer, schedule, None, 0)?;
    let mut step = || -> Result<(f64, f64), Box<dyn Error>> {
        let start = Instant::now();
        let outcome = state.step(std::slice::from_ref(&batch))?.ok_or("the batch has no label")?;
        Ok((outcome.loss, start.elapsed().as_secs_f64()))
    };

    let start_to_first_step = start.elapsed().as_secs_f64();
    let first_step_at = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
    let (mut losses, mut seconds, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..args.steps {
        if args.limit && number == 1 {
            rates.push(limit.rate(&device));
        }
        let (loss, took) = step()?;
        losses.push(loss);
        seconds.push(took);
    }
    let peak = (!args.limit).then(peak_bytes);
    if args.limit {
        rates.push(limit.rate(&device));
    }

    let typical = median(seconds[1..].to_vec());
    let gemm_rate = (!rates.is_empty()).then(|| rates.iter().sum::<f64>() / rates.len() as f64);
    let report = json!({
        "rows": args.rows,
        "seq": args.seq,
        "step_seconds": seconds,
        "tokens_per_second": (args.rows * args.seq) as f64 / typical,
        "losses": losses,
        "peak_memory_bytes": peak,
        "start_to_first_step": start_to_first_step,
        "first_step_at": first_step_at,
        "gflop": flop.in_units_of(1e9),
        "gflop_per_second": flop.total() / typical / 1e9,
        "gemm_gflop_per_second": rates.iter().map(|rate| rate / 1e9).collect::<Vec<_>>(),
        "share_of_gemm_limit": gemm_rate.map(|rate| flop.total() / typical / rate),
    });
    println!("{report}");
    Ok(())
}

fn load(args: &Args, device: &Device) -> Result<CausalLm, Box<dyn Error>> {
    let dtype = match args.weights {
        Weights::Auto | Weights::Nf4 => None,
        Weights::F32 => Some(FloatDtype::F32),
        Weights::Bf16 => Some(FloatDtype::Bf16),
    };
    let mut options = LoadOptions::new(dtype, FloatDtype::F32, AttentionKind::Fused);
    if let Weights::Nf4 = args.weights {
        let scheme = Scheme::new(QuantKind::Nf4, BlockSize::default(), true);
        options.quantization = Some(QuantizationOptions::new(scheme, vec!["lm_head".to_owned()], 0.0));
    }
    let (mut model, _) = CausalLm::load(&args.model, &options, device)?;
    match &args.adapter {
        Some(dir) => peft::apply(&mut model, &peft::load(dir)?, device)?,
        None => attach(&mut model, &LoraOptions { r: 16, alpha: 32.0, ..LoraOptions::default() }, device)?,
    };
    model.set_checkpointing(args.checkpointing.0.unwrap_or_default());
    Ok(model)
}

/// Rows of one document each, every token but the first a label.
fn batch(rows: usize, seq: usize, vocab_size: usize) -> Batch {
    let ids = random_ids(rows * seq, vocab_size);
    let source = RowRef::new(Arc::from(Path::new("random")), 1);
    let documents: Vec<Document> =
        ids.chunks(seq).map(|ids| Document::new(ids.to_vec(), vec![true; seq], source.clone(), None)).collect();
    Batch::new(&documents.iter().map(|document| vec![document]).collect::<Vec<_>>(), 0)
}

/// The upper bits of Knuth's linear congruential generator (MMIX), from state 1.
fn random_ids(count: usize, vocab_size: usize) -> Vec<u32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocab_size as u64) as u32
    };
    (0..count).map(|_| next()).collect()
}

/// Gradient checkpointing, if there is any.
#[derive(Clone, Copy)]
struct Strategy(Option<Checkpointing>);

fn checkpointing(text: &str) -> Result<Strategy, String> {
    match (text, text.strip_prefix("every:")) {
        ("none", _) => Ok(Strategy(None)),
        ("block", _) => Ok(Strategy(Some(Checkpointing::Block))),
        ("sqrt", _) => Ok(Strategy(Some(Checkpointing::Sqrt))),
        (_, Some(blocks)) => {
            let blocks = blocks.parse::<NonZeroUsize>().map_err(|error| error.to_string())?;
            Ok(Strategy(Some(Checkpointing::Every(blocks))))
        }
        _ => Err("none, block, sqrt or every:N".to_owned()),
    }
}
