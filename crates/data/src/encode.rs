//! Rows to documents: render, tokenise, mark what is trained, cut to length.

use emberlora_config::{LossOn, Overflow};
use serde::Serialize;

use crate::row::{FormatChoice, IGNORED, Row, parse_object, parse_row};
use crate::{
    ChatTemplate, Conversation, DataError, DataOptions, Document, Encoding, Message, RowError, RowRef, Tokenizer, mask,
};

/// What became of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// It is a document as it stands.
    Kept,
    /// It is a document of its first `max_seq_len` tokens.
    Truncated {
        /// Its whole length.
        length: usize,
    },
    /// It takes no part in the run.
    Dropped(DropReason),
}

/// Why a row takes no part in the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum DropReason {
    /// It is longer than `max_seq_len` and `overflow` is `drop`.
    TooLong {
        /// Its length.
        length: usize,
    },
    /// None of its first `max_seq_len` tokens is trained.
    Untrained {
        /// Its whole length.
        length: usize,
    },
}

/// A row as a document, whether or not it is kept.
#[derive(Clone, Debug)]
pub(crate) struct Encoded {
    pub document: Document,
    pub outcome: Outcome,
}

/// Turns rows into documents; shared by all threads.
#[derive(Debug)]
pub(crate) struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<ChatTemplate>,
    loss_on: LossOn,
    max_seq_len: usize,
    overflow: Overflow,
    keep_text: bool,
}

impl<'a> Encoder<'a> {
    pub(crate) fn new(options: &DataOptions, tokenizer: &'a Tokenizer) -> Result<Self, DataError> {
        Ok(Encoder {
            tokenizer,
            template: tokenizer.chat_template(&options.chat_template)?,
            loss_on: options.loss_on,
            max_seq_len: options.max_seq_len,
            overflow: options.overflow,
            keep_text: false,
        })
    }

    /// Keeps the rendered text with each document.
    pub(crate) fn keeping_text(mut self) -> Self {
        self.keep_text = true;
        self
    }

