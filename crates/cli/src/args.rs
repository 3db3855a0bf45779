//! What can be typed: the arguments as clap reads them, with no effect of their own.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand};
use emberlora_config::DeviceChoice;
use emberlora_model::FloatDtype;
use emberlora_quant::{BlockSize, QuantKind};

use crate::quantize;

/// Fine-tune language models with LoRA in pure Rust.
#[derive(Debug, Parser)]
#[command(name = "emberlora", version, max_term_width = 100)]
#[command(after_help = "\
Exit codes: 0 done, 1 failed while running, 2 a wrong argument, recipe or input, 130 interrupted.
RUST_LOG sets what is logged (default: warn); NO_COLOR switches colours off.")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Fine-tune as a recipe says and write the adapter
    Train(TrainArgs),
    /// Report loss, perplexity and tokens on a data file
    Eval(EvalArgs),
    /// Write text with the base model or with an adapter
    Generate(GenerateArgs),
    /// Show the rows as the model will see them, token by token
    Inspect(InspectArgs),
    /// Write a model directory with packed weights that transformers and bitsandbytes load
    Quantize(QuantizeArgs),
    /// Add an adapter to its base and write the dense model
    Merge(MergeArgs),
    /// List what this build can compute on, and what `device: auto` takes
    Devices(DevicesArgs),
    /// Host devices of this machine for runs elsewhere
    Serve(ServeArgs),
    /// Check, show and document recipes
    #[command(subcommand)]
    Config(ConfigCommand),
}

/// A recipe and what the command line changes in it.
#[derive(Debug, Args)]
pub(crate) struct RecipeArgs {
    /// The recipe (YAML)
    #[arg(value_name = "RECIPE")]
    pub(crate) recipe: PathBuf,
    /// Values that override the recipe's, such as train.epochs=2
    #[arg(value_name = "KEY.PATH=VALUE")]
    pub(crate) overrides: Vec<String>,
}

/// Where to compute.
#[derive(Debug, Args)]
pub(crate) struct DeviceArgs {
    /// Compute here instead of on the recipe's `device`: auto, or one that `emberlora devices` lists
    #[arg(long, value_name = "DEVICE")]
    pub(crate) device: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DevicesArgs {
    /// Print one JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TrainArgs {
    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
}

#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// A PEFT adapter directory; without it the base model is evaluated (with the recipe's `adapter.init_from`)
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Option<PathBuf>,
    /// The rows to evaluate on, instead of the recipe's `data.eval`
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    /// The recipe that names the model
    #[arg(long, value_name = "RECIPE")]
    pub(crate) recipe: PathBuf,
    /// Values that override the recipe's; they stand before `--chat`
    #[arg(value_name = "KEY.PATH=VALUE")]
    pub(crate) overrides: Vec<String>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// A PEFT adapter directory; without it the base model writes (with the recipe's `adapter.init_from`)
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) input: PromptArgs,
    /// 0 takes the most likely token each time
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = temperature)]
    pub(crate) temperature: f64,
    /// Sample from the most likely tokens whose probabilities sum to P
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = top_p)]
    pub(crate) top_p: f64,
    /// Seed of the sampling; the recipe's where absent
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// The most tokens to write
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(crate) max_new_tokens: usize,
}

/// Exactly one way to ask.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct PromptArgs {
    /// Continue this text as it stands
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) prompt: Option<String>,
    /// Answer this message through the chat template; without TEXT, hold a conversation over the lines of standard
    /// input. A message that begins with a hyphen follows an equals sign: --chat="- x"
    #[arg(long, value_name = "TEXT", num_args = 0..=1)]
    pub(crate) chat: Option<Option<String>>,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    pub(crate) recipe: RecipeArgs,
    /// Print a line of JSON for each row of the data: `input_ids`, `labels` (-100 where not trained) and `text`
    #[arg(long)]
    pub(crate) json: bool,
    /// Show N rows (default: 4, with --json all)
    #[arg(long, value_name = "N")]
    pub(crate) rows: Option<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct QuantizeArgs {
    /// A model directory, or an id on the hub (org/name)
    #[arg(value_name = "MODEL")]
    pub(crate) model: String,
    /// The directory to write; it must not exist, or be empty
    #[arg(value_name = "OUT")]
    pub(crate) out: PathBuf,
    /// The format: nf4, fp4 or int8
    #[arg(long, value_name = "KIND")]
    pub(crate) kind: QuantKind,
    /// Weights that share a scale, with nf4 and fp4: 32, 64, 128, 256 or 512 (default: 64)
    #[arg(long, value_name = "N", value_parser = quantize::block_size)]
    pub(crate) block_size: Option<BlockSize>,
    /// Keep the scales of nf4 and fp4 in 32 bits rather than in 8
    #[arg(long)]
    pub(crate) no_double_quant: bool,
    /// Keep projections as they are whose module path equals, begins or ends with NAME; may be repeated (default:
    /// lm_head). A head that is tied to the embedding is always kept
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) skip: Vec<String>,
    /// Inputs from this magnitude on are multiplied in full precision, with int8; 0 is never (default: 6.0)
    #[arg(long, value_name = "X", value_parser = quantize::threshold, allow_negative_numbers = true)]
    pub(crate) threshold: Option<f32>,
    /// What transformers computes in with nf4 and fp4: f32, bf16 or f16 (default: f32)
    #[arg(long, value_name = "DTYPE")]
    pub(crate) compute_dtype: Option<FloatDtype>,
    /// Branch, tag or commit of a model on the hub
    #[arg(long, value_name = "REVISION", default_value = "main")]
    pub(crate) revision: String,
}

