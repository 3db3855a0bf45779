//! `data`: which rows are read and how they become tokens and labels.

use std::path::PathBuf;

use serde_json::{Value as Json, json};

use crate::node::{Content, Node};
use crate::spec::{
    Below, Reader, Section, Spec, boolean, choice, number, or, path, read_text, required, section, value, whole,
};

choice! {
    /// The shape of a JSONL row.
    pub enum DataFormat {
        /// Decided by the first row of each file.
        Auto = "auto";
        /// `{"messages": [{"role", "content"}, ...], "tools"?}`.
        Chat = "chat";
        /// `{"prompt", "completion"}`.
        Prompt = "prompt";
        /// `{"instruction", "input", "output"}`.
        Alpaca = "alpaca";
        /// `{"text"}`.
        Text = "text";
        /// `{"input_ids", "labels"}`, with -100 where a label is not trained.
        Tokens = "tokens";
    }
}

choice! {
    /// Which tokens of a conversation are trained.
    pub enum LossOn {
        /// Every assistant turn with its end-of-turn token.
        Assistant = "assistant";
        /// The last assistant turn with its end-of-turn token.
        LastAssistant = "last_assistant";
        /// Every token.
        All = "all";
    }
}

choice! {
    /// What becomes of a row longer than `max_seq_len`.
    pub enum Overflow {
        /// Its end is cut off.
        Truncate = "truncate";
        /// It is left out and counted.
        Drop = "drop";
        /// The run stops and names the row.
        Error = "error";
    }
}

choice! {
    /// Whether documents of a packed row share the tokens that they begin with.
    pub enum SharePrefix {
        /// Wherever that changes nothing but the time it takes.
        Auto = "auto";
        /// Never.
        Off = "off";
    }
}

/// Which chat template turns messages into text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChatTemplateChoice {
    /// The template that comes with the tokenizer.
    Auto,
    /// ChatML: `<|im_start|>role\ncontent<|im_end|>`.
    Chatml,
    /// Tülu: `<|user|>\ncontent\n<|assistant|>\n`.
    Tulu,
    /// Llama 3: `<|start_header_id|>role<|end_header_id|>\n\ncontent<|eot_id|>`.
    Llama3,
    /// Zephyr: `<|user|>\ncontent</s>\n<|assistant|>\n`.
    Zephyr,
    /// A file with a Jinja template, its name ending in `.jinja`.
    File(PathBuf),
}

section! {
    /// One file of rows.
    #[derive(derive_new::new)]
    pub struct DataSource {
        /// A JSONL file, plain or compressed with gzip (`.gz`) or zstd (`.zst`).
        path: PathBuf = required(PathBuf::new()) => path();
        /// The shape of its rows; `auto` takes `data.format`.
        format: DataFormat = value(DataFormat::Auto) => choice();
        /// How many times its rows count in an epoch.
        weight: f64 = value(1.0) => number().above(0.0).at_most(DataSource::MAX_WEIGHT);
    }
}

impl DataSource {
    /// The largest [`weight`](DataSource::weight). The rows of an epoch are listed in memory as often as they count.
    pub const MAX_WEIGHT: f64 = 1e4;
}

section! {
    /// The rows to train and evaluate on.
    pub struct DataSection {
        /// What to train on: a path, or a list whose items are paths or `{path, format, weight}`.
        train: Vec<DataSource> = required(Vec::new()) => SourcesSpec { nullable: false };
        /// What to evaluate on, written like `train`; `null` evaluates on nothing.
        eval: Vec<DataSource> = value(Vec::new()) => SourcesSpec { nullable: true };
        /// The shape of the rows; `auto` decides by the first row of each file and says what it chose.
        format: DataFormat = value(DataFormat::Auto) => choice();
        /// The template that turns messages into text: `auto` is the tokenizer's own; the others are built in; or a file
        /// whose name ends in `.jinja`.
        chat_template: ChatTemplateChoice = value(ChatTemplateChoice::Auto) => TemplateSpec;
        /// Which tokens of a conversation are trained: every assistant turn, only the last, or all tokens.
        loss_on: LossOn = value(LossOn::Assistant) => choice();
        /// Longest row in tokens; with packing, the length of a packed row, in which a shared token counts once.
        max_seq_len: usize = value(1024) => whole().at_least(2);
        /// What becomes of a row longer than `max_seq_len`: its end is cut off, it is dropped and counted, or the run
        /// stops.
        overflow: Overflow = value(Overflow::Truncate) => choice();
        /// Pack several documents into one row. Attention and positions stop at each document's border, so this changes
        /// speed and never the loss.
        packing: bool = value(true) => boolean();
        /// With packing, compute the tokens that several documents of a row begin with once, such as a system prompt or
        /// the prompt of several completions; documents that have many in common are packed together. This changes speed
        /// and never the loss. `auto` leaves it off, and says so, with `adapter.dropout` above 0 and for a model whose
        /// position embeddings depend on the length of a row.
        share_prefix: SharePrefix = value(SharePrefix::Auto) => choice();
        /// Shuffle the rows of every epoch. The order depends on `seed` and the epoch alone.
        shuffle: bool = value(true) => boolean();
    }
    check inherit_format;
}

