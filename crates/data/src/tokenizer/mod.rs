//! Text to tokens and back, with the rules that transformers 5 reads from a model's directory.
//!
//! * `tokenizer.json` decides how text becomes tokens and which special tokens stand around it; `add_bos_token` and
//!   `add_eos_token` of `tokenizer_config.json` are ignored beside it, as transformers does.
//! * `tokenizer_config.json` names the special tokens. `special_tokens_map.json` overrides it only in directories
//!   without an `added_tokens_decoder`, the older layout.
//! * Named special tokens that the vocabulary lacks are added at its end; those that it has become special.

mod files;
mod stream;

use std::ops::Range;
use std::path::{Path, PathBuf};

use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, Tokenizer as Backend};

pub use files::ChatTemplates;
pub use stream::DecodeStream;

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file of the directory cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The directory has no `tokenizer.json`.
    #[error(
        "{dir}: no tokenizer.json; convert the model's tokenizer with `AutoTokenizer.from_pretrained(...).save_pretrained(...)`"
    )]
    Missing {
        /// The directory.
        dir: PathBuf,
    },
    /// A file is not what it should be.
    #[error("{path}: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong and what was expected.
        reason: String,
    },
    /// Text could not be encoded.
    #[error("cannot tokenise {preview:?}: {reason}")]
    Encode {
        /// How the text begins.
        preview: String,
        /// What the tokenizer said.
        reason: String,
    },
    /// Tokens could not be decoded.
    #[error("cannot decode tokens: {0}")]
    Decode(String),
}

/// A token with a role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecialToken {
    /// Its text.
    pub text: String,
    /// Its id.
    pub id: u32,
}

/// Tokens of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoding {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each token the bytes of the text that it came from. Tokens that share a character share its bytes; a
    /// token that the post-processor added has an empty range.
    pub offsets: Vec<Range<usize>>,
}

/// A tokenizer as a model's directory describes it.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    backend: Backend,
    special: Vec<(String, SpecialToken)>,
    added: Vec<String>,
    templates: ChatTemplates,
    sha256: String,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and the files beside it.
    ///
    /// # Errors
    /// When `tokenizer.json` is missing, a file cannot be read, or its contents are not what transformers writes.
    pub fn from_dir(dir: &Path) -> Result<Self, TokenizerError> {
        let files = files::Files::read(dir)?;
        let mut backend = Backend::from_bytes(&files.tokenizer).map_err(|error| TokenizerError::Malformed {
            path: dir.join(files::TOKENIZER),
            reason: error.to_string(),
        })?;
        // Rows are cut and padded when batches are made, never here.
        backend
            .with_truncation(None)
            .map_err(|error| TokenizerError::Malformed { path: dir.join(files::TOKENIZER), reason: error.to_string() })?
            .with_padding(None);
        backend.set_encode_special_tokens(files.config.split_special_tokens);
        keep_whitespace_in_offsets(&mut backend);
        add_special_tokens(&mut backend, &files.config)
            .map_err(|reason| TokenizerError::Malformed { path: dir.join(files::CONFIG), reason })?;

        let special = files
            .config
            .named
            .iter()
            .filter_map(|(name, token)| {
                let id = backend.token_to_id(&token.content)?;
                let text = token.content.clone();
                Some((name.clone(), SpecialToken { text, id }))
            })
            .collect();
        let mut added: Vec<_> = backend.get_added_tokens_decoder().into_iter().collect();
        added.sort_by_key(|(id, _)| *id);
        let added = added.into_iter().map(|(_, token)| token.content).collect();
        Ok(Self { backend, special, added, templates: files.templates, sha256: files.sha256 })
    }

    /// Encodes a text; `add_special` puts the special tokens around it that the tokenizer's post-processor asks for
    /// (off for rendered chat templates, which write their own).
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Encoding, TokenizerError> {
        let encoding = self.backend.encode(text, add_special).map_err(|error| TokenizerError::Encode {
            preview: text.chars().take(40).collect(),
            reason: error.to_string(),
        })?;
        let offsets = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok(Encoding { ids: encoding.get_ids().to_vec(), offsets })
    }

    /// Decodes tokens; `skip_special` leaves special tokens out.
    ///
    /// # Errors
    /// When the decoder refuses the tokens.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        self.backend.decode(ids, skip_special).map_err(|error| TokenizerError::Decode(error.to_string()))
    }

    /// A decoder that takes tokens one by one and gives back text as soon as its characters are complete.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }

    /// The id of the token that begins a sequence.
    pub fn bos_id(&self) -> Option<u32> {
        self.special("bos_token").map(|token| token.id)
    }

    /// The text of [`bos_id`](Self::bos_id).
    pub fn bos_token(&self) -> Option<&str> {
        self.special("bos_token").map(|token| token.text.as_str())
    }

    /// The id of the token that ends a sequence.
    pub fn eos_id(&self) -> Option<u32> {
        self.special("eos_token").map(|token| token.id)
    }

    /// The text of [`eos_id`](Self::eos_id).
    pub fn eos_token(&self) -> Option<&str> {
        self.special("eos_token").map(|token| token.text.as_str())
    }

    /// The id of the token that fills rows.
    pub fn pad_id(&self) -> Option<u32> {
        self.special("pad_token").map(|token| token.id)
    }

    /// The text of [`pad_id`](Self::pad_id).
    pub fn pad_token(&self) -> Option<&str> {
        self.special("pad_token").map(|token| token.text.as_str())
    }

    /// The id of the token for what the vocabulary cannot express.
    pub fn unk_id(&self) -> Option<u32> {
        self.special("unk_token").map(|token| token.id)
    }

    /// The text of [`unk_id`](Self::unk_id).
    pub fn unk_token(&self) -> Option<&str> {
        self.special("unk_token").map(|token| token.text.as_str())
    }

    /// The named special tokens (`bos_token`, `eos_token`, …) in the order in which transformers lists them.
    pub fn special_tokens(&self) -> impl Iterator<Item = (&str, &SpecialToken)> {
        self.special.iter().map(|(name, token)| (name.as_str(), token))
    }

    /// The text of every added token, special or not, in the order of the ids.
    pub fn added_tokens(&self) -> &[String] {
        &self.added
    }

    /// The id of a token.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.backend.token_to_id(token)
    }

    /// The token of an id, in the tokenizer's own spelling.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.backend.id_to_token(id)
    }

    /// The number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.backend.get_vocab_size(true)
    }

    /// The chat templates of the directory.
    pub fn chat_templates(&self) -> &ChatTemplates {
        &self.templates
    }

    /// The SHA-256 of the tokenizer's files, in hexadecimal. It covers names, lengths and contents.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    fn special(&self, name: &str) -> Option<&SpecialToken> {
        self.special.iter().find(|(key, _)| key == name).map(|(_, token)| token)
    }
}

