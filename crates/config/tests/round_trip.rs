//! What is written reads back as the same run, floats bit by bit.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use emberlora_config::*;
use indexmap::IndexMap;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

/// Any string a YAML file can hold that is not blank, with a taste for what YAML reads as something else.
fn text() -> impl Strategy<Value = String> {
    let odd = select(vec![
        "null",
        "~",
        "true",
        "no",
        "1e5",
        "0x10",
        "012",
        "4e15273",
        "- a",
        "a: b",
        "#x",
        " padded ",
        "[q]",
        "{a}",
        "&a",
        "*a",
        "!t",
        "'",
        "\"",
        "%",
        "@",
        "`",
        "---",
        "...",
        "a\nb\n",
        "\ta",
        "é\u{301}",
        "🔥",
        ".nan",
        "<<",
        "=",
        "?",
        "|",
        ">",
    ]);
    prop_oneof![odd.prop_map(str::to_owned), "[a-z_.]{1,12}", vec(any::<char>(), 1..12).prop_map(String::from_iter),]
        .prop_filter("not blank", |text| !text.trim().is_empty())
}

fn file() -> impl Strategy<Value = PathBuf> {
    text().prop_map(PathBuf::from)
}

/// A number above zero that single precision holds, of every magnitude.
fn positive() -> impl Strategy<Value = f64> {
    let magnitudes = (1..0x7f80_0000_u32).prop_map(|bits| f64::from(f32::from_bits(bits)));
    prop_oneof![Just(1.0), Just(1e-8), 1e-9..10.0, magnitudes]
}

fn at_most(most: f64) -> impl Strategy<Value = f64> {
    positive().prop_map(move |value| value.min(most))
}

fn unit() -> impl Strategy<Value = f64> {
    prop_oneof![Just(0.0), Just(0.999), 0.0..0.999_999]
}

fn model() -> impl Strategy<Value = ModelSection> {
    let dtype = || select(vec![Dtype::Auto, Dtype::F32, Dtype::Bf16, Dtype::F16]);
    (text(), text(), dtype(), dtype(), select(vec![Attention::Fused, Attention::Eager])).prop_map(
        |(source, revision, dtype, compute, attention)| ModelSection::new(source, revision, dtype, compute, attention),
    )
}

fn adapter() -> impl Strategy<Value = AdapterSection> {
    let targets = prop_oneof![
        Just(Targets::AllLinear),
        vec(text(), 1..3).prop_map(Targets::Suffixes),
        text().prop_map(Targets::Regex),
    ];
    let exclude = prop_oneof![vec(text(), 0..3).prop_map(Exclude::Suffixes), text().prop_map(Exclude::Regex)];
    let ranks = vec((text(), 1_usize..99), 0..3).prop_map(IndexMap::from_iter);
    let alphas = vec((text(), positive()), 0..3).prop_map(IndexMap::from_iter);
    let first = (1_usize..999, positive(), unit(), targets, exclude);
    let second = (option::of(vec(0_usize..99, 1..4)), ranks, alphas, any::<bool>(), option::of(file()));
    (any::<bool>(), first, second).prop_map(
        |(bare, (r, alpha, dropout, targets, exclude), (layers, ranks, alphas, rslora, init_from))| AdapterSection {
            kind: if bare { AdapterKind::None } else { AdapterKind::Lora },
            r,
            alpha,
            dropout,
            layers: layers.filter(|_| !matches!(targets, Targets::Regex(_))),
            targets,
            exclude,
            rank_pattern: ranks,
            alpha_pattern: alphas,
            rslora,
            init_from: init_from.filter(|_| !bare),
            task_type: TaskType::CausalLm,
        },
    )
}

/// A section whose keys that its kind does not have are at their defaults, as they are read.
fn quantization() -> impl Strategy<Value = QuantizationSection> {
    let skip = || vec(text(), 0..3);
    let block_size = select(vec![32, 64, 128, 256, 512]);
    let threshold = prop_oneof![Just(0.0), positive()];
    let four_bit =
        (any::<bool>(), any::<bool>(), block_size, skip()).prop_map(|(nf4, double_quant, block_size, skip)| {
            let kind = if nf4 { QuantizationKind::Nf4 } else { QuantizationKind::Fp4 };
            QuantizationSection::new(kind, double_quant, block_size, skip, 6.0)
        });
    let int8 = (skip(), threshold)
        .prop_map(|(skip, threshold)| QuantizationSection::new(QuantizationKind::Int8, true, 64, skip, threshold));
    prop_oneof![four_bit, int8]
}

fn data() -> impl Strategy<Value = DataSection> {
    let formats = || {
        use DataFormat::*;
        select(vec![Chat, Prompt, Alpaca, Text, Tokens])
    };
    let source = || {
        (file(), formats(), at_most(DataSource::MAX_WEIGHT))
            .prop_map(|(path, format, weight)| DataSource::new(path, format, weight))
    };
    let template = prop_oneof![
        Just(ChatTemplateChoice::Auto),
        Just(ChatTemplateChoice::Zephyr),
        text().prop_map(|text| ChatTemplateChoice::File(PathBuf::from(text + ".jinja"))),
    ];
    let loss_on = select(vec![LossOn::Assistant, LossOn::LastAssistant, LossOn::All]);
    let overflow = select(vec![Overflow::Truncate, Overflow::Drop, Overflow::Error]);
    let first = (vec(source(), 1..3), vec(source(), 0..3), formats(), template);
    let share_prefix = select(vec![SharePrefix::Auto, SharePrefix::Off]);
    (first, loss_on, 2..=usize::MAX, overflow, any::<bool>(), share_prefix, any::<bool>()).prop_map(
        |((train, eval, format, template), loss_on, max_seq_len, overflow, packing, share_prefix, shuffle)| {
            DataSection {
                train,
                eval,
                format,
                chat_template: template,
                loss_on,
                max_seq_len,
                overflow,
                packing,
                share_prefix,
                shuffle,
            }
        },
    )
}