/// A source that leaves its format open takes that of the section.
fn inherit_format(data: &mut DataSection, _: &Node, _: &mut Reader<'_>) {
    for source in data.train.iter_mut().chain(&mut data.eval) {
        if source.format == DataFormat::Auto {
            source.format = data.format;
        }
    }
}

/// A path, or a list of paths and [`DataSource`]s; nothing at all is `null`.
struct SourcesSpec {
    nullable: bool,
}

impl SourcesSpec {
    fn source(path: PathBuf) -> DataSource {
        DataSource::new(path, DataFormat::Auto, 1.0)
    }
}

impl Spec for SourcesSpec {
    type Out = Vec<DataSource>;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<Vec<DataSource>> {
        match &node.content {
            Content::Text(_) => path().read(node, reader).map(|path| vec![Self::source(path)]),
            Content::Null if self.nullable => Some(Vec::new()),
            Content::List(items) if items.is_empty() && !self.nullable => {
                reader.refuse(node, "is empty", self.allowed())
            }
            Content::List(items) => {
                let read: Vec<_> = items
                    .iter()
                    .enumerate()
                    .map(|(index, item)| reader.item(index, |reader| read_source(item, reader)))
                    .collect();
                read.into_iter().collect()
            }
            _ => reader.wrong_type(node, self.allowed()),
        }
    }

    fn write(&self, value: &Vec<DataSource>) -> Node {
        if value.is_empty() && self.nullable {
            return Node::made(Content::Null);
        }
        Node::list(value.iter().map(Section::write))
    }

    fn allowed(&self) -> String {
        let null = if self.nullable { ", or null" } else { "" };
        format!("a path, or a list whose items are {SOURCE}{null}")
    }

    fn schema(&self) -> Json {
        let item = json!({"anyOf": [path().schema(), section::<DataSource>().schema()]});
        let mut list = json!({"type": "array", "items": item});
        if self.nullable {
            json!({"anyOf": [path().schema(), list, {"type": "null"}]})
        } else {
            list["minItems"] = json!(1);
            json!({"anyOf": [path().schema(), list]})
        }
    }

    fn below(&self) -> Below {
        Below::Items(DataSource::fields())
    }
}

const SOURCE: &str = "paths or {path, format, weight}";

fn read_source(node: &Node, reader: &mut Reader<'_>) -> Option<DataSource> {
    match &node.content {
        Content::Text(_) => path().read(node, reader).map(SourcesSpec::source),
        Content::Map(_) => DataSource::read(node, reader),
        _ => reader.wrong_type(node, "a path or {path, format, weight}"),
    }
}

const TEMPLATES: [(&str, ChatTemplateChoice); 5] = [
    ("auto", ChatTemplateChoice::Auto),
    ("chatml", ChatTemplateChoice::Chatml),
    ("tulu", ChatTemplateChoice::Tulu),
    ("llama3", ChatTemplateChoice::Llama3),
    ("zephyr", ChatTemplateChoice::Zephyr),
];

struct TemplateSpec;

impl Spec for TemplateSpec {
    type Out = ChatTemplateChoice;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<ChatTemplateChoice> {
        let text = read_text(node, reader, &self.allowed())?;
        match TEMPLATES.iter().find(|(name, _)| *name == text) {
            Some((_, choice)) => Some(choice.clone()),
            None if text.ends_with(".jinja") => Some(ChatTemplateChoice::File(PathBuf::from(text))),
            None => reader.unknown_name(node, text, &TEMPLATES.map(|(name, _)| name), self.allowed()),
        }
    }

    fn write(&self, value: &ChatTemplateChoice) -> Node {
        if let ChatTemplateChoice::File(file) = value {
            return path().write(file);
        }
        let name = TEMPLATES.iter().find(|(_, choice)| choice == value);
        Node::text(name.map_or("auto", |(name, _)| name))
    }

    fn allowed(&self) -> String {
        format!("{}, or a path that ends in .jinja", or(&TEMPLATES.map(|(name, _)| name)))
    }

    fn schema(&self) -> Json {
        let names = TEMPLATES.map(|(name, _)| name);
        json!({"anyOf": [{"enum": names}, {"type": "string", "pattern": "\\.jinja$"}]})
    }
}
