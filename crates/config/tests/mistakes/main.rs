//! Wrong recipes: every mistake is reported, with what a reader needs to mend it.

mod values;

use emberlora_config::{ConfigError, Place, Problem, RunConfig};

/// A recipe with nothing but the required keys.
const MINIMAL: &str = "model: {source: m}\ndata: {train: d.jsonl}\n";

fn problems(recipe: &str, overrides: &[&str]) -> Vec<Problem> {
    let overrides: Vec<_> = overrides.iter().map(|argument| (*argument).to_owned()).collect();
    match RunConfig::parse(recipe, "recipe.yaml", &overrides) {
        Ok(config) => panic!("accepted as {config:?}\n{recipe}"),
        Err(error) => error.problems().to_vec(),
    }
}

fn only(recipe: &str, overrides: &[&str]) -> Problem {
    let problems = problems(recipe, overrides);
    assert_eq!(problems.len(), 1, "{problems:#?}");
    problems.into_iter().next().expect("one problem")
}

/// `key: value` alone, with the required keys, must be refused at `at`, saying that `allowed` is allowed.
#[track_caller]
fn refused(argument: &str, at: &str, allowed: &str) {
    let problem = only(MINIMAL, &[argument]);
    assert_eq!(problem.key, at, "{problem}");
    assert_eq!(problem.place, Place::Argument(argument.to_owned()));
    assert!(problem.found.is_some(), "{problem}");
    let stated = problem.allowed.clone().unwrap_or_default();
    assert!(stated.contains(allowed), "{problem}\nshould allow: {allowed}");
}

#[test]
fn all_mistakes_are_reported_at_once_in_the_order_of_their_lines() {
    let recipe = "\
model:
  source: models/smollm2
  dtype: bf61
adapter:
  r: sixteen
  dropout: 1.5
  ranks: {}
data:
  trian: data/train.jsonl
train:
  schedule: {kind: cosine, warmup_ratio: 0.1, warmup_steps: 10}
  learning_rate: -1
";
    let found: Vec<_> = problems(recipe, &["train.epochs=none"]);
    let summary: Vec<_> = found
        .iter()
        .map(|problem| {
            (problem.place.clone(), problem.key.as_str(), problem.found.as_deref(), problem.nearest.as_deref())
        })
        .collect();
    let line = Place::Line;
    assert_eq!(
        summary,
        [
            (line(3), "model.dtype", Some("bf61"), Some("bf16")),
            (line(5), "adapter.r", Some("sixteen"), None),
            (line(6), "adapter.dropout", Some("1.5"), None),
            (line(7), "adapter.ranks", Some("{}"), Some("rank_pattern")),
            (line(9), "data.trian", Some("data/train.jsonl"), Some("train")),
            (line(11), "train.schedule.warmup_steps", Some("10"), None),
            (line(12), "train.learning_rate", Some("-1"), None),
            (Place::Argument("train.epochs=none".to_owned()), "train.epochs", Some("none"), None),
            (Place::Nowhere, "data.train", None, None),
        ],
        "{found:#?}"
    );
}

#[test]
fn the_message_lists_line_key_value_nearest_and_allowed() {
    let recipe = "model: {source: m}\nadapter:\n  drouput: 0.1\n  dropout: 2\ndata: {train: d}\n";
    let error = RunConfig::parse(recipe, "runs/a.yaml", &[]).expect_err("two mistakes");
    let expected = "\
runs/a.yaml: 2 mistakes in the recipe
  line 3: adapter.drouput: unknown key; found 0.1; did you mean `dropout`? Allowed: kind, r, alpha, dropout, targets, \
exclude, layers, rank_pattern, alpha_pattern, rslora, init_from, task_type
  line 4: adapter.dropout: out of range; found 2; allowed: a number of at least 0 and below 1";
    assert_eq!(error.to_string(), expected);
}

#[test]
fn required_keys_are_named_when_they_are_missing() {
    let keys: Vec<_> = problems("adapter: {r: 4}\n", &[]).into_iter().map(|problem| problem.key).collect();
    assert_eq!(keys, ["model.source", "data.train"]);
    assert_eq!(only("model: {source: m}\ndata:\n", &[]).key, "data.train");
}

