//! `emberlora generate`: text as it is written, token by token.

use std::io::{self, BufRead, Write};

use burn::module::Module;
use emberlora_config::RunConfig;
use emberlora_data::{ChatTemplate, Conversation, Message, RenderOptions, Tokenizer};
use emberlora_model::generate::{Generator, SamplingOptions};
use emberlora_model::{CausalLm, unapplied_settings};
use emberlora_train::{AdapterChoice, Base, LoadedModel};

use crate::args::{GenerateArgs, RecipeArgs};
use crate::exit::WrongInput;
use crate::terminal::Terminal;
use crate::{config, devices, stop};

/// Runs `emberlora generate`.
pub(crate) fn run(args: &GenerateArgs, terminal: &Terminal, out: &mut dyn Write) -> anyhow::Result<()> {
    let recipe = RecipeArgs { recipe: args.recipe.clone(), overrides: args.overrides.clone() };
    let config = config::load_on(&recipe, &args.device)?;
    let base = Base::resolve(&config, terminal)?;
    for setting in unapplied_settings(&base.dir)? {
        tracing::warn!("{}: {setting} is not applied", base.dir.join("generation_config.json").display());
    }
    // Refused before the weights are read.
    let template = args.input.chat.as_ref().map(|_| template(&config, &base.tokenizer)).transpose()?;
    let choice = args.adapter.as_deref().map_or(AdapterChoice::Start, AdapterChoice::Saved);
    let loaded = LoadedModel::load(&config, &base, choice)?;
    devices::announce(&loaded.device, terminal);

    let options = SamplingOptions {
        temperature: args.temperature,
        top_p: args.top_p,
        seed: args.seed.unwrap_or(config.seed),
        max_new_tokens: args.max_new_tokens,
        eos: stop::tokens(&base, template.as_ref())?,
    };
    let mut writer = Writer { model: loaded.model.valid(), tokenizer: &base.tokenizer, options, out };
    match (&args.input.prompt, &args.input.chat, template) {
        (Some(prompt), ..) => writer.complete(prompt),
        (None, Some(Some(text)), Some(template)) => Chat::new(template, &mut writer).turn(text),
        (None, _, Some(template)) => converse(&mut Chat::new(template, &mut writer), terminal),
        // clap asks for one of the two, and a chat has a template.
        (None, _, None) => Err(WrongInput("pass --prompt TEXT or --chat [TEXT]".to_owned()).into()),
    }
}

fn template(config: &RunConfig, tokenizer: &Tokenizer) -> anyhow::Result<ChatTemplate> {
    tokenizer.chat_template(&config.data.chat_template)?.ok_or_else(|| {
        let message = "the tokenizer has no chat template: set `data.chat_template`, or use --prompt";
        WrongInput(message.to_owned()).into()
    })
}

/// Lets the model write and passes on what it writes.
struct Writer<'a> {
    model: CausalLm,
    tokenizer: &'a Tokenizer,
    options: SamplingOptions,
    out: &'a mut dyn Write,
}

impl Writer<'_> {
    /// Continues a text as it stands.
    fn complete(&mut self, prompt: &str) -> anyhow::Result<()> {
        let ids = self.tokenizer.encode(prompt, true)?.ids;
        self.write(&ids).map(drop)
    }

    /// Streams the continuation of `prompt` and answers it as a whole.
    fn write(&mut self, prompt: &[u32]) -> anyhow::Result<String> {
        let (length, trained_for) = (prompt.len(), self.model.config().max_position_embeddings);
        if length > trained_for {
            tracing::warn!(
                "the prompt has {length} tokens, more than the {trained_for} that the model was trained for"
            );
        }
        let mut generator = Generator::new(&self.model, prompt, self.options.clone())?;
        let mut stream = self.tokenizer.decode_stream(true);
        let mut text = String::new();
        for id in generator.by_ref() {
            if let Some(piece) = stream.step(id)? {
                self.out.write_all(piece.as_bytes())?;
                self.out.flush()?;
                text.push_str(&piece);
            }
        }
        if let Some(rest) = stream.finish()? {
            self.out.write_all(rest.as_bytes())?;
            text.push_str(&rest);
        }
        writeln!(self.out)?;
        self.out.flush()?;
        match generator.error() {
            Some(reason) => anyhow::bail!("{reason}"),
            None => Ok(text),
        }
    }
}

/// A conversation with everything that was said so far.
struct Chat<'a, 'w> {
    conversation: Conversation,
    template: ChatTemplate,
    writer: &'a mut Writer<'w>,
}

impl<'a, 'w> Chat<'a, 'w> {
    fn new(template: ChatTemplate, writer: &'a mut Writer<'w>) -> Self {
        Self { conversation: Conversation::new(Vec::new(), None), template, writer }
    }

    /// Says `text` and lets the model answer.
    fn turn(&mut self, text: &str) -> anyhow::Result<()> {
        self.conversation.messages.push(Message::new("user", text));
        let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
        let prompt = self.template.render(&self.conversation, &options)?;
        // The template writes the special tokens itself.
        let ids = self.writer.tokenizer.encode(&prompt, false)?.ids;
        let answer = self.writer.write(&ids)?;
        self.conversation.messages.push(Message::new("assistant", answer));
        Ok(())
    }
}

/// Answers the lines of standard input until it ends.
fn converse(chat: &mut Chat<'_, '_>, terminal: &Terminal) -> anyhow::Result<()> {
    let mut line = Vec::new();
    loop {
        terminal.prompt("> ");
        line.clear();
        if io::stdin().lock().read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let text = str::from_utf8(&line).map_err(|error| WrongInput(format!("standard input: {error}")))?;
        match text.trim() {
            "" => {}
            text => chat.turn(text)?,
        }
    }
}
