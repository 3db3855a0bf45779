//! What a recipe says and what loading does with it.

use emberlora_config::{ChatTemplateChoice, LossOn, Overflow, RunConfig};
use emberlora_data::{DataOptions, Format, PrefixSharing, Source};

const RECIPE: &str = "
model: {source: m}
data:
  train: [{path: a.jsonl, weight: 2.0}, {path: b.jsonl.gz, format: tokens}]
  eval: c.jsonl
  format: chat
  chat_template: zephyr
  loss_on: last_assistant
  max_seq_len: 77
  overflow: drop
  packing: false
train: {batch_size: 3}
seed: 9
";

#[test]
fn training_reads_what_the_recipe_says() {
    let config = RunConfig::parse(RECIPE, "recipe.yaml", &[]).unwrap();
    let options = DataOptions::from(&config);
    let expected = DataOptions {
        sources: vec![
            Source::new("a.jsonl".into(), Some(Format::Chat), 2.0),
            Source::new("b.jsonl.gz".into(), Some(Format::Tokens), 1.0),
        ],
        chat_template: ChatTemplateChoice::Zephyr,
        loss_on: LossOn::LastAssistant,
        max_seq_len: 77,
        overflow: Overflow::Drop,
        packing: false,
        share_prefix: PrefixSharing::PackingOff,
        shuffle: true,
        batch_size: 3,
        seed: 9,
    };
    assert_eq!(options, expected);
}

#[test]
fn evaluation_keeps_the_order_of_its_files() {
    let config = RunConfig::parse(RECIPE, "recipe.yaml", &[]).unwrap();
    let options = DataOptions::eval(&config);
    assert_eq!(options.sources, [Source::new("c.jsonl".into(), Some(Format::Chat), 1.0)]);
    assert!(!options.shuffle);
}

#[test]
fn why_prefixes_are_not_shared_is_the_first_reason() {
    let sharing = |overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
        DataOptions::train(&RunConfig::parse(RECIPE, "recipe.yaml", &overrides).unwrap())
    };
    let [packing, off, dropout] = ["data.packing=true", "data.share_prefix=off", "adapter.dropout=0.1"];
    assert_eq!(sharing(&[packing]).share_prefix, PrefixSharing::On);
    assert_eq!(sharing(&[packing, dropout]).share_prefix, PrefixSharing::Dropout);
    assert_eq!(sharing(&[packing, off, dropout]).share_prefix, PrefixSharing::OffByRecipe);
    assert_eq!(sharing(&[off]).share_prefix, PrefixSharing::OffByRecipe);
    assert_eq!(sharing(&[dropout]).share_prefix, PrefixSharing::PackingOff);
    let outside = |options: DataOptions| options.without_sharing(PrefixSharing::PositionsDependOnLength).share_prefix;
    assert_eq!(outside(sharing(&[packing])), PrefixSharing::PositionsDependOnLength);
    assert_eq!(outside(sharing(&[packing, dropout])), PrefixSharing::Dropout);
}

#[test]
fn evaluation_drops_nothing_and_shares_prefixes() {
    let overrides = ["data.packing=true".to_owned(), "adapter.dropout=0.1".to_owned()];
    let config = RunConfig::parse(RECIPE, "recipe.yaml", &overrides).unwrap();
    assert_eq!(DataOptions::eval(&config).share_prefix, PrefixSharing::On);
}
