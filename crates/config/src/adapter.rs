//! `adapter`: where LoRA adapters sit and how large they are, by PEFT's rules.

use std::path::PathBuf;

use indexmap::IndexMap;
use serde_json::{Value as Json, json};

use crate::node::{Content, Node};
use crate::spec::{
    Reader, Spec, Whole, boolean, choice, list, mapping, number, optional, path, read_text, text, value, whole,
};

choice! {
    /// What is attached to the frozen model.
    pub enum AdapterKind {
        /// Low-rank adapters (Hu et al. 2021, <https://arxiv.org/abs/2106.09685>).
        Lora = "lora";
        /// Nothing: the base model is evaluated or generated with as it is.
        None = "none";
    }
}

choice! {
    /// What the adapted model is for, as recorded in `adapter_config.json`.
    pub enum TaskType {
        /// Causal language modelling.
        CausalLm = "CAUSAL_LM";
    }
}

/// Which projections get an adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Every projection but the language-model head.
    AllLinear,
    /// Projections whose module path equals one of these names or ends in `.name`.
    Suffixes(Vec<String>),
    /// Projections whose whole module path matches this regular expression.
    Regex(String),
}

/// Which projections, of those matched by [`Targets`], get none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exclude {
    /// Projections whose module path equals one of these names or ends in `.name`. Empty excludes nothing.
    Suffixes(Vec<String>),
    /// Projections whose whole module path matches this regular expression.
    Regex(String),
}

/// Wider than any layer of any model: what is larger is a slip, and no model has to be read to say so.
fn rank() -> Whole<usize> {
    whole().at_least(1).at_most(1 << 16)
}

section! {
    /// The LoRA adapters, with PEFT's meaning for every key.
    pub struct AdapterSection {
        /// `lora` attaches adapters; `none` leaves the base model as it is, to evaluate or generate with it.
        kind: AdapterKind = value(AdapterKind::Lora) => choice();
        /// Rank: A is `[r, in]` and B is `[out, r]`.
        r: usize = value(16) => rank();
        /// The adapter's output is scaled by `alpha / r`, or by `alpha / sqrt(r)` with `rslora`.
        alpha: f64 = value(32.0) => number().above(0.0);
        /// Probability with which an element of the adapter's input is zeroed while training.
        dropout: f64 = value(0.0) => number().at_least(0.0).below(1.0);
        /// Which projections get an adapter: `all-linear` is every projection but the head; a list matches the end of
        /// the module path (`q_proj`, `self_attn.q_proj`); any other string is a regular expression that must match the
        /// whole module path.
        targets: Targets = value(Targets::AllLinear) => TargetsSpec;
        /// Projections that get none although `targets` matches them: a list of path endings or a regular expression.
        exclude: Exclude = value(Exclude::Suffixes(Vec::new())) => ExcludeSpec;
        /// Indices of the blocks that get adapters; `null` is every block. Not with a regular expression in `targets`,
        /// which can name blocks itself.
        layers: Option<Vec<usize>> = value(None) => optional(list(whole()).non_empty());
        /// Ranks that differ from `r`: module path ending, or regular expression for one, to rank. The first entry that
        /// matches wins.
        rank_pattern: IndexMap<String, usize> = value(IndexMap::new()) => mapping("name or regular expression", rank());
        /// Alphas that differ from `alpha`, matched like `rank_pattern`.
        alpha_pattern: IndexMap<String, f64> = value(IndexMap::new()) => mapping("name or regular expression", number().above(0.0));
        /// Scale by `alpha / sqrt(r)` (Kalajdzievski 2023, <https://arxiv.org/abs/2312.03732>).
        rslora: bool = value(false) => boolean();
        /// Directory of a PEFT adapter whose A and B training starts from; `null` starts from A random, B = 0.
        init_from: Option<PathBuf> = value(None) => optional(path());
        /// Recorded in `adapter_config.json`.
        task_type: TaskType = value(TaskType::CausalLm) => choice();
    }
    check check_adapter;
}

fn check_adapter(adapter: &mut AdapterSection, node: &Node, reader: &mut Reader<'_>) {
    if matches!(adapter.targets, Targets::Regex(_)) && adapter.layers.is_some() {
        reader.conflict(
            node,
            "layers",
            "cannot be combined with a regular expression in `targets`",
            "null; or name the blocks in the regular expression; or give `targets` as a list",
        );
    }
    if adapter.kind == AdapterKind::None && adapter.init_from.is_some() {
        reader.conflict(
            node,
            "init_from",
            "cannot be combined with `kind: none`, which has no adapter to start from it",
            "null, or `kind: lora`",
        );
    }
}

const ALL_LINEAR: &str = "all-linear";

struct TargetsSpec;

impl Spec for TargetsSpec {
    type Out = Targets;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<Targets> {
        match &node.content {
            Content::List(_) => list(text()).non_empty().read(node, reader).map(Targets::Suffixes),
            Content::Text(text) if text == ALL_LINEAR => Some(Targets::AllLinear),
            _ => read_text(node, reader, &self.allowed()).map(|text| Targets::Regex(text.to_owned())),
        }
    }

    fn write(&self, value: &Targets) -> Node {
        match value {
            Targets::AllLinear => Node::text(ALL_LINEAR),
            Targets::Suffixes(names) => list(text()).write(names),
            Targets::Regex(regex) => Node::text(regex),
        }
    }

    fn allowed(&self) -> String {
        format!("{ALL_LINEAR}, a list of one or more path endings, or a regular expression")
    }

    fn schema(&self) -> Json {
        json!({"anyOf": [{"const": ALL_LINEAR}, text().schema(), list(text()).non_empty().schema()]})
    }
}

struct ExcludeSpec;

impl Spec for ExcludeSpec {
    type Out = Exclude;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<Exclude> {
        match &node.content {
            Content::List(_) => list(text()).read(node, reader).map(Exclude::Suffixes),
            _ => read_text(node, reader, &self.allowed()).map(|text| Exclude::Regex(text.to_owned())),
        }
    }

    fn write(&self, value: &Exclude) -> Node {
        match value {
            Exclude::Suffixes(names) => list(text()).write(names),
            Exclude::Regex(regex) => Node::text(regex),
        }
    }

    fn allowed(&self) -> String {
        "a list of path endings, or a regular expression".to_owned()
    }

    fn schema(&self) -> Json {
        json!({"anyOf": [text().schema(), list(text()).schema()]})
    }
}