fn train() -> impl Strategy<Value = TrainSection> {
    let kind = select(vec![ScheduleKind::Constant, ScheduleKind::Linear, ScheduleKind::Cosine]);
    let warmup = prop_oneof![unit().prop_map(Warmup::Ratio), any::<usize>().prop_map(Warmup::Steps)];
    let schedule = (kind, warmup, unit()).prop_map(|(kind, warmup, min_ratio)| {
        Schedule::new(kind, warmup, if kind == ScheduleKind::Constant { 0.0 } else { min_ratio })
    });
    let optimizer = (unit(), unit(), positive(), unit())
        .prop_map(|(first, second, eps, decay)| Optimizer::new(OptimizerKind::AdamW, [first, second], eps, decay));
    let count = || 1..=usize::MAX;
    let first = (at_most(1e6), option::of(count()), count(), count(), positive());
    let second = (option::of(positive()), option::of(count()), option::of(count()), count());
    (first, schedule, optimizer, second).prop_map(
        |((epochs, max_steps, batch_size, grad_accumulation, learning_rate), schedule, optimizer, second)| {
            let (max_grad_norm, eval_every, save_every, log_every) = second;
            let max_steps =
                max_steps.filter(|steps| !matches!(schedule.warmup, Warmup::Steps(warmup) if warmup >= *steps));
            TrainSection {
                epochs,
                max_steps,
                batch_size,
                grad_accumulation,
                learning_rate,
                schedule,
                optimizer,
                max_grad_norm,
                eval_every,
                save_every,
                log_every,
            }
        },
    )
}

fn run() -> impl Strategy<Value = RunConfig> {
    let checkpointing = prop_oneof![
        Just(GradientCheckpointing::None),
        Just(GradientCheckpointing::Block),
        Just(GradientCheckpointing::Sqrt),
        any::<NonZeroUsize>().prop_map(GradientCheckpointing::Every),
    ];
    let device = prop_oneof![
        Just(DeviceChoice::Auto),
        Just(DeviceChoice::NdArray),
        option::of(any::<usize>()).prop_map(DeviceChoice::Wgpu),
        option::of(any::<usize>()).prop_map(DeviceChoice::Cuda),
        ("[a-z][a-z0-9.-]{0,8}", 1..=u16::MAX, any::<usize>())
            .prop_map(|(host, port, index)| DeviceChoice::Remote(RemoteAddress { host, port, index })),
    ];
    let devices = prop_oneof![
        device.prop_map(Devices::from),
        (1..4usize).prop_map(|count| (0..count).map(|index| DeviceChoice::Cuda(Some(index))).collect::<Devices>()),
    ];
    let frozen = (model(), option::of(quantization()));
    (frozen, adapter(), checkpointing, data(), train(), (file(), devices, any::<u64>())).prop_map(
        |((model, quantization), adapter, gradient_checkpointing, data, mut train, (output, device, seed))| {
            train.eval_every = train.eval_every.filter(|_| !data.eval.is_empty());
            train.grad_accumulation = train.grad_accumulation.max(device.all().len());
            RunConfig { model, adapter, quantization, gradient_checkpointing, data, train, output, device, seed }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_written_run_reads_back_equal(config in run()) {
        let yaml = config.to_yaml();
        match RunConfig::parse(&yaml, "config.yaml", &[]) {
            Ok(read) => prop_assert_eq!(read, config, "{}", yaml),
            Err(error) => prop_assert!(false, "{}\n{}", error, yaml),
        }
    }

    #[test]
    fn a_number_given_as_an_argument_is_read_exactly(rate in positive()) {
        let recipe = "model: {source: m}\ndata: {train: d}\n";
        for argument in [format!("train.learning_rate={rate:?}"), format!("train.learning_rate={rate:e}")] {
            let config = RunConfig::parse(recipe, "recipe.yaml", &[argument]).expect("a positive number");
            prop_assert_eq!(config.train.learning_rate.to_bits(), rate.to_bits());
        }
    }

    #[test]
    fn no_text_makes_the_reader_panic(recipe in "\\PC{0,60}", argument in "\\PC{0,20}") {
        drop(RunConfig::parse(&recipe, "recipe.yaml", &[argument]));
    }

    #[test]
    fn no_value_under_a_known_key_makes_the_reader_panic(
        key in select(vec!["model", "adapter.targets", "data.train", "train.schedule", "device", "quantization.block_size", "gradient_checkpointing"]),
        value in "[\\[\\]{}:, a0.'\"&*!|>-]{0,12}",
    ) {
        drop(RunConfig::parse("seed: 1", "recipe.yaml", &[format!("{key}={value}")]));
    }
}