#[derive(Debug, Args)]
pub(crate) struct MergeArgs {
    /// The recipe that names the base, and how it was quantised
    #[arg(long, value_name = "RECIPE")]
    pub(crate) recipe: PathBuf,
    /// Values that override the recipe's
    #[arg(value_name = "KEY.PATH=VALUE")]
    pub(crate) overrides: Vec<String>,
    /// A PEFT adapter directory
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: PathBuf,
    /// The directory to write; it must not exist, or be empty
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// The format of the weights: f32, bf16 or f16 (default: that of the base's files)
    #[arg(long, value_name = "DTYPE")]
    pub(crate) dtype: Option<FloatDtype>,
}

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// A device to host, as recipes name it; given several times, clients count them from 0
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: Vec<DeviceChoice>,
    /// The address to listen on; port 0 finds a free one. The connection is not encrypted: across machines, listen on
    /// the loopback address and tunnel (`ssh -L`)
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:4000")]
    pub(crate) listen: SocketAddr,
    /// Read the token that clients must present from FILE, instead of from EMBERLORA_TOKEN. Without either one is made
    /// up and printed
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Serve every process of this machine that asks
    #[arg(long, conflicts_with = "token_file")]
    pub(crate) no_token: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Report everything that is wrong with a recipe
    Check(RecipeArgs),
    /// Print the recipe with every value filled in
    Show(RecipeArgs),
    /// Print the JSON Schema of recipes
    Schema,
    /// Print the reference of every key (docs/recipe.md)
    Docs,
}

fn temperature(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err("must be a number, 0 or more".to_owned()),
    }
}

fn top_p(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("must be a number above 0 and at most 1".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn overrides_follow_the_recipe() {
        let Command::Train(args) = parse("emberlora train a.yaml train.epochs=2 seed=1").unwrap().command else {
            panic!("not train");
        };
        assert_eq!(args.recipe.recipe, PathBuf::from("a.yaml"));
        assert_eq!(args.recipe.overrides, ["train.epochs=2", "seed=1"]);
    }

    #[test]
    fn chat_takes_text_or_nothing() {
        let chat = |line: &str| match parse(line).unwrap().command {
            Command::Generate(args) => (args.input.chat, args.overrides),
            _ => panic!("not generate"),
        };
        assert_eq!(chat("emberlora generate --recipe a --chat"), (Some(None), vec![]));
        assert_eq!(
            chat("emberlora generate --recipe a seed=1 --chat hi"),
            (Some(Some("hi".to_owned())), vec!["seed=1".to_owned()])
        );
    }

    #[test]
    fn a_text_may_begin_with_a_hyphen() {
        let input = |text: &str| match Cli::try_parse_from(
            ["emberlora", "generate", "--recipe", "a"].into_iter().chain(text.split('|')),
        ) {
            Ok(Cli { command: Command::Generate(args) }) => (args.input.prompt, args.input.chat.flatten()),
            other => panic!("{other:?}"),
        };
        assert_eq!(input("--prompt|-5 plus 3 is"), (Some("-5 plus 3 is".to_owned()), None));
        assert_eq!(input("--chat=- x"), (None, Some("- x".to_owned())));
        assert_eq!(input("--chat|--seed|1"), (None, None));
    }

    #[test]
    fn a_question_is_asked_in_exactly_one_way() {
        assert!(parse("emberlora generate --recipe a").is_err());
        assert!(parse("emberlora generate --recipe a --prompt x --chat y").is_err());
    }

    #[test]
    fn a_server_hosts_the_devices_it_is_given_and_asks_for_a_token() {
        let serve = |line: &str| match parse(line).map(|cli| cli.command) {
            Ok(Command::Serve(args)) => Some((args.device, args.listen.to_string(), args.no_token)),
            _ => None,
        };
        assert_eq!(serve("emberlora serve"), Some((vec![DeviceChoice::Auto], "127.0.0.1:4000".to_owned(), false)));
        let cuda = |index| DeviceChoice::Cuda(Some(index));
        let two = serve("emberlora serve --device cuda:0 --device cuda:1 --listen [::1]:0 --no-token");
        assert_eq!(two, Some((vec![cuda(0), cuda(1)], "[::1]:0".to_owned(), true)));
        for wrong in ["--device gpu", "--listen here", "--no-token --token-file f"] {
            assert_eq!(serve(&format!("emberlora serve {wrong}")), None, "{wrong}");
        }
    }

    #[test]
    fn sampling_values_out_of_range_are_refused() {
        for wrong in ["--temperature -1", "--temperature inf", "--top-p 0", "--top-p 1.5", "--top-p nan"] {
            assert!(parse(&format!("emberlora generate --recipe a --prompt x {wrong}")).is_err(), "{wrong}");
        }
    }
}
