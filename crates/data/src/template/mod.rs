//! Chat templates: conversations as text, exactly as transformers renders them, and which bytes of it are trained.
//!
//! The spans come from where the text came from. A template with `{% generation %}` blocks says it itself; for any
//! other template the module `spans` finds out by rendering.

mod environment;
mod generation;
mod marks;
mod python;
mod spans;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use emberlora_config::{ChatTemplateChoice, LossOn};
use jiff::civil::DateTime;
use minijinja::value::Serde;
use minijinja::{Environment, Value};
use serde_json::{Map, Value as Json};
use sha2::{Digest, Sha256};

use crate::mask::MaskError;
use crate::{Conversation, Message, Tokenizer};
use spans::TurnShape;

/// Why a conversation cannot be rendered, or its trained spans are unknown.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template file cannot be read.
    #[error("chat template {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The template is not valid Jinja.
    #[error("chat template {name}: {reason}")]
    Syntax {
        /// Where the template is from.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The tokenizer has several templates and none is the default.
    #[error(
        "the tokenizer has chat templates named {names} but no default one: set `data.chat_template` to a .jinja file"
    )]
    NoDefault {
        /// The names.
        names: String,
    },
    /// The template refuses the conversation, or uses something that does not exist.
    #[error("the chat template {name} fails on this conversation: {reason}")]
    Render {
        /// Where the template is from.
        name: String,
        /// What it said.
        reason: String,
    },
    /// There is nothing to render.
    #[error("the conversation has no messages")]
    Empty,
    /// Which bytes are trained cannot be established exactly.
    #[error("cannot tell which tokens of this conversation are trained: {0}")]
    Spans(String),
    /// Tokens and trained bytes do not fit together.
    #[error("cannot tell which tokens of this conversation are trained: {0}")]
    Mask(#[from] MaskError),
}

/// What a rendering is for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RenderOptions {
    /// Ends the text with the header of an assistant's turn, for the model to continue.
    pub add_generation_prompt: bool,
    /// Further variables of the template, such as `enable_thinking`.
    pub variables: Map<String, Json>,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// The byte ranges of the text that are trained, in ascending order, without overlaps.
    pub spans: Vec<Range<usize>>,
}

/// A chat template with the special tokens that it may write.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    default: Arc<Compiled>,
    /// Taken for conversations with tools, where a tokenizer has one.
    tool_use: Option<Arc<Compiled>>,
    hash: String,
}

/// One template, compiled.
#[derive(Debug)]
struct Compiled {
    name: String,
    env: Environment<'static>,
    /// The special tokens as variables (`bos_token`, `eos_token`, …).
    variables: Map<String, Json>,
    /// Texts that the tokenizer takes as one token.
    added_tokens: Vec<String>,
    has_generation: bool,
    shape: OnceLock<Result<TurnShape, String>>,
}

/// The project's own templates: name and source.
const PRESETS: [(&str, &str); 4] = [
    ("chatml", include_str!("presets/chatml.jinja")),
    ("tulu", include_str!("presets/tulu.jinja")),
    ("llama3", include_str!("presets/llama3.jinja")),
    ("zephyr", include_str!("presets/zephyr.jinja")),
];

impl Tokenizer {
    /// The chat template of a recipe; `None` when the tokenizer's own is asked for and it has none.
    ///
    /// # Errors
    /// When a file cannot be read, a template is not valid, or the tokenizer has several and none is the default.
    pub fn chat_template(&self, choice: &ChatTemplateChoice) -> Result<Option<ChatTemplate>, TemplateError> {
        match choice {
            ChatTemplateChoice::Auto => ChatTemplate::of_tokenizer(self),
            ChatTemplateChoice::Chatml => ChatTemplate::preset("chatml", self).map(Some),
            ChatTemplateChoice::Tulu => ChatTemplate::preset("tulu", self).map(Some),
            ChatTemplateChoice::Llama3 => ChatTemplate::preset("llama3", self).map(Some),
            ChatTemplateChoice::Zephyr => ChatTemplate::preset("zephyr", self).map(Some),
            ChatTemplateChoice::File(path) => ChatTemplate::from_file(path, self).map(Some),
        }
    }
}

impl ChatTemplate {
    /// Compiles a template for a tokenizer; `name` stands in messages.
    ///
    /// # Errors
    /// When the source is not valid Jinja.
    pub fn new(name: &str, source: &str, tokenizer: &Tokenizer) -> Result<Self, TemplateError> {
        Ok(Self {
            default: Arc::new(Compiled::new(name, source, tokenizer, jiff::Zoned::now().datetime())?),
            tool_use: None,
            hash: hash(&[source]),
        })
    }

    /// The same template at another time of day, for templates that write the date.
    ///
    /// # Errors
    /// When the source is not valid Jinja.
    pub fn at_time(name: &str, source: &str, tokenizer: &Tokenizer, now: DateTime) -> Result<Self, TemplateError> {
        Ok(Self {
            default: Arc::new(Compiled::new(name, source, tokenizer, now)?),
            tool_use: None,
            hash: hash(&[source]),
        })
    }

    fn from_file(path: &Path, tokenizer: &Tokenizer) -> Result<Self, TemplateError> {
        let source =
            std::fs::read_to_string(path).map_err(|source| TemplateError::Read { path: path.to_owned(), source })?;
        Self::new(&path.display().to_string(), &source, tokenizer)
    }

    fn preset(name: &str, tokenizer: &Tokenizer) -> Result<Self, TemplateError> {
        let source = PRESETS.iter().find(|(preset, _)| *preset == name).map_or("", |(_, source)| source);
        Self::new(name, source, tokenizer)
    }

