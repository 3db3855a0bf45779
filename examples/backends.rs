//! The smallest program that trains on whatever device it is given: nothing in it names a backend.
//!
//! ```sh
//! cargo run --release --features ndarray,wgpu --example backends -- wgpu:0
//! ```
//!
//! `emberlora devices` lists what can be given; without an argument it is `auto`.

use std::path::Path;

use emberlora::config::RunConfig;
use emberlora::data::DataOptions;
use emberlora::train::{AdapterChoice, Base, LoadedModel, TrainOptions, TrainState};

const STEPS: usize = 10;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = std::env::args().nth(1).unwrap_or_else(|| "auto".to_owned());
    // The quickstart's model, rows and adapters. One row of 128 tokens a step, so that a software adapter keeps up.
    let changes = [format!("device={device}"), "data.max_seq_len=128".to_owned(), "train.batch_size=1".to_owned()];
    let config = RunConfig::load(Path::new("recipes/quickstart.yaml"), &changes)?;

    let base = Base::resolve(&config, &())?;
    let rows = base.dataset(DataOptions::train(&config), &(), "train")?;
    let loaded = LoadedModel::load(&config, &base, AdapterChoice::Recipe)?;
    println!("{STEPS} steps on {}, computing in {}", loaded.device.choice, loaded.model.compute_dtype());

    let options = TrainOptions::new(&config.train, config.seed);
    let schedule = options.schedule(STEPS);
    let mut state = TrainState::new(loaded.model, options.optimizer, schedule, options.max_grad_norm, config.seed)?;
    for batch in rows.batches(config.seed, 0).take(STEPS) {
        // Tells the device what to do and does not wait for it.
        state.enqueue(&[batch])?;
    }
    let mut outcomes = Vec::new();
    state.read_into(&mut outcomes)?;
    for outcome in &outcomes {
        println!("step {:>2}  loss {:.4}", outcome.step, outcome.loss);
    }
    let [first, .., last] = &outcomes[..] else { return Err("there were no rows to train on".into()) };
    assert!(last.loss < first.loss, "the loss did not fall");
    Ok(())
}