/// Byte-level post-processors may cut white space off the offsets of tokens, though never off the tokens themselves.
/// The loss mask needs to know where every byte went.
fn keep_whitespace_in_offsets(backend: &mut Backend) {
    fn keep(processor: &mut PostProcessorWrapper) {
        match processor {
            PostProcessorWrapper::ByteLevel(bytes) => bytes.trim_offsets = false,
            PostProcessorWrapper::Roberta(roberta) => roberta.trim_offsets = false,
            PostProcessorWrapper::Sequence(sequence) => sequence.as_mut().iter_mut().for_each(keep),
            PostProcessorWrapper::Bert(_) | PostProcessorWrapper::Template(_) => {}
        }
    }
    if let Some(mut processor) = backend.get_post_processor().cloned() {
        keep(&mut processor);
        backend.with_post_processor(Some(processor));
    }
}

/// Adds the tokens that `tokenizer_config.json` has beyond `tokenizer.json`, and makes the named ones special.
fn add_special_tokens(backend: &mut Backend, config: &files::Config) -> Result<(), String> {
    let known = |backend: &Backend, text: &str| {
        let added = backend.get_added_vocabulary();
        let id = added.get_vocab().get(text).copied()?;
        added.get_added_tokens_decoder().get(&id).cloned()
    };
    let mut tokens: Vec<AddedToken> = Vec::new();
    for token in config.decoder.iter() {
        if known(backend, &token.content).as_ref() != Some(token) {
            tokens.push(token.clone());
        }
    }
    let named = config.named.iter().map(|(_, token)| token);
    for token in named.chain(&config.extra) {
        let from_decoder = || config.decoder.iter().find(|other| other.content == token.content);
        let base = from_decoder().cloned().or_else(|| known(backend, &token.content)).unwrap_or_else(|| token.clone());
        if base.special && known(backend, &base.content).as_ref() == Some(&base) {
            continue;
        }
        tokens.push(base.special(true));
    }
    backend.add_tokens(tokens).map(|_| ()).map_err(|error| error.to_string())
}