#[test]
fn a_misspelt_key_names_the_nearest_one() {
    for (argument, nearest) in [
        ("modle.source=x", "model"),
        ("model.sauce=x", "source"),
        ("adapter.R=8", "r"),
        ("train.lerning_rate=1", "learning_rate"),
        ("train.optimizer.beta=1", "betas"),
        ("train.schedule.warmup=3", "warmup_steps"),
        ("gradient_checkpointing.evry=3", "every"),
    ] {
        let found = problems(MINIMAL, &[argument]);
        assert_eq!(found[0].nearest.as_deref(), Some(nearest), "{}", found[0]);
        assert_eq!(found[0].message, "unknown key");
    }
}

#[test]
fn a_key_in_the_wrong_section_names_the_right_path() {
    assert_eq!(only(MINIMAL, &["learning_rate=1e-4"]).nearest.as_deref(), Some("train.learning_rate"));
    assert_eq!(only(MINIMAL, &["train.packing=true"]).nearest.as_deref(), Some("data.packing"));
    assert_eq!(only(MINIMAL, &["train.betas=[0, 0]"]).nearest.as_deref(), Some("train.optimizer.betas"));
}

#[test]
fn combinations_that_make_no_sense_are_refused() {
    for (overrides, key) in [
        (&["train.schedule.warmup_steps=3", "train.schedule.warmup_ratio=0.1"][..], "train.schedule.warmup_steps"),
        (&["adapter.layers=[0]", "adapter.targets='.*q_proj'"], "adapter.layers"),
        (&["adapter.kind=none", "adapter.init_from=a"], "adapter.init_from"),
        (&["train.eval_every=5"], "train.eval_every"),
        (&["train.eval_every=5", "data.eval=[]"], "train.eval_every"),
        (&["train.schedule.kind=constant", "train.schedule.min_ratio=0.1"], "train.schedule.min_ratio"),
        (&["train.max_steps=5", "train.schedule.warmup_steps=5"], "train.schedule.warmup_steps"),
    ] {
        let problem = only(MINIMAL, overrides);
        assert_eq!(problem.key, key, "{problem}");
        assert!(problem.allowed.is_some(), "{problem}");
    }
}

#[test]
fn a_combination_is_not_reported_because_of_another_mistake() {
    let problem = only(MINIMAL, &["train.eval_every=5", "data.eval=[{path: e, weight: 0}]"]);
    assert_eq!(problem.key, "data.eval[0].weight");
}

#[test]
fn keys_given_twice_are_refused_wherever_they_stand() {
    let recipe = "\
seed: 1
model: {source: m}
adapter:
  r: 8
  r: 9
  rank_pattern: {q_proj: 1, q_proj: 2}
data: {train: [{path: d, path: e}]}
seed: 2
";
    let found: Vec<_> = problems(recipe, &[]).into_iter().map(|p| (p.place, p.key, p.message)).collect();
    let twice = |line, key: &str, first: u64| {
        (Place::Line(line), key.to_owned(), format!("given twice, first on line {first}"))
    };
    assert_eq!(
        found,
        [
            twice(5, "adapter.r", 4),
            twice(6, "adapter.rank_pattern.q_proj", 6),
            twice(7, "data.train[0].path", 7),
            twice(8, "seed", 1),
        ]
    );
}

#[test]
fn a_recipe_that_holds_nothing_is_refused() {
    for recipe in ["", "\n\n", "# only a comment\n", "---\n", "null\n"] {
        assert_eq!(only(recipe, &[]).message, "the recipe is empty", "{recipe:?}");
    }
}

#[test]
fn a_recipe_that_is_no_mapping_is_refused() {
    for recipe in ["- model\n", "model\n", "3\n", "[a, b]\n"] {
        let problem = only(recipe, &[]);
        assert_eq!(problem.message, "the recipe is not a mapping", "{recipe:?}");
        assert_eq!(problem.place, Place::Line(1));
    }
}

