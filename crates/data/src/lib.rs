//! From rows of text to packed batches of tokens. No tensors.
//!
//! * [`conversation`]: a row before and after tokenisation
//! * [`tokenizer`]: text to tokens and back, as the model's own files say
//! * [`template`]: chat templates, and which bytes of the rendered text are trained
//! * [`mask`]: from trained bytes to trained tokens

pub mod conversation;

pub use conversation::{Conversation, Document, Message, MessageError, RowRef};
