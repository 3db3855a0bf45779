//! Which modules get an adapter, and what is said when none does.

mod common;

use burn::tensor::Device;
use common::*;
use emberlora_lora::{Exclude, LoraError, LoraOptions, Targets, attach, detach, trainable_parameters};
use proptest::prelude::*;

fn adapted(options: &LoraOptions) -> Result<Vec<(String, usize, f32)>, LoraError> {
    let device = Device::flex();
    let report = attach(&mut Tiny::new(&device), options, &device)?;
    Ok(report.modules.into_iter().map(|m| (m.name, m.rank, m.scale)).collect())
}

fn names(options: &LoraOptions) -> Vec<String> {
    adapted(options).unwrap().into_iter().map(|(name, ..)| name).collect()
}

fn refusal(options: &LoraOptions) -> String {
    match adapted(options) {
        Ok(modules) => panic!("{options:?} adapts {modules:?}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn all_linear_adapts_everything_but_the_head() {
    let expected = [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ];
    assert_eq!(names(&options(2, Targets::AllLinear)), expected);
}

#[test]
fn the_head_can_be_named() {
    assert_eq!(names(&options(2, suffixes(&["lm_head"]))), ["lm_head"]);
    let regex = Targets::Regex(r"lm_head|.*\.1\..*up_proj".into());
    assert_eq!(names(&options(2, regex)), ["model.layers.1.mlp.up_proj", "lm_head"]);
}

#[test]
fn layers_and_exclusions_narrow_the_targets() {
    let layers = LoraOptions { layers: Some(vec![1]), ..options(2, Targets::AllLinear) };
    assert_eq!(names(&layers), ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]);
    let exclude = LoraOptions { exclude: Exclude::Suffixes(vec!["up_proj".into()]), ..layers };
    assert_eq!(names(&exclude), ["model.layers.1.mlp.down_proj"]);
}

#[test]
fn a_target_that_matches_nothing_lists_what_could_match() {
    let available = "these can match: down_proj, lm_head, up_proj";
    let message = refusal(&options(2, suffixes(&["up_proj", "q_porj"])));
    assert!(message.contains("`q_porj`") && !message.contains("`up_proj`") && message.contains(available), "{message}");
    let message = refusal(&options(2, Targets::Regex("up_proj".into())));
    assert!(message.contains("`up_proj`") && message.contains(available), "{message}");
    let message = refusal(&options(2, suffixes(&[])));
    assert!(message.contains(available), "{message}");
}

#[test]
fn taking_everything_away_is_an_error() {
    let exclude = Exclude::Regex(".*".into());
    let message = refusal(&LoraOptions { exclude, ..options(2, Targets::AllLinear) });
    assert!(message.contains("all 4 projections") && message.contains("`exclude`"), "{message}");
}

#[test]
fn a_layer_that_the_model_lacks_is_an_error() {
    let message = refusal(&LoraOptions { layers: Some(vec![0, 2]), ..options(2, Targets::AllLinear) });
    assert!(message.contains("layer 2") && message.contains("layers 0 to 1"), "{message}");
    let head = LoraOptions { layers: Some(vec![0]), ..options(2, suffixes(&["lm_head"])) };
    // PEFT looks at the layer only where the target is not a full name, so the head is adapted all the same.
    assert_eq!(names(&head), ["lm_head"]);
}

#[test]
fn patterns_set_rank_and_scale() {
    let options = LoraOptions {
        rank_pattern: vec![("layers.0.mlp.up_proj".into(), 4), ("nothing".into(), 9)],
        alpha_pattern: vec![("down_proj".into(), 3.0)],
        rslora: true,
        ..options(2, Targets::AllLinear)
    };
    let root2 = 2f64.sqrt();
    let expected = [(4, 2.0), (2, (3.0 / root2) as f32), (2, (4.0 / root2) as f32), (2, (3.0 / root2) as f32)];
    let found: Vec<(usize, f32)> = adapted(&options).unwrap().into_iter().map(|(_, rank, s)| (rank, s)).collect();
    assert_eq!(found, expected);
    let device = Device::flex();
    let report = attach(&mut Tiny::new(&device), &options, &device).unwrap();
    assert_eq!(report.warnings, ["rank_pattern.nothing decides about no adapted module"]);
}

#[test]
fn a_rank_above_both_sides_of_a_weight_is_an_error_before_anything_is_made() {
    for rank in [INNER + 1, 100_000_000_000, usize::MAX] {
        let message = refusal(&LoraOptions { r: rank, ..options(2, Targets::AllLinear) });
        let expected = format!("`model.layers.0.mlp.up_proj` would be {rank}; its weight allows at most {INNER}");
        assert!(message.contains(&expected), "{message}");
    }
    let head = LoraOptions { rank_pattern: vec![("lm_head".into(), WIDTH + 1)], ..options(2, suffixes(&["lm_head"])) };
    assert!(refusal(&head).contains("`lm_head` would be 7; its weight allows at most 6"));
    names(&options(INNER, Targets::AllLinear));
}

#[test]
fn options_are_checked_without_a_model() {
    let plain = options(2, Targets::AllLinear);
    plain.check().unwrap();
    for (options, start) in [
        (LoraOptions { targets: Targets::Regex("(q".into()), ..plain.clone() }, "targets: `(q`"),
        (LoraOptions { exclude: Exclude::Regex("*".into()), ..plain.clone() }, "exclude: `*`"),
        (LoraOptions { rank_pattern: vec![("up".into(), 2), ("[".into(), 2)], ..plain.clone() }, "rank_pattern: `[`"),
        (
            LoraOptions { alpha_pattern: vec![("a{2".into(), 2.0), (")".into(), 2.0)], ..plain.clone() },
            "alpha_pattern: `)`",
        ),
        (LoraOptions { alpha: 1e300, ..plain.clone() }, "alpha is 1000"),
        (LoraOptions { r: 0, ..plain.clone() }, "r is 0"),
    ] {
        let message = options.check().unwrap_err().to_string();
        assert!(message.starts_with(start), "{message}");
    }
}

#[test]
fn attaching_twice_is_an_error_until_detached() {
    let device = Device::flex();
    let mut model = Tiny::new(&device);
    attach(&mut model, &options(2, suffixes(&["up_proj"])), &device).unwrap();
    let before = factors(&model);
    let error = attach(&mut model, &options(3, suffixes(&["down_proj"])), &device).unwrap_err();
    assert!(matches!(error, LoraError::AlreadyAttached { module } if module == "model.layers.0.mlp.up_proj"));
    assert_eq!(factors(&model), before);
    assert_eq!(detach(&mut model), 2);
    assert_eq!(trainable_parameters(&model), 0);
    attach(&mut model, &options(3, suffixes(&["down_proj"])), &device).unwrap();
}

#[test]
fn initial_values_depend_on_seed_and_module_alone() {
    let device = Device::flex();
    let draw = |options: &LoraOptions| {
        let mut model = Tiny::new(&device);
        attach(&mut model, options, &device).unwrap();
        factors(&model)
    };
    let all = draw(&options(2, Targets::AllLinear));
    let one = draw(&options(2, suffixes(&["1.mlp.down_proj"])));
    assert_eq!(all[3], one[0]);
    assert_ne!(all[1].1, all[3].1);
    assert_ne!(all, draw(&LoraOptions { seed: 8, ..options(2, Targets::AllLinear) }));
    for (name, a, b) in all {
        let bound = 1.0 / if name.ends_with("up_proj") { WIDTH as f32 } else { INNER as f32 }.sqrt();
        assert!(a.iter().all(|v| v.abs() <= bound) && a.iter().any(|v| v.abs() > bound / 2.0));
        assert!(b.iter().all(|v| *v == 0.0));
    }
}

proptest! {
    #[test]
    fn trainable_parameters_are_the_sum_of_r_times_in_plus_out(
        r in 1usize..=WIDTH,
        special in 1usize..=INNER,
        head in any::<bool>(),
    ) {
        let device = Device::flex();
        let mut model = Tiny::new(&device);
        let targets = if head { suffixes(&["up_proj", "lm_head"]) } else { suffixes(&["up_proj"]) };
        let rank_pattern = vec![("layers.1.mlp.up_proj".to_owned(), special)];
        let report = attach(&mut model, &LoraOptions { rank_pattern, ..options(r, targets) }, &device).unwrap();
        let expected = (r + special) * (WIDTH + INNER) + usize::from(head) * r * (WIDTH + VOCABULARY);
        prop_assert_eq!(report.trainable_parameters, expected);
        prop_assert_eq!(trainable_parameters(&model), expected);
    }
}