    fn of_tokenizer(tokenizer: &Tokenizer) -> Result<Option<Self>, TemplateError> {
        let templates = tokenizer.chat_templates();
        let Some(default) = &templates.default else {
            if templates.named.is_empty() {
                return Ok(None);
            }
            let names: Vec<_> = templates.named.keys().map(String::as_str).collect();
            return Err(TemplateError::NoDefault { names: names.join(", ") });
        };
        let mut template = Self::new("of the tokenizer", default, tokenizer)?;
        if let Some(tool_use) = templates.named.get("tool_use") {
            template.hash = hash(&[default, tool_use]);
            let now = jiff::Zoned::now().datetime();
            let compiled = Compiled::new("tool_use of the tokenizer", tool_use, tokenizer, now)?;
            template.tool_use = Some(Arc::new(compiled));
        }
        Ok(Some(template))
    }

    /// The text of a conversation, as `apply_chat_template(..., tokenize=False)` of transformers gives it.
    ///
    /// # Errors
    /// When the conversation is empty or the template refuses it.
    pub fn render(&self, conversation: &Conversation, options: &RenderOptions) -> Result<String, TemplateError> {
        if conversation.messages.is_empty() {
            return Err(TemplateError::Empty);
        }
        let compiled = self.for_conversation(conversation);
        let marked = compiled.render(&conversation.messages, conversation.tools.as_ref(), options)?;
        if !compiled.has_generation {
            return Ok(marked);
        }
        spans::without_blocks(&marked)
    }

    /// The text of a conversation and which of it is trained.
    ///
    /// * `all`: everything.
    /// * `assistant`: every turn of an assistant, with the token that ends it. A turn is what the model has
    ///   to write after the generation prompt: reasoning and tool calls count, the header and the line break after
    ///   the end-of-turn token do not. A template with `{% generation %}` blocks decides itself.
    /// * `last_assistant`: the last such turn.
    ///
    /// # Errors
    /// As [`render`](Self::render), and [`TemplateError::Spans`] when the spans cannot be established exactly.
    pub fn render_with_spans(&self, conversation: &Conversation, loss_on: LossOn) -> Result<Rendered, TemplateError> {
        if conversation.messages.is_empty() {
            return Err(TemplateError::Empty);
        }
        self.for_conversation(conversation).render_with_spans(conversation, loss_on)
    }

    /// The SHA-256 of the template's source, in hexadecimal.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    fn for_conversation(&self, conversation: &Conversation) -> &Compiled {
        match &self.tool_use {
            Some(tool_use) if conversation.tools.is_some() => tool_use,
            _ => &self.default,
        }
    }
}

impl Compiled {
    fn new(name: &str, source: &str, tokenizer: &Tokenizer, now: DateTime) -> Result<Self, TemplateError> {
        // Jinja reads every kind of line break as \n.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let rewritten = generation::rewrite(&source);
        let has_generation = rewritten.is_some();
        let env = environment::compile(rewritten.unwrap_or(source), now)
            .map_err(|error| TemplateError::Syntax { name: name.to_owned(), reason: describe(&error) })?;
        let variables = tokenizer
            .special_tokens()
            .map(|(name, token)| (name.to_owned(), Json::String(token.text.clone())))
            .collect();
        let added_tokens = tokenizer.added_tokens().iter().filter(|token| !token.trim().is_empty()).cloned().collect();
        Ok(Self { name: name.to_owned(), env, variables, added_tokens, has_generation, shape: OnceLock::new() })
    }

    /// Renders as `render_jinja_template` of transformers does, with generation blocks still marked.
    fn render(
        &self,
        messages: &[Message],
        tools: Option<&Json>,
        options: &RenderOptions,
    ) -> Result<String, TemplateError> {
        let fail =
            |error: minijinja::Error| TemplateError::Render { name: self.name.clone(), reason: describe(&error) };
        let messages: Vec<_> = messages.iter().map(template_message).collect();
        let mut context = self.variables.clone();
        context.extend(options.variables.clone());
        context.insert("messages".into(), Json::Array(messages));
        context.insert("tools".into(), tools.cloned().unwrap_or(Json::Null));
        context.insert("documents".into(), Json::Null);
        context.insert("add_generation_prompt".into(), Json::Bool(options.add_generation_prompt));
        let template = self.env.get_template(environment::NAME).map_err(fail)?;
        template.render(Value::from(Serde(&context))).map_err(fail)
    }
}

/// Names under which a message's reasoning is passed.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A message as a template sees it: without fields that are null, and its reasoning under every name in use.
fn template_message(message: &Message) -> Json {
    let mut fields: Map<String, Json> = Map::new();
    let reasoning = REASONING.iter().find_map(|key| message.get(key));
    if let Some(reasoning) = reasoning {
        fields.insert("thinking".into(), reasoning.clone());
    }
    for (key, value) in message.fields() {
        if !value.is_null() {
            fields.insert(key.clone(), value.clone());
        }
    }
    if let Some(reasoning) = reasoning {
        fields.insert("reasoning_content".into(), reasoning.clone());
    }
    Json::Object(fields)
}

/// An error of minijinja on one line: its causes, without the source excerpt.
fn describe(error: &minijinja::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn hash(sources: &[&str]) -> String {
    let mut hash = Sha256::new();
    for source in sources {
        hash.update((source.len() as u64).to_le_bytes());
        hash.update(source.as_bytes());
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