#[test]
fn broken_yaml_is_refused_with_its_line() {
    for (recipe, line) in [
        ("model: {source: m\ndata: [\n", 2..=3),
        ("model:\n  source: m\n data: x\n", 3..=3),
        ("model: 'x\n", 1..=2),
        ("model: *nowhere\n", 1..=1),
        ("seed: !odd 3\n", 1..=1),
        ("seed: 1\n---\nseed: 2\n", 1..=3),
    ] {
        let problem = only(recipe, &[]);
        assert!(problem.message.starts_with("not valid YAML"), "{problem}");
        match problem.place {
            Place::Line(found) => assert!(line.contains(&found), "{problem}"),
            _ => panic!("no line: {problem}"),
        }
    }
}

#[test]
fn a_tab_as_indentation_is_named() {
    let problem = only("seed: 1\nmodel:\n\tsource: m\n", &[]);
    assert!(problem.message.starts_with("not valid YAML"), "{problem}");
    let allowed = problem.allowed.expect("says what is allowed");
    assert!(allowed.contains("line 3 is indented with a tab"), "{allowed}");
}

#[test]
fn overrides_that_cannot_be_laid_over_are_refused() {
    for (argument, message) in [
        ("adapter.r", "has no `=`"),
        ("=3", "has an empty key"),
        ("adapter..r=3", "has an empty key"),
        ("adapter.r=[", "the value is not YAML"),
        ("adapter.r={a: 1", "the value is not YAML"),
    ] {
        let problem = only(MINIMAL, &[argument]);
        assert!(problem.message.starts_with(message), "{problem}");
        assert_eq!(problem.place, Place::Argument(argument.to_owned()));
    }
    for argument in ["output=a #b", "data.eval=#b", "adapter.rank_pattern={a: 1} # one", "data.train=\n- a # b\n- c"] {
        let problem = only(MINIMAL, &[argument]);
        assert!(problem.message.contains("a YAML comment"), "{problem}");
        assert!(problem.allowed.as_deref().is_some_and(|allowed| allowed.contains("quotes")), "{problem}");
    }
    let list = "model: {source: m}\ndata: {train: [a, b]}\n";
    for argument in ["data.train.3=c", "data.train.x=c", "data.train.-1=c"] {
        let problem = only(list, &[argument]);
        assert_eq!(problem.message, "there is no such item in the list");
        assert_eq!(problem.allowed.as_deref(), Some("an index from 0 to 2"));
    }
}

#[test]
fn an_unknown_path_in_an_override_is_a_misspelt_key() {
    let problem = only(MINIMAL, &["adapter.lora.r=8"]);
    assert_eq!((problem.key.as_str(), problem.message.as_str()), ("adapter.lora", "unknown key"));
}

#[test]
fn an_override_mends_what_the_file_has_wrong() {
    let recipe = "model: {source: m}\ndata: {train: d}\nadapter: {r: zero}\n";
    assert_eq!(only(recipe, &[]).key, "adapter.r");
    let config = RunConfig::parse(recipe, "recipe.yaml", &["adapter.r=4".to_owned()]).expect("mended");
    assert_eq!(config.adapter.r, 4);
}

#[test]
fn long_values_are_cut_short_in_messages() {
    let problem = only(MINIMAL, &[&format!("adapter.r={}", "x".repeat(500))]);
    assert!(problem.found.expect("found").chars().count() <= 81);
}

#[test]
fn a_file_that_cannot_be_read_names_its_path() {
    let dir = tempfile::tempdir().expect("a directory");
    let missing = dir.path().join("missing.yaml");
    let error = RunConfig::load(&missing, &[]).expect_err("there is no file");
    assert!(matches!(error, ConfigError::Read { .. }));
    assert!(error.to_string().contains("missing.yaml"), "{error}");
    assert!(error.problems().is_empty());

    let binary = dir.path().join("binary.yaml");
    std::fs::write(&binary, [0xff, 0xfe, 0x00]).expect("written");
    assert!(matches!(RunConfig::load(&binary, &[]), Err(ConfigError::Read { .. })));
}