    pub(crate) fn tokenizer(&self) -> &'a Tokenizer {
        self.tokenizer
    }

    pub(crate) fn encode_line(&self, choice: FormatChoice, line: &[u8], source: RowRef) -> Result<Encoded, RowError> {
        let row = parse_row(choice, parse_object(line)?, self.tokenizer.vocab_size())?;
        let Tokens { ids, mut trained, text } = match row {
            Row::Chat(conversation) => self.conversation(&conversation)?,
            Row::Prompt { prompt, completion } => self.completion(&prompt, &completion)?,
            Row::Alpaca { instruction, input, output } => self.alpaca(instruction, input, output)?,
            Row::Text(text) => self.text(text)?,
            Row::Tokens { ids, trained } => {
                let text = if self.keep_text { self.tokenizer.decode(&ids, false)? } else { String::new() };
                Tokens { ids, trained, text }
            }
        };
        // Nothing precedes the first token, so nothing predicts it.
        if let Some(first) = trained.first_mut() {
            *first = false;
        }
        let text = self.keep_text.then_some(text);
        self.fit(Document { ids, trained, source, text })
    }

    /// Applies `overflow` and drops what teaches nothing.
    fn fit(&self, mut document: Document) -> Result<Encoded, RowError> {
        let length = document.ids.len();
        let mut outcome = Outcome::Kept;
        if length > self.max_seq_len {
            match self.overflow {
                Overflow::Error => {
                    return Err(RowError::TooLong { tokens: length, max_seq_len: self.max_seq_len });
                }
                Overflow::Drop => {
                    let outcome = Outcome::Dropped(DropReason::TooLong { length });
                    return Ok(Encoded { document, outcome });
                }
                Overflow::Truncate => {
                    document.ids.truncate(self.max_seq_len);
                    document.trained.truncate(self.max_seq_len);
                    outcome = Outcome::Truncated { length };
                }
            }
        }
        if document.trained_tokens() == 0 {
            outcome = Outcome::Dropped(DropReason::Untrained { length });
        }
        document.ids.shrink_to_fit();
        document.trained.shrink_to_fit();
        Ok(Encoded { document, outcome })
    }

    fn conversation(&self, conversation: &Conversation) -> Result<Tokens, RowError> {
        let template = self.template.as_ref().ok_or(RowError::NoTemplate)?;
        self.rendered(template, conversation)
    }

    fn rendered(&self, template: &ChatTemplate, conversation: &Conversation) -> Result<Tokens, RowError> {
        let rendered = template.render_with_spans(conversation, self.loss_on)?;
        // A template writes bos and eos itself where it wants them.
        let encoding = self.tokenizer.encode(&rendered.text, false)?;
        let trained = mask::trained_tokens(&encoding, &rendered)?;
        Ok(Tokens { ids: encoding.ids, trained, text: rendered.text })
    }

    /// With a chat template an instruction is a user's turn and its output the answer; without one the prompt is the
    /// one that Stanford Alpaca was trained with.
    fn alpaca(&self, instruction: String, input: String, output: String) -> Result<Tokens, RowError> {
        match &self.template {
            Some(template) => {
                let request = if input.is_empty() { instruction } else { format!("{instruction}\n\n{input}") };
                let turns = vec![Message::new("user", request), Message::new("assistant", output)];
                self.rendered(template, &Conversation::new(turns, None))
            }
            None => self.completion(&alpaca_prompt(&instruction, &input), &output),
        }
    }

    fn text(&self, text: String) -> Result<Tokens, RowError> {
        let ids = self.tokenizer.encode(&text, true)?.ids;
        let trained = vec![true; ids.len()];
        Ok(self.ended(Tokens { ids, trained, text }))
    }

    /// A prompt and its completion as one text. The prompt's tokens are exactly those it has on its own, because that
    /// is what the model will be given when it generates.
    fn completion(&self, prompt: &str, completion: &str) -> Result<Tokens, RowError> {
        let text = format!("{prompt}{completion}");
        let mut ids = self.encode_open(prompt)?;
        let border = ids.len();
        let whole = self.encode_open(&text)?;
        if whole.starts_with(&ids) {
            ids = whole;
        } else {
            // The tokenizer merges across the border. Apart, the two may stand for another text than together: some
            // tokenizers put a space before whatever they are given.
            ids.extend(self.tokenizer.encode(completion, false)?.ids);
            if self.tokenizer.decode(&ids, false)? != self.tokenizer.decode(&whole, false)? {
                return Err(RowError::Boundary);
            }
        }
        let all = self.loss_on == LossOn::All;
        let trained = (0..ids.len()).map(|index| all || index >= border).collect();
        Ok(self.ended(Tokens { ids, trained, text }))
    }

    /// Encodes with the tokenizer's special tokens, but without an eos at the end.
    fn encode_open(&self, text: &str) -> Result<Vec<u32>, RowError> {
        let Encoding { mut ids, offsets } = self.tokenizer.encode(text, true)?;
        let added = offsets.last().is_some_and(|range| range.is_empty());
        if added && ids.last().copied() == self.tokenizer.eos_id() {
            ids.pop();
        }
        Ok(ids)
    }

    /// Ends a text with a trained eos, where it has none yet, so that the model learns to stop.
    fn ended(&self, mut tokens: Tokens) -> Tokens {
        if let Some(eos) = self.tokenizer.eos_id()
            && tokens.ids.last() != Some(&eos)
        {
            tokens.ids.push(eos);
            tokens.trained.push(true);
            tokens.text.push_str(self.tokenizer.eos_token().unwrap_or_default());
        }
        tokens
    }
}

/// A row after tokenisation.
struct Tokens {
    ids: Vec<u32>,
    trained: Vec<bool>,
    text: String,
}

/// The prompt of Stanford Alpaca (<https://github.com/tatsu-lab/stanford_alpaca>, `PROMPT_DICT`) with a line break at
/// its end, as in the `text` column of the published data.
fn alpaca_prompt(instruction: &str, input: &str) -> String {
    if input.is_empty() {
        format!(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Response:\n"
        )
    } else {
        format!(
            "Below is an instruction that describes a task, paired with an input that provides further context. \
             Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
        )
    }
}

impl Document {
    /// How many tokens are predicted during training.
    pub fn trained_tokens(&self) -> usize {
        // The first token is never predicted, whatever its mark says.
        self.trained.iter().skip(1).filter(|&&trained| trained).count()
    }

    /// The labels by the convention of Hugging Face: unshifted, -100 where a token is not trained.
    pub fn labels(&self) -> Vec<i64> {
        self.ids
            .iter()
            .zip(&self.trained)
            .enumerate()
            .map(|(index, (&id, &trained))| if trained && index > 0 { i64::from(id) } else { IGNORED })
            .collect()
    }
}
