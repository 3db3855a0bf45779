//! Text from tokens as they come.

use super::{Tokenizer, TokenizerError};

/// Decodes tokens one at a time.
///
/// A character may need several tokens, and a token's text may depend on the one before it, so the stream decodes
/// the tokens since the last complete text together with those of that text, and gives back the difference.
#[derive(Debug)]
pub struct DecodeStream<'t> {
    tokenizer: &'t Tokenizer,
    skip_special: bool,
    ids: Vec<u32>,
    /// How many of `ids` made up the text that was given back last.
    context: usize,
}

impl<'t> DecodeStream<'t> {
    pub(super) fn new(tokenizer: &'t Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, ids: Vec::new(), context: 0 }
    }

    /// Takes a token and returns the text that is complete with it, if any.
    ///
    /// # Errors
    /// When the decoder refuses the tokens.
    pub fn step(&mut self, id: u32) -> Result<Option<String>, TokenizerError> {
        self.ids.push(id);
        self.take(false)
    }

    /// The text of tokens whose last character never became complete, with U+FFFD for what is missing.
    ///
    /// # Errors
    /// When the decoder refuses the tokens.
    pub fn finish(mut self) -> Result<Option<String>, TokenizerError> {
        self.take(true)
    }

    fn take(&mut self, all: bool) -> Result<Option<String>, TokenizerError> {
        let before = self.tokenizer.decode(&self.ids[..self.context], self.skip_special)?;
        let after = self.tokenizer.decode(&self.ids, self.skip_special)?;
        let incomplete = after.ends_with('\u{fffd}') && !all;
        if incomplete || after.len() <= before.len() || !after.is_char_boundary(before.len()) {
            return Ok(None);
        }
        let text = after[before.len()..].to_owned();
        self.ids.drain(..self.context);
        self.context = self.ids.len();
        Ok(Some(text))
    }
}
